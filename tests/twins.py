"""Pairs of equal networks, one recomputing and one with ordinary backpropagation."""

import weakref

import keras
import numpy as np
import tensorflow as tf

from revnet_tf import RevBlock, RevSequence

layers = keras.layers


def conv_branch(filters, dropout=0.0, **kwargs):
    stack = []
    for i in range(2):
        stack += [
            layers.BatchNormalization(momentum=0.9, **kwargs),
            layers.Activation("tanh", **kwargs),
            layers.Conv2D(filters, 3, padding="same", **kwargs),
        ]
        if dropout:
            stack.append(layers.Dropout(dropout, seed=i, **kwargs))
    return keras.Sequential(stack)


def conv_sequence(num_blocks=2, channels=8, dropout=0.3, **kwargs):
    half = channels // 2
    return RevSequence(
        [
            RevBlock(
                conv_branch(half, dropout, **kwargs),
                conv_branch(half, dropout, **kwargs),
                **kwargs,
            )
            for _ in range(num_blocks)
        ],
        **kwargs,
    )


def twins(make, input_shape):
    """Returns `make()` twice, with equal weights; the second does not recompute."""
    pair = []
    for recompute in (True, False):
        keras.utils.set_random_seed(7)
        layer = make()
        layer.recompute = recompute
        layer.build(input_shape)
        pair.append(layer)
    return pair


def images(*shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.standard_normal(shape).astype(dtype))


def loss_and_gradients(layer, x):
    """Returns the loss of a training pass, and its gradients for input and weights."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        # Neither linear nor symmetric: each output has a gradient of its own.
        loss = sum(
            tf.reduce_sum(tf.sin(1.5 * part) * tf.cos(part[::-1]))
            for part in tf.nest.flatten(y)
        )
        for extra in layer.losses:
            loss += tf.cast(extra, loss.dtype)
    weights = [v.value for v in layer.trainable_variables]
    gradients = tape.gradient(loss, [*tf.nest.flatten(x), *weights])
    # (that of a lookup is sparse)
    return [loss, *(d if d is None else tf.convert_to_tensor(d) for d in gradients)]


class Recorder(layers.Layer):
    """Appends weak references to what it returns to the list `made`."""

    def __init__(self, made, **kwargs):
        super().__init__(**kwargs)
        self.record = made.append  # as a list, Keras would track a copy of it

    def call(self, x):
        y = tf.tanh(x)
        if not isinstance(x, keras.KerasTensor):
            self.record(weakref.ref(y))
        return y

    def compute_output_shape(self, input_shape):
        return input_shape


def assert_close(got, expected, rtol, atol):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            scale = max(1.0, float(np.max(np.abs(b), initial=0)))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * scale)


def assert_same_state(a, b):
    """All variables that the two layers hold are equal to the last bit."""
    assert len(a.variables) == len(b.variables)
    for v, w in zip(a.variables, b.variables, strict=True):
        np.testing.assert_array_equal(v.numpy(), w.numpy(), err_msg=v.path)
