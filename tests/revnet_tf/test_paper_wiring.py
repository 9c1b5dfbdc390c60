"""The networks follow the paper: they equal a reference in plain NumPy."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from revnet_tf import models


class Reference:
    """A network of the paper in inference, in NumPy and float64.

    The reference takes weights in the order of the network's layers. A different order
    gives different values:

    - the stem;
    - in each block F, G and the two shortcuts, or in a residual block the shortcut and
      the branch;
    - the last BN, and the dense layer.

    The layers of a branch follow its computation. The weights of a BN are scale,
    offset, mean and variance.
    """

    def __init__(self, weights, bottleneck):
        self.weights = iter(weights)
        self.bottleneck = bottleneck

    def conv(self, strides=1):
        kernel = next(self.weights)
        size = len(kernel)
        taps = list(itertools.product(range(size), range(size)))
        return lambda x: sum(
            window @ kernel[tap]
            for tap, window in zip(taps, windows(x, size, strides, 0.0), strict=True)
        )

    def norm_relu(self):
        scale, offset, mean, variance = itertools.islice(self.weights, 4)
        factor = scale / np.sqrt(variance + 1e-3)
        return lambda x: np.maximum((x - mean) * factor + offset, 0.0)

    def branch(self, strides=1, preactivation=True):
        steps = []
        for i in range(3 if self.bottleneck else 2):
            if preactivation or i > 0:
                steps.append(self.norm_relu())
            steps.append(self.conv(strides if i == 0 else 1))
        return chain(*steps)

    def shortcut(self, strides, old, new):
        """Returns a function from `old` to `new` channels."""
        if strides == 1 and old == new:
            return lambda x: x
        if self.bottleneck:
            return self.conv(strides)
        zeros = (new - old) // 2

        def pool_and_pad(x):
            batch, height, width, _ = x.shape
            shape = batch, height // strides, strides, width // strides, strides, old
            x = x.reshape(shape).mean(axis=(2, 4))
            return np.pad(x, [(0, 0)] * 3 + [(zeros, zeros)])

        return pool_and_pad

    def reversible_block(self, strides, old, new, preactivation):
        f, g = self.branch(strides, preactivation), self.branch()
        s1, s2 = (self.shortcut(strides, old // 2, new // 2) for _ in range(2))

        def block(x):
            x1, x2 = np.split(x, 2, axis=-1)
            y1 = s1(x1) + f(x2)
            y2 = s2(x2) + g(y1)
            return np.concatenate([y1, y2], axis=-1)

        return block

    def residual_block(self, strides, old, new, preactivation):
        shortcut = self.shortcut(strides, old, new)
        branch = self.branch(strides, preactivation)
        return lambda x: shortcut(x) + branch(x)

    def network(self, x, reversible, num_blocks, channels, imagenet):
        x = chain(self.conv(2 if imagenet else 1), self.norm_relu())(x)
        if imagenet:
            x = np.max(list(windows(x, 3, 2, -np.inf)), axis=0)
        make_block = self.reversible_block if reversible else self.residual_block
        old, *stages = channels
        for stage, new in enumerate(stages):
            if self.bottleneck:
                new *= 4
            for i in range(num_blocks[stage]):
                strides = 2 if stage > 0 and i == 0 else 1
                very_first = stage == i == 0
                x = make_block(strides, old, new, preactivation=not very_first)(x)
                old = new
        x = self.norm_relu()(x).mean(axis=(1, 2))
        kernel, bias = self.weights  # The network has no others.
        return softmax(x @ kernel + bias)


def chain(*steps):
    def run(x):
        for step in steps:
            x = step(x)
        return x

    return run


def windows(x, size, strides, fill):
    """Yields the pixels at each position of a window, with TensorFlow's "SAME" padding.

    There are `ceil(n / strides)` windows. If the padding is odd, the last side gets the
    odd pixel.
    """
    counts = [-(-n // strides) for n in x.shape[1:3]]
    padding = []
    for n, count in zip(x.shape[1:3], counts, strict=True):
        total = max((count - 1) * strides + size - n, 0)
        padding.append((total // 2, total - total // 2))
    x = np.pad(x, [(0, 0), *padding, (0, 0)], constant_values=fill)
    for i, j in itertools.product(range(size), range(size)):
        rows, columns = (
            slice(start, start + (count - 1) * strides + 1, strides)
            for start, count in zip((i, j), counts, strict=True)
        )
        yield x[:, rows, columns]


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


# Reversible, num_blocks, channels, bottleneck, stem, (height, width) of the images.
# Odd and even sizes have different padding. Pooling shortcuts need even sizes here.
NETWORKS = {
    "RevNet": (True, (2, 1, 2), (8, 8, 12, 20), False, "cifar", (8, 12)),
    "RevNet-bottleneck": (True, (2, 1, 2), (16, 16, 24, 32), True, "cifar", (9, 12)),
    "RevNet-imagenet": (True, (2, 2), (16, 16, 24), True, "imagenet", (37, 40)),
    "ResNet": (False, (2, 1, 2), (4, 4, 6, 10), False, "cifar", (8, 12)),
    "ResNet-bottleneck": (False, (2, 1, 2), (8, 8, 12, 16), True, "cifar", (9, 12)),
    "ResNet-imagenet": (False, (2, 2), (8, 8, 12), True, "imagenet", (37, 40)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    """A small float64 network with random weights, its row, and images."""
    keras.config.set_dtype_policy("float64")
    row = NETWORKS[request.param]
    reversible, num_blocks, channels, bottleneck, stem, size = row
    network = models.RevNet if reversible else models.ResNet
    model = network(
        num_blocks, channels, bottleneck, stem=stem, input_shape=(*size, 3), classes=5
    )
    rng = np.random.default_rng(0)
    for v in model.weights:
        if v.name == "kernel":
            value = rng.standard_normal(v.shape) / np.sqrt(np.prod(v.shape[:-1]))
        elif v.name == "moving_variance":
            value = rng.uniform(0.5, 1.5, v.shape)
        elif v.name == "gamma":
            # Both signs: with positive values only, pooling and BN would commute.
            value = rng.uniform(0.5, 1.5, v.shape) * rng.choice([-1, 1], v.shape)
        else:
            # Small values, so that few ReLUs are always off.
            value = 0.3 * rng.standard_normal(v.shape)
        v.assign(value)
    # Keras casts inputs to float32 under every policy.
    x = rng.standard_normal((2, *size, 3)).astype("float32")
    return model, row, x


def test_inference_is_that_of_the_paper(case):
    model, (reversible, num_blocks, channels, bottleneck, stem, _), x = case
    y = model(x, training=False)
    assert y.dtype == tf.float64
    reference = Reference([v.numpy() for v in model.weights], bottleneck)
    expected = reference.network(
        x.astype("float64"), reversible, num_blocks, channels, stem == "imagenet"
    )
    # In float64 rounding is about 1e-15. An epsilon of 1.001e-3 would give 1e-6.
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_each_weight_alone_changes_the_output(case):
    model, _, x = case
    forward = tf.function(lambda: model(x, training=False), autograph=False)
    original = forward().numpy()
    for v in model.weights:
        value = v.numpy()
        v.assign(value * 1.1)
        # Rounding alone is about 1e-16.
        assert np.abs(forward() - original).max() > 1e-6, v.path
        v.assign(value)
    np.testing.assert_array_equal(forward(), original)


@pytest.mark.parametrize("stem", models.residual.STEMS)
def test_batch_norm_in_training_by_hand(stem):
    model = models.RevNet((1,), (2, 2), stem=stem, input_shape=(1, 1, 1))
    conv, norm, *_ = model.get_layer("stem").layer.layers
    conv.kernel.assign(np.ones(conv.kernel.shape))
    # In an image of one pixel, the kernel's centre sees the pixel, and the rest zeros.
    x = np.reshape([1.0, 3.0], (2, 1, 1, 1))
    y = norm(conv(x), training=True)
    # Mean 2 and variance 1. The unbiased estimate for two samples would be 2.
    expected = np.array([[-1, -1], [1, 1]]) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(np.reshape(y, (2, 2)), expected, rtol=1e-6)
    np.testing.assert_allclose(norm.moving_mean, 0.99 * 0 + 0.01 * 2, rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, 0.99 * 1 + 0.01 * 1, rtol=1e-6)


@pytest.mark.parametrize("network", [models.RevNet, models.ResNet])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_every_batch_norm_forgets_a_hundredth_of_its_statistics(network, bottleneck):
    model = network((1, 2), (8, 8, 16), bottleneck)
    statistics = model.non_trainable_variables
    for v in statistics:
        v.assign(np.ones(v.shape))
    # Offsets are zero. Every hidden layer therefore sees zeros, with mean and variance
    # 0.
    model(np.zeros((2, 32, 32, 3)), training=True)
    for v in statistics:
        np.testing.assert_allclose(v, 0.99, rtol=1e-6, err_msg=v.path)
