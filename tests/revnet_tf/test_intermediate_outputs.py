"""Every tensor between two layers is a real part of the graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, images

from revnet_tf import RevBlock, RevSequence, models

layers = keras.layers


def dense_block():
    return RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh"))


def stacked_blocks():
    x = y = keras.Input((8,))
    outputs = []
    for _ in range(3):
        y = dense_block()(y)
        outputs.append(y)
    return keras.Model(x, outputs), images(5, 8)


def stacked_sequences():
    x = y = keras.Input((8,))
    outputs = []
    for _ in range(2):
        y = RevSequence([dense_block() for _ in range(2)])(y)
        outputs.append(y)
    return keras.Model(x, outputs), images(5, 8)


def pairs():
    x = y = [keras.Input((4,)), keras.Input((4,))]
    outputs = []
    for _ in range(2):
        y = dense_block()(y)
        outputs += y
    outputs[-2:] = [layers.Concatenate()(outputs[-2:])]
    return keras.Model(x, outputs), [images(5, 4), images(5, 4, seed=1)]


def stages_of_a_revnet():
    model = models.RevNet((2, 2), (8, 8, 16), input_shape=(8, 8, 3))
    names = "stem", "stage1", "stage2_downsampling", "stage2", "predictions"
    outputs = [model.get_layer(name).output for name in names]
    return keras.Model(model.input, outputs), images(2, 8, 8, 3)


MODELS = [stacked_blocks, stacked_sequences, pairs, stages_of_a_revnet]


def gradients(model, x, training, second_consumer=False):
    """Returns the gradients of a score for the intermediate outputs and the weights."""
    with tf.GradientTape() as tape:
        *features, last = model(x, training=training)
        score = tf.reduce_sum(tf.sin(3 * last))
        if second_consumer:
            score += sum(tf.reduce_sum(tf.cos(f) * f) for f in features)
    weights = [v.value for v in model.trainable_variables]
    return tape.gradient(score, [*features, *weights])


@pytest.mark.parametrize("make", MODELS)
def test_score_has_a_gradient_for_intermediate_outputs(make, run):
    keras.utils.set_random_seed(0)
    model, x = make()
    for training in (True, False):
        expected = gradients(model, x, training)  # eager
        got = run(lambda x: gradients(model, x, training))(x)  # noqa: B023
        assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert all(np.any(d != 0) for d in expected if d is not None)


@pytest.mark.parametrize("make", MODELS)
def test_second_consumer_of_an_intermediate_output_adds_its_gradient(make, run):
    keras.utils.set_random_seed(0)
    model, x = make()
    got = run(lambda x: gradients(model, x, True, second_consumer=True))(x)
    for layer in model.layers:
        if hasattr(layer, "recompute"):
            layer.recompute = False
    expected = gradients(model, x, True, second_consumer=True)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unconnected_gradients_are_not_zero_for_intermediate_outputs():
    model, x = stacked_sequences()

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            features, last = model(x, training=True)
            score = tf.reduce_sum(last**2)
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(score, features, unconnected_gradients=zero)

    assert np.any(gradient(x) != 0)
