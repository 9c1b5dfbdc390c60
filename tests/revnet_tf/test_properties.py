"""Random reversible networks against their twins with ordinary backpropagation.

Random are rank, axis, widths, depth, dtype, kinds of branches, shared and frozen
branches, and the structure of the blocks.
"""

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from twins import assert_close, images, twins

from revnet_tf import RevBlock, RevSequence

layers = keras.layers

# All health checks are off, because a fixture does not run again for every example.
SETTINGS = dict(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # Shrinking takes minutes.
    suppress_health_check=list(HealthCheck),
)


class Subclassed(layers.Layer):
    """A branch with several kinds of state, a loss, and a difference in training."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units, "tanh", dtype=self.dtype_policy)
        self.seed = keras.random.SeedGenerator()

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.calls = self.add_weight(
            shape=(), dtype="int32", trainable=False, initializer="zeros"
        )
        self.mean = self.add_weight(
            shape=(), dtype=self.dtype, trainable=False, initializer="zeros"
        )

    def call(self, x, training=False):
        y = self.dense(x)
        self.add_loss(0.1 * tf.reduce_mean(y**2))
        if training:
            self.calls.assign(self.calls + 1)
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(x))
            y *= keras.random.uniform(
                (), 0.5, 1.5, dtype=self.compute_dtype, seed=self.seed
            )
        return y


def dense(units, rank, dtype):
    return layers.Dense(units, "tanh", dtype=dtype)


def conv(units, rank, dtype):
    if rank == 2:
        return layers.Dense(units, "gelu", dtype=dtype)
    cls = {3: layers.Conv1D, 4: layers.Conv2D, 5: layers.Conv3D}[rank]
    return cls(units, 3, padding="same", activation="tanh", dtype=dtype)


def norm_and_dropout(units, rank, dtype):
    # The variance of so few samples can be nearly zero. The derivative of the
    # normalization is then too large for a comparison of float32 gradients.
    return keras.Sequential(
        [
            layers.BatchNormalization(momentum=0.8, epsilon=0.1, dtype=dtype),
            conv(units, rank, dtype),
            layers.Dropout(0.3, dtype=dtype),
        ]
    )


def layer_norm(units, rank, dtype):
    norm = layers.LayerNormalization(epsilon=0.1, dtype=dtype)
    return keras.Sequential([norm, layers.Dense(units, dtype=dtype)])


def subclassed(units, rank, dtype):
    return Subclassed(units, dtype=dtype)


def penalized(units, rank, dtype):
    return layers.Dense(
        units, "tanh", kernel_regularizer="l2", activity_regularizer="l2", dtype=dtype
    )


KINDS = {
    kind.__name__: kind
    for kind in (dense, conv, norm_and_dropout, layer_norm, subclassed, penalized)
}


class Blocks(layers.Layer):
    """A layer of a user that calls blocks one after the other."""

    def __init__(self, blocks, **kwargs):
        super().__init__(**kwargs)
        self.blocks = blocks

    @property
    def recompute(self):
        return [block.recompute for block in self.blocks]

    @recompute.setter
    def recompute(self, value):
        for block in self.blocks:
            block.recompute = value

    def build(self, input_shape):
        for block in self.blocks:
            block.build(input_shape)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x, training=training)
        return x

    def inverse(self, y):
        for block in reversed(self.blocks):
            y = block.inverse(y)
        return y


class Network(NamedTuple):
    """A random network, built with and without recomputation.

    Attributes:
        shape: tuple, the shape of the input. With `widths` it is the shape of both
            streams without the last axis.
        widths: the widths of the two streams if the input is a pair.
        axis: int, the axis on which a single input is split.
        kinds: the kinds of the branches, two for each block.
        sharing: "none", "f is g", or "blocks": the last block has the branches of the
            first one.
        frozen: for each branch, whether it is frozen.
        structure: the structure of the blocks.
        dtype: the dtype of the streams and of the branches.
    """

    shape: tuple
    widths: tuple | None
    axis: int
    kinds: list
    sharing: str
    frozen: list
    structure: str
    dtype: str
    seed: int

    def make(self):
        blocks = [
            RevBlock(f, g, axis=self.axis, dtype=self.dtype)
            for f, g in self.make_branches()
        ]
        half = len(blocks) // 2
        match self.structure:
            case "blocks":
                return Blocks(blocks, dtype=self.dtype)
            case "one ordinary block":
                blocks[half].recompute = False
            case "nested":
                inner = RevSequence(blocks[half:])
                blocks = [*blocks[:half], inner]
            case "sequences":
                parts = [blocks[:half], blocks[half:]]
                return Blocks([RevSequence(p) for p in parts if p], dtype=self.dtype)
        return RevSequence(blocks)

    def make_branches(self):
        units = self.widths or [self.stream_shape()[-1]] * 2
        pairs = []
        for i in range(0, len(self.kinds), 2):
            pair = []
            for j in range(2):
                make = KINDS[self.kinds[i + j]]
                branch = make(units[j], len(self.shape), self.dtype)
                branch.trainable = not self.frozen[i + j]
                pair.append(branch)
            if self.sharing == "f is g" and units[0] == units[1]:
                pair[1] = pair[0]
            pairs.append(pair)
        if self.sharing == "blocks":
            pairs[-1] = pairs[0]
        return pairs

    def stream_shape(self):
        shape = list(self.shape)
        shape[self.axis] //= 2
        return shape

    def input(self):
        if self.widths is None:
            return images(*self.shape, dtype=self.dtype, seed=self.seed)
        return tuple(
            images(*self.shape[:-1], width, dtype=self.dtype, seed=self.seed + i)
            for i, width in enumerate(self.widths)
        )


@st.composite
def networks(draw):
    rank = draw(st.integers(2, 5))
    shape = [
        draw(st.integers(2, 4)),
        *(draw(st.integers(1, 3)) for _ in range(1, rank)),
    ]
    axis, widths = draw(st.integers(1, rank - 1)), None
    if draw(st.integers(0, 3)) == 0:
        widths = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    else:
        shape[axis] *= 2
    if draw(st.booleans()):
        axis -= rank
    depth = draw(st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3, 4]))
    branches = dict(min_size=2 * depth, max_size=2 * depth)
    return Network(
        tuple(shape),
        widths,
        axis,
        draw(st.lists(st.sampled_from(sorted(KINDS)), **branches)),
        draw(st.sampled_from(["none", "none", "f is g", "blocks"])),
        draw(st.lists(st.sampled_from([False, False, False, True]), **branches)),
        draw(
            st.sampled_from(
                ["blocks", "sequence", "sequences", "one ordinary block", "nested"]
            )
        ),
        draw(st.sampled_from(["float32", "float64"])),
        draw(st.integers(0, 99)),
    )


def outputs_losses_and_gradients(layer, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nest.flatten(layer(x, training=True))
        # The loss is neither linear nor symmetric. Each output has another gradient.
        loss = sum(tf.reduce_sum(tf.sin(1.5 * h) * tf.cos(h[::-1])) for h in y)
        loss += sum(layer.losses)
        # Keras does not list the losses of sublayers in the order of their creation.
        losses = tf.sort(tf.stack([loss, *layer.losses]))
    weights = [v.value for v in layer.trainable_variables]
    return [*y, losses, *tape.gradient(loss, [*tf.nest.flatten(x), *weights])]


def check(network, mode):
    x = network.input()
    shapes = [(None, *stream.shape[1:]) for stream in tf.nest.flatten(x)]
    pair = twins(network.make, shapes[0] if network.widths is None else tuple(shapes))
    tolerances = {"float32": (1e-4, 1e-5), "float64": (1e-9, 1e-9)}[network.dtype]

    results = []
    for layer in pair:
        run = (lambda f: f) if mode == "eager" else mode
        result = run(outputs_losses_and_gradients)(layer, x)
        results.append([*result, *(v.value for v in layer.variables)])
    assert_close(*results, *tolerances)
    for v, w in zip(pair[0].variables, pair[1].variables, strict=True):
        if not v.dtype.startswith("float"):
            np.testing.assert_array_equal(v.numpy(), w.numpy())

    y = pair[0](x, training=False)
    back = pair[0].inverse(y)
    assert type(back) is type(x)
    assert_close(tf.nest.flatten(back), tf.nest.flatten(x), *tolerances)


@pytest.mark.thorough
@settings(max_examples=285, **SETTINGS)
@given(networks())
def test_random_network_equals_its_twin_and_is_inverted_in_eager_mode(network):
    check(network, "eager")


@pytest.mark.thorough
@settings(max_examples=15, **SETTINGS)
@given(networks())
def test_random_network_equals_its_twin_and_is_inverted_in_graph_mode(network):
    check(network, tf.function(autograph=False))


@pytest.mark.parametrize("recompute", [True, False])
def test_losses_can_be_read_after_the_gradient(recompute):
    # The shared branch adds one loss in each block, with recomputation and without.
    shared = penalized(4, 2, "float64")
    blocks = [
        RevBlock(shared, dense(4, 2, "float64"), dtype="float64", recompute=r)
        for r in (recompute, False)
    ]
    layer = Blocks(blocks, dtype="float64")
    x = images(5, 8, dtype="float64")
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
        before = layer.losses
    tape.gradient(y, layer.blocks[0].f.kernel.value)
    assert len(before) == 3  # The third is that of the weights.
    assert len(layer.losses) == 3
