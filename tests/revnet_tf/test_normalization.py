"""Batch normalization, compared with Keras's layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from revnet_tf.normalization import BatchNormalization
from tests.twins import assert_close, images


def pair(shape=(4, 5, 6, 3), **kwargs):
    """Returns the layer and Keras's, with the same weights."""
    made = []
    for kind in (BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(momentum=0.9, **kwargs)
        layer.build(shape)
        rng = np.random.default_rng(0)
        layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
        made.append(layer)
    return made


def results(layer, x, run=lambda function: function, **kwargs):
    """Returns outputs, gradients and weights after a call in training."""

    @run
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **kwargs)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * tf.cast(x, tf.float32) ** 2)
        sources = [x, *(v.value for v in layer.trainable_variables)]
        return y, tape.gradient(loss, sources)

    y, gradients = step(x)
    return [y, *gradients, *(v.value for v in layer.variables)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": False},
        {"center": False},
        {"trainable": False},
        {"synchronized": True},
        {"renorm": True},
        {"axis": 1},
    ],
    ids=str,
)
def test_values_gradients_and_statistics_are_those_of_keras(run, options):
    x = 3 + 2 * images(4, 5, 6, 3)
    ours, keras_layer = pair(**options)
    got, expected = results(ours, x, run), results(keras_layer, x, run)
    assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 3), (4, 6, 3), (2, 3, 4, 5, 3)], ids=len)
def test_inputs_of_every_rank_are_those_of_keras_and_one_operation(shape):
    x = 3 + 2 * images(*shape)
    ours, keras_layer = pair(shape)
    expected = results(keras_layer, x, tf.function)
    assert_close(results(ours, x, tf.function), expected, rtol=2e-5, atol=2e-5)
    open_sizes = [None] * (len(shape) - 1)
    assert types(ours, [*open_sizes, 3]).count("FusedBatchNormGradV3") == 1


def test_a_mean_far_above_the_deviation_costs_no_more_digits_than_with_keras(run):
    x = 1000 + 0.1 * images(8, 4, 4, 3)
    ours, keras_layer = pair(x.shape)
    exact = results(pair(x.shape, dtype="float64")[1], tf.cast(x, tf.float64))

    def error(layer):
        got = [np.float64(t) for t in results(layer, x, run)]
        return [np.abs(a - b).max() for a, b in zip(got, exact, strict=True)]

    for own, limit in zip(error(ours), error(keras_layer), strict=True):
        assert own <= 2 * limit + 1e-6


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [("mixed_float16", 2**-8), ("mixed_bfloat16", 2**-5), ("float64", 1e-12)],
)
def test_every_precision_is_that_of_keras(policy, tolerance):
    ours, keras_layer = pair(dtype=policy)
    x = tf.cast(images(4, 5, 6, 3), ours.compute_dtype)
    got, expected = results(ours, x), results(keras_layer, x)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for a, b in zip(got, expected, strict=True):
        a, b = (tf.cast(t, tf.float64).numpy() for t in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_other_inputs_than_images_and_masks_are_left_to_keras():
    x = images(4, 6, 3)
    mask = tf.sequence_mask([6, 2, 3, 1], 6)
    ours, keras_layer = pair(x.shape)
    expected = results(keras_layer, x, mask=mask)
    assert_close(results(ours, x, mask=mask), expected, rtol=1e-6, atol=1e-6)


def test_the_variance_of_a_single_value_is_zero():
    ours, _ = pair((1, 1, 1, 3))
    before = ours.moving_variance.numpy()
    ours(images(1, 1, 1, 3), training=True)
    np.testing.assert_allclose(ours.moving_variance, 0.9 * before, rtol=1e-6)


def types(layer, shape=(4, 5, 6, 3)):
    """Returns the kinds of the operations of a training pass."""
    function = tf.function(lambda x: results(layer, x))
    graph = function.get_concrete_function(tf.TensorSpec(shape)).graph
    return [op.type for op in graph.get_operations()]


def test_the_gradient_is_one_operation():
    ours, keras_layer = pair()
    assert types(ours).count("FusedBatchNormGradV3") == 1
    assert "SquaredDifference" not in types(ours)
    assert "SquaredDifference" in types(keras_layer)


def test_the_layer_comes_back_from_its_configuration():
    layer = BatchNormalization(momentum=0.9, epsilon=1e-3, name="norm")
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is BatchNormalization
    assert again.get_config() == layer.get_config()
