"""Memory of models that were trained and deleted."""

import gc
import json
import os
import pathlib
import subprocess
import sys
import weakref

import keras
import pytest
import tensorflow as tf
from twins import images

from revnet_tf import RevBlock, RevSequence

layers = keras.layers
ROOT = pathlib.Path(__file__).parents[2]
NUM_BLOCKS = 4


def fit_and_delete(structure, recompute, units=4):
    """Returns weak references to the branches and kernels of a deleted model."""
    blocks = make_blocks(recompute, units)
    x = y = keras.Input((2 * units,))
    for layer in [RevSequence(blocks)] if structure == "sequence" else blocks:
        y = layer(y)
    model = keras.Model(x, layers.Dense(1)(y))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(images(4, 2 * units), images(4, 1), verbose=0)
    return references_to(blocks)


def loop_and_delete(structure, recompute, units=4):
    """As `fit_and_delete`, with a custom training step."""
    blocks = make_blocks(recompute, units)
    steps = [RevSequence(blocks)] if structure == "sequence" else blocks
    for layer in steps:
        layer.build((None, 2 * units))
    weights = [v.value for layer in steps for v in layer.trainable_variables]

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            y = x
            for layer in steps:
                y = layer(y, training=True)
            loss = tf.reduce_sum(y**2)
        for v, d in zip(weights, tape.gradient(loss, weights), strict=True):
            v.assign_sub(1e-6 * d)

    step(images(4, 2 * units))
    return references_to(blocks)


def make_blocks(recompute, units):
    return [
        RevBlock(layers.Dense(units), layers.Dense(units), recompute=recompute)
        for _ in range(NUM_BLOCKS)
    ]


def references_to(blocks):
    branches = [branch for block in blocks for branch in (block.f, block.g)]
    return [weakref.ref(part) for b in branches for part in (b, b.kernel)]


def alive(references):
    keras.backend.clear_session()
    gc.collect()
    assert len(references) == 4 * NUM_BLOCKS
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("structure", ["blocks", "sequence"])
def test_deleted_blocks_leave_nothing_after_a_custom_loop(structure):
    assert alive(loop_and_delete(structure, True)) == 0


def resident_mib():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cycles(train, recompute, count=30):
    """Prints the resident size after each model that was trained and deleted."""
    sizes = []
    for _ in range(count):
        # A kernel is 1 MiB, so the size shows weights that stay in memory.
        train("blocks", recompute, units=512)
        keras.backend.clear_session()
        gc.collect()
        sizes.append(resident_mib())
    print(json.dumps(sizes))


def growth_per_cycle(train, recompute):
    """Returns the MiB by which a warm process grows with each model."""
    program = f"import test_lifetime as t; t.cycles(t.{train.__name__}, {recompute})"
    paths = [str(ROOT), str(ROOT / "tests"), str(pathlib.Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    warm = 5
    return (sizes[-1] - sizes[warm]) / (len(sizes) - 1 - warm)


@pytest.mark.slow
@pytest.mark.parametrize("train", [fit_and_delete, loop_and_delete])
def test_models_that_come_and_go_grow_a_process_no_more_than_their_twins(train):
    # After `fit` the process of the twin grows by all of its weights, too. The sum over
    # replicas in Keras's optimizer is a custom gradient, which TensorFlow never frees.
    twin = growth_per_cycle(train, False)
    assert growth_per_cycle(train, True) <= twin + NUM_BLOCKS
