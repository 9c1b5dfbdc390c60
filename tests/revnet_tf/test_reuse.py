"""What a branch finds once in a training step, and uses in both evaluations."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from revnet_tf import RevBlock, RevSequence, reuse
from revnet_tf.normalization import BatchNormalization, reusing
from tests.twins import assert_close, images

layers = keras.layers


def sequence(norm, num_blocks=2, **kwargs):
    def branch():
        return keras.Sequential([norm(), layers.ReLU(), layers.Conv2D(2, 1)])

    keras.utils.set_random_seed(0)
    blocks = [RevBlock(branch(), branch()) for _ in range(num_blocks)]
    made = RevSequence(blocks, **kwargs)
    made.build((None, 5, 5, 4))
    return made


def training_step(layer, run=tf.function):
    weights = [v.value for v in layer.trainable_variables]

    @run
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, [x, *weights])

    return step


def count_operations(step, x):
    """Returns how often each operation is executed, by type."""
    graph = step.get_concrete_function(x).graph.as_graph_def()
    functions = {f.signature.name: f.node_def for f in graph.library.function}

    def count(nodes):
        total = collections.Counter()
        for node in nodes:
            total[node.op] += 1
            if "f" in node.attr and node.attr["f"].func.name in functions:
                total += count(functions[node.attr["f"].func.name])
        return total

    return count(graph.node)


@pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchNormalization])
def test_a_step_computes_the_moments_of_a_batch_once_for_each_layer(norm):
    keras.config.set_dtype_policy("float64")  # for which there is no fused operation
    made = sequence(norm, num_blocks=2)
    ops = count_operations(training_step(made), tf.cast(images(3, 5, 5, 4), "float64"))
    assert ops["SquaredDifference"] == 4  # two blocks of two branches
    assert ops["Relu"] == 8  # evaluated twice


def test_the_layer_of_the_user_stays_what_it_is():
    made = sequence(layers.BatchNormalization)
    norms = [x for x in made._flatten_layers() if "normalization" in x.name]
    before = [(type(n), sorted(vars(n))) for n in norms]
    training_step(made)(images(3, 5, 5, 4))
    assert [(type(n), sorted(vars(n))) for n in norms] == before
    assert {t for t, _ in before} == {layers.BatchNormalization}


@pytest.mark.parametrize("options", [{}, {"axis": 1}, {"renorm": True}], ids=str)
def test_gradients_through_kept_moments_are_those_of_autodiff(run, options):
    def norm():
        return layers.BatchNormalization(dtype="float64", **options)

    keras.config.set_dtype_policy("float64")
    x = tf.cast(1 + images(3, 5, 5, 4), tf.float64)
    found = []
    for recompute in (True, False):
        made = sequence(norm, recompute=recompute)
        gradients = training_step(made, run)(x)
        found.append(gradients + [v.value for v in made.non_trainable_variables])
    assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_second_evaluation_gets_what_the_same_call_has_got_in_the_first():
    numbers = iter(range(10))

    def find():
        return reuse.once(lambda: next(numbers))

    assert find() == (0, False)
    with reuse.first() as outer:
        assert find() == (1, False)
        with reuse.first() as inner:
            assert find() == (2, False)
        assert find() == (3, False)
    assert (outer, inner) == ([1, 3], [2])
    with reuse.second(outer):
        assert find() == (1, True)
        with reuse.second(inner):
            assert find() == (2, True)
        assert find() == (3, True)
        with pytest.raises(ValueError, match="more often"):
            find()
    assert find() == (4, False)


def test_rebuilt_inputs_are_normalized_with_the_moments_of_the_true_ones():
    made = layers.BatchNormalization(epsilon=0.0)
    made.build((None, 2))
    x = tf.constant([[1.0, 4.0], [3.0, 8.0]])
    with reuse.first() as kept:
        reusing(made)(x, training=True)
    with reuse.second(kept):
        y = reusing(made)(x + 1, training=True)
    # Of (1, 3) and (4, 8): means 2 and 6, deviations 1 and 2.
    np.testing.assert_allclose(y, [[0, -0.5], [2, 1.5]], rtol=1e-6)
