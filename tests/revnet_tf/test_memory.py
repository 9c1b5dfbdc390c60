"""The figures of `memory` for a training step, compared with values by hand."""

import re

import keras
import numpy as np
import pytest

from benchmarks import networks, processes
from benchmarks.memory import xla_temporary_bytes
from revnet_tf import RevBlock, RevSequence, memory, models

BATCH_SIZE, WIDTH = 8192, 64
STREAM = BATCH_SIZE * WIDTH * 4  # bytes of one of two streams, 2 MiB


def dense_model(num_blocks, **kwargs):
    """Returns a chain of blocks. Each branch is one matrix product."""

    def branch():
        return keras.layers.Dense(WIDTH, use_bias=False)

    blocks = [RevBlock(branch(), branch(), **kwargs) for _ in range(num_blocks)]
    x = keras.Input((2 * WIDTH,))
    return keras.Model(x, keras.layers.Dense(1)(RevSequence(blocks, name="body")(x)))


def kept(model):
    return {s.name: s.kept_bytes for s in memory.estimate(model, BATCH_SIZE).stages}


def test_a_sequence_of_any_depth_stores_its_output():
    for num_blocks in (1, 4):
        # The dense layer at the end stores the same tensor.
        assert kept(dense_model(num_blocks))["body"] == pytest.approx(2 * STREAM, 0.01)


def test_blocks_without_recomputation_store_the_input_of_each_branch():
    def body(num_blocks):
        return kept(dense_model(num_blocks, recompute=False))["body"]

    # Each block stores x2 for f and y1 for g.
    assert body(5) - body(4) == pytest.approx(2 * STREAM, 0.01)


def test_weights_gradients_and_optimizer_by_hand():
    model = models.RevNet38(classifier_activation=None)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), jit_compile=False)
    found = memory.estimate(model, 2)
    statistics = sum(np.prod(v.shape) for v in model.non_trainable_variables)
    assert found.gradient_bytes == 4 * 464_890
    assert found.weight_bytes == 4 * (464_890 + statistics)
    # The momentum of each weight; the number of steps (int64) and the learning rate.
    assert found.optimizer_bytes == 4 * 464_890 + 8 + 4
    assert found.peak_bytes == (
        found.activation_bytes
        + found.weight_bytes
        + found.gradient_bytes
        + found.optimizer_bytes
    )
    assert 0 < found.working_set_bytes < found.activation_bytes


def test_the_report_names_every_stage_and_the_peak():
    model = models.RevNet((2, 1), (8, 8, 16), input_shape=(8, 8, 3))
    report = str(memory.estimate(model, 4))
    for name in ("stem", "stage1", "stage2", "other layers", "peak of a training step"):
        assert name in report


ESTIMATE_AND_MEASURE = """
import json, sys, keras
from benchmarks import networks
from revnet_tf import memory
model = networks.build(sys.argv[1], 4)
print(json.dumps([f(model, 32).peak_bytes for f in (memory.estimate, memory.measure)]))
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "network", ["functional", pytest.param("ordinary", marks=pytest.mark.slow)]
)
def test_the_estimate_is_within_a_tenth_of_the_measurement(network):
    estimated, measured = processes.python("-c", ESTIMATE_AND_MEASURE, network)
    assert estimated == pytest.approx(measured, 0.1)


@pytest.mark.thorough
def test_with_xla_the_estimate_is_the_buffer_that_the_compiler_assigns():
    model = networks.build("sequence", 3, jit_compile=True)
    found = memory.estimate(model, 64)
    inputs = 64 * 32 * 32 * 64 * 4
    # The step of `fit` also has a loss and metrics.
    assert found.activation_bytes + found.gradient_bytes - inputs == pytest.approx(
        xla_temporary_bytes("sequence", 3, 64), 0.02
    )


@pytest.mark.thorough
def test_the_memory_of_a_revnet_under_xla_does_not_depend_on_depth():
    def activation_bytes(num_blocks):
        model = models.RevNet(
            (num_blocks,) * 2, (16, 16, 32), classifier_activation=None
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), jit_compile=True)
        return memory.estimate(model, 32).activation_bytes

    assert activation_bytes(4) < 1.02 * activation_bytes(2)


MEASURE_OF_THE_LEAST = """
import json, sys, keras, tensorflow as tf
from benchmarks.estimate import least_bytes
from revnet_tf import memory, models
# The load of the machine decides which of two threads is first, and so the peak.
tf.config.threading.set_inter_op_parallelism_threads(1)
found = []
for bottleneck, like in ((False, "RevNet38"), (True, "RevNet164")):
    model = models.RevNet((2, 2), (32, 32, 64), bottleneck, classifier_activation=None)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=sys.argv[1] != "graph")
    found.append(memory.measure(model, 32).activation_bytes / least_bytes(like, 32))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "mode",
    [
        "graph",
        pytest.param("xla", marks=pytest.mark.thorough),
        pytest.param("xla_for_memory", marks=pytest.mark.thorough),
    ],
)
def test_a_revnet_needs_little_more_than_the_lower_bound(mode):
    # `benchmarks.estimate` defines the lower bound.
    program, flags = MEASURE_OF_THE_LEAST, processes.MODES[mode]
    found = processes.python("-c", program, mode, xla_flags=flags)
    assert max(found) < 1.15


VALUES_AROUND_A_MEASUREMENT = """
import json, keras
from revnet_tf import RevBlock, memory
x = keras.Input((4096,))
branches = [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
model = keras.Model(x, RevBlock(*branches)(x))
model.compile(keras.optimizers.Adam(0.1), jit_compile=False)
model.optimizer.build(model.trainable_variables)
variables = [*model.variables, *model.optimizer.variables]
before = [v.numpy() for v in variables]
memory.measure(model, 64)
changed = [v.path for v, x in zip(variables, before) if (v.numpy() != x).any()]
print(json.dumps([len(variables), changed]))
"""


@pytest.mark.thorough
def test_measuring_leaves_the_variables_as_they_were():
    count, changed = processes.python("-c", VALUES_AROUND_A_MEASUREMENT)
    assert count > 6
    assert changed == []


def test_a_plan_stores_the_last_blocks_as_far_as_the_budget_goes():
    model = dense_model(4)
    blocks = model.get_layer("body").blocks
    before = [v.numpy() for v in model.weights]

    def stored(budget):
        assert memory.plan(model, BATCH_SIZE, budget) is model
        assert 1.08 * memory.estimate(model, BATCH_SIZE).peak_bytes <= budget
        return [not block.recompute for block in blocks]

    least, most = (
        round(1.08 * memory.estimate(m, BATCH_SIZE).peak_bytes) + 1
        for m in (model, dense_model(4, recompute=False))
    )
    counts = []
    for i in range(3):
        found = stored(least + (most - least) * i // 2)
        assert found == sorted(found)
        counts.append(sum(found))
    assert counts == sorted(counts)
    assert counts[0] < 2 and counts[-1] == 4
    for v, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(v, value)


def test_a_budget_below_the_minimum_names_it_and_the_largest_batch_that_fits():
    model = dense_model(3)
    model.get_layer("body").blocks[1].recompute = False
    with pytest.raises(ValueError, match="minimum of [0-9,]+ for batch_size=8192") as e:
        memory.plan(model, BATCH_SIZE, 8 * STREAM // 2)
    largest = int(re.search(r"a batch of (\d+) fits", str(e.value)).group(1))
    recomputed = dense_model(3)
    assert 1.08 * memory.estimate(recomputed, largest).peak_bytes <= 4 * STREAM
    assert memory.estimate(recomputed, largest * 11 // 10).peak_bytes > 3.7 * STREAM
    assert [b.recompute for b in model.get_layer("body").blocks] == [True, False, True]


def test_a_budget_below_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="not even a batch of 1 fits"):
        memory.plan(dense_model(1), 4, 100)


def test_a_budget_below_a_batch_of_one_names_the_largest_patch_that_fits():
    def model(*sizes, flatten=False):
        branches = [keras.layers.Conv2D(8, 3, padding="same") for _ in range(2)]
        inputs = keras.Input((*sizes, 16))
        x = RevBlock(*branches)(inputs)
        if flatten:
            x = keras.layers.Dense(1)(keras.layers.Flatten()(x))
        model = keras.Model(inputs, x)
        model.compile("adam", "mse", jit_compile=False)
        return model

    budget = int(1.08 * memory.estimate(model(96, 48), 1).peak_bytes) + 1
    with pytest.raises(ValueError, match="a patch of 96x48 does"):
        memory.plan(model(160, 80), 2, budget)
    # The weights of a dense layer depend on the size of the image.
    with pytest.raises(ValueError, match="not even a batch of 1 fits.$"):
        memory.plan(model(160, 80, flatten=True), 1, budget)


def test_a_plan_takes_effect_in_a_model_that_has_been_trained():
    model = dense_model(2)
    model.compile("sgd", "mse", jit_compile=False)
    x, y = np.ones((4, 2 * WIDTH)), np.ones((4, 1))
    model.train_on_batch(x, y)
    before = model.train_function
    memory.plan(model, BATCH_SIZE, 10**9)
    assert model.train_function is not before
    model.train_on_batch(x, y)


def test_models_that_cannot_be_estimated_are_refused():
    with pytest.raises(ValueError, match="no place"):
        x = keras.Input((4,))
        memory.plan(keras.Model(x, keras.layers.Dense(4)(x)), 2, 10**9)
    with pytest.raises(ValueError, match="input_shape"):
        memory.estimate(models.RevNet((1,), (4, 4), include_top=False), 2)
    for batch_size in (0, -1, 2.5, "3", None, True):
        with pytest.raises(ValueError, match=f"batch_size .* got {batch_size!r}"):
            memory.estimate(dense_model(1), batch_size)
    with pytest.raises(ValueError, match="functional or sequential"):
        memory.estimate(RevBlock(keras.layers.Dense(1), keras.layers.Dense(1)), 2)
