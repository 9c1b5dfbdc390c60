"""The paper's residual functions, shortcuts, and what of its networks is irreversible.

All convolutions are without bias and "same"-padded; batch normalization has the
constants of the authors' code (epsilon 1e-3, momentum 0.99).

Reference: Gomez et al., 2017, section 3 and appendix, https://arxiv.org/abs/1707.04585
"""

import math
from typing import NamedTuple

import keras
import tensorflow as tf

from revnet_tf.normalization import BatchNormalization
from revnet_tf.steps import Checkpoint, Transition, add
from revnet_tf.streams import TwoStreamLayer


def batch_norm(**kwargs):
    """Returns a `BatchNormalization` with the constants of the authors' code."""
    return BatchNormalization(momentum=0.99, epsilon=1e-3, **kwargs)


class Parts(NamedTuple):
    """Makes the layers that one network is put together from.

    Attributes:
        bottleneck: branches of 1x1, 3x3 and 1x1 convolutions, and shortcuts that are
            1x1 convolutions; else branches of two 3x3 convolutions, and shortcuts
            without weights.
        kernel_regularizer: of all convolutions.
    """

    bottleneck: bool
    kernel_regularizer: keras.Regularizer | None = None

    def conv(self, filters, kernel_size, strides=1, **kwargs):
        """Returns a `Conv2D` without bias, initialized as in the authors' code."""
        stddev = math.sqrt(2 / (kernel_size * kernel_size * filters))
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding="same",
            data_format="channels_last",
            use_bias=False,
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=stddev),
            kernel_regularizer=self.kernel_regularizer,
            **kwargs,
        )

    def branch(self, filters, strides=1, preactivation=True):
        """Returns BN-ReLU-conv, two or three times, the first convolution strided.

        Args:
            filters: channels of the output; the inner width of a bottleneck is a
                quarter of it.
            strides: of the first convolution.
            preactivation: `False` leaves out the first BN-ReLU, as in the very first
                block of the paper's networks.
        """
        inner = filters // 4
        convs = [(filters, 3), (filters, 3)]
        if self.bottleneck:
            convs = [(inner, 1), (inner, 3), (filters, 1)]
        layers = []
        for i, (width, kernel_size) in enumerate(convs):
            if preactivation or i > 0:
                layers += [batch_norm(), keras.layers.ReLU()]
            layers.append(self.conv(width, kernel_size, strides if i == 0 else 1))
        return keras.Sequential(layers)

    def shortcut(self, filters, strides):
        """Returns what brings the input of a branch to the shape of its output."""
        if self.bottleneck:
            return self.conv(filters, 1, strides)
        return PoolingShortcut(filters, strides)


@keras.saving.register_keras_serializable("revnet_tf")
class PoolingShortcut(keras.layers.Layer):
    """Shortcut without weights: average pooling, and zeros for the channels to come.

    Args:
        filters: channels of the output, at least those of the input; zeros are added
            before and after, in equal numbers.
        strides: size and stride of the pooling window, "valid".

    Input shape:
        `(batch, height, width, channels)`.
    """

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides

    def build(self, input_shape):
        if self.filters < input_shape[-1]:
            raise ValueError(
                f"filters={self.filters} is less than the {input_shape[-1]} channels "
                "of the input; a pooling shortcut can only add channels."
            )

    def call(self, inputs):
        x = inputs
        if self.strides > 1:
            x = tf.nn.avg_pool2d(x, self.strides, self.strides, "VALID")
        extra = self.filters - x.shape[-1]
        if extra:
            x = tf.pad(x, [[0, 0]] * 3 + [[extra // 2, extra - extra // 2]])
        return x

    def compute_output_shape(self, input_shape):
        batch_size, *sizes, _ = input_shape
        sizes = (size and size // self.strides for size in sizes)
        return batch_size, *sizes, self.filters

    def get_config(self):
        config = {"filters": self.filters, "strides": self.strides}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("revnet_tf")
class DownsamplingBlock(TwoStreamLayer):
    """First block of a stage: `y1 = s1(x1) + f(x2)`, `y2 = s2(x2) + g(y1)`.

    It changes size or width and so cannot be reversed. In training it keeps its input,
    which the stage before has to keep anyway, and computes its branches anew.

    Args:
        f, g: branches; `f` is the strided one.
        shortcut1, shortcut2: layers that bring `x1` and `x2` to the shape of the
            branches' outputs.
        axis, recompute, **kwargs: as for `RevBlock`.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    LAYERS = ("f", "g", "shortcut1", "shortcut2")
    keeps_inputs = True

    def __init__(self, f, g, shortcut1, shortcut2, **kwargs):
        super().__init__(**kwargs)
        self.f = f
        self.g = g
        self.shortcut1 = shortcut1
        self.shortcut2 = shortcut2

    def build_streams(self, shape1, shape2):
        f = self.shape_after(self.f, shape2)
        g = self.shape_after(self.g, f)
        s1 = self.shape_after(self.shortcut1, shape1)
        s2 = self.shape_after(self.shortcut2, shape2)
        if f != s1 or g != s2:
            raise ValueError(
                f"{self.name}: the branches map to {f} and {g}, their shortcuts to "
                f"{s1} and {s2}; each pair must agree. (A pooling shortcut needs a "
                "height and width that its strides divide.)"
            )

    def forward(self, x1, x2, arguments):
        # (The identities: as in `RevBlock`.)
        s1 = arguments.call(self.shortcut1, 0, x1)
        y1 = add(s1, arguments.call(self.f, 1, tf.identity(x2)))
        s2 = arguments.call(self.shortcut2, 1, x2)
        return y1, add(s2, arguments.call(self.g, 0, tf.identity(y1)))

    def step(self, variables, arguments):
        return Transition(
            f=self.branch(self.f, 1, arguments, variables),
            g=self.branch(self.g, 0, arguments, variables),
            shortcut1=self.branch(self.shortcut1, 0, arguments, variables),
            shortcut2=self.branch(self.shortcut2, 1, arguments, variables),
        )

    def compute_output_shape(self, input_shape):
        shape1, shape2 = self.stream_shapes(input_shape)
        shape1 = self.shape_after(self.shortcut1, shape1)
        shape2 = self.shape_after(self.shortcut2, shape2)
        return self.joined_shape(shape1, shape2, input_shape)


@keras.saving.register_keras_serializable("revnet_tf")
class Stem(TwoStreamLayer):
    """What comes before the first stage: makes two streams of an image.

    In training it keeps the image, and computes everything else anew.

    Args:
        layer: maps the image to both streams, joined on `axis`.
        axis, recompute, **kwargs: as for `RevBlock`.
    """

    LAYERS = ("layer",)
    keeps_inputs = True

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def build(self, input_shape):
        self.stream_shapes(self.shape_after(self.layer, input_shape))

    def _streams_of(self, inputs, axis):
        return inputs, tf.zeros([0], inputs.dtype), None

    def forward(self, x1, x2, arguments):
        y = self.layer(x1, training=arguments.training, **arguments.of(self.layer, 0))
        return tf.split(tf.cast(y, x1.dtype), 2, self.axis)

    def step(self, variables, arguments):
        def call(x1, x2, **extra):
            return self.forward(x1, x2, arguments._replace(extra=extra))

        return Checkpoint(variables.branch(self, [call], arguments.extra))

    def compute_output_shape(self, input_shape):
        return self.shape_after(self.layer, input_shape)
