"""A reversible U-Net for images and volumes.

Each level is a run of reversible blocks in the encoder, and one in the decoder. The
blocks have one normalization, activation and convolution in a branch.

Reference: Brügger, Baumgartner, Konukoglu, 2019, https://arxiv.org/abs/1906.06148
"""

import os
from collections.abc import Callable, Sequence

import keras

from revnet_tf._layer import promise_alike
from revnet_tf.layers import RevBlock, RevSequence
from revnet_tf.models._ends import check_arguments, finished, model_input
from revnet_tf.models._levels import (
    CutToSize,
    LinearUpsampling,
    PaddingToMultiple,
    Projection,
    Readout,
    SkipConnection,
)
from revnet_tf.normalization import BatchNormalization

__all__ = ["RevUNet"]

# The groups of a group normalization, as in the paper.
GROUPS = 30
NORMS = ("group", "instance", "batch")


def RevUNet(
    channels: Sequence[int] = (60, 120, 240, 360, 480),
    encoder_blocks: int | Sequence[int] = 1,
    decoder_blocks: int | Sequence[int] = 1,
    *,
    input_shape: tuple,
    classes: int,
    norm: str | Callable[[], keras.layers.Layer] = "group",
    recompute: bool = True,
    fraction_bits: int | None = None,
    weights: str | os.PathLike | None = None,
    input_tensor: keras.KerasTensor | None = None,
    classifier_activation: str | None = "softmax",
    kernel_regularizer: keras.Regularizer | None = None,
    name: str = "revunet",
) -> keras.Model:
    """Returns a reversible U-Net as a functional `keras.Model`.

    The network has one output for each pixel or voxel of its input. The layers
    `encoder1`, `encoder2`, ... return the outputs of the encoder, `decoder1`,
    `decoder2`, ... those of the decoder. Level 1 has the full size. Each further level
    has half of it.

    In a graph and under XLA the network stores the outputs of the decoder for the
    backward pass. It reconstructs those of the encoder.

    Args:
        channels: even ints, the channels of each level. Both streams are counted.
        encoder_blocks, decoder_blocks: int, the number of reversible blocks of each
            level, or ints, one for each level. Default to 1.
        input_shape: tuple `(*sizes, channels)` with one, two or three sizes, such as
            `(depth, height, width, channels)`. The sizes may be `None`. The network
            pads sizes that the levels do not divide, and cuts its output.
        classes: int, the number of classes.
        norm: str, the normalization in the branches, or a function without arguments
            that returns a layer. `"group"`: 30 groups, or the largest divisor of a
            stream's channels below. `"instance"`: one group for each channel.
            `"batch"`: `revnet_tf.normalization.BatchNormalization`. Defaults to
            `"group"`.
        recompute: bool; `False`: use ordinary backpropagation (same values, more
            memory). Defaults to `True`.
        fraction_bits: int or `None`, the fraction bits of the streams; see `RevBlock`.
        weights: path of a `.weights.h5` file, or `None` for random weights.
        input_tensor: `keras.KerasTensor`, the input of the model, or `None`.
        classifier_activation: activation of the output: `"softmax"` for classes that
            exclude each other, `"sigmoid"` for classes that overlap, as in the paper,
            or `None` for logits. Defaults to `"softmax"`.
        kernel_regularizer: regularizer of all convolutions.
        name: str, the name of the model.

    Returns:
        A `keras.Model` from floats `(batch, *sizes, channels)` to float32
        `(batch, *sizes, classes)`.

    Raises:
        ValueError: an argument has a value that the function cannot use.

    Example:

    >>> model = revnet_tf.models.RevUNet(input_shape=(128, 128, 128, 4), classes=3)

    Reference:
        Brügger et al., 2019, https://arxiv.org/abs/1906.06148
    """
    channels = tuple(channels)
    encoder_blocks = _per_level(encoder_blocks, channels, "encoder_blocks")
    decoder_blocks = _per_level(decoder_blocks, channels, "decoder_blocks")
    check_arguments(weights, None)
    inputs, image = model_input(input_tensor, input_shape)
    _check(channels, image.shape[1:], classes, norm)
    levels = _Levels(
        len(image.shape) - 2, norm, recompute, fraction_bits, kernel_regularizer
    )
    divisor = 2 ** (len(channels) - 1)
    divides = all(size and size % divisor == 0 for size in image.shape[1:-1])
    x = image if divides else PaddingToMultiple(divisor, name="padding")(image)
    x = levels.conv(channels[0], 3, name="stem")(x)
    skips = []
    for i, filters in enumerate(channels):
        if i > 0:
            x = levels.down(channels[i - 1], filters, name=f"down{i + 1}")(x)
        x = levels.blocks(filters, encoder_blocks[i], name=f"encoder{i + 1}")(x)
        skips.append(x)
    for i, filters in reversed([*enumerate(channels)]):
        if i < len(channels) - 1:
            x = levels.up(channels[i + 1], filters, name=f"up{i + 1}")([skips[i], x])
        x = levels.blocks(filters, decoder_blocks[i], name=f"decoder{i + 1}")(x)
    x = levels.head(classes, classifier_activation, name="predictions")(x)
    if not divides:
        x = CutToSize(dtype=x.dtype, name="cut")([x, image])
    return finished(keras.Model(inputs, x, name=name), weights)


class _Levels:
    """Makes the layers of a U-Net."""

    def __init__(self, rank, norm, recompute, fraction_bits, kernel_regularizer):
        self._rank = rank
        self._norm = norm
        self._kwargs = {"recompute": recompute}
        self._run_kwargs = {**self._kwargs, "fraction_bits": fraction_bits}
        self._regularizer = {"kernel_regularizer": kernel_regularizer}

    def conv(self, filters, kernel_size, **kwargs):
        return self._of_rank("Conv")(
            filters,
            kernel_size,
            padding="same",
            data_format="channels_last",
            use_bias=False,
            kernel_initializer="he_normal",
            **self._regularizer,
            **kwargs,
        )

    def blocks(self, filters, num_blocks, name):
        half = filters // 2
        blocks = [
            RevBlock(self._branch(half), self._branch(half)) for _ in range(num_blocks)
        ]
        promise_alike(blocks)
        return RevSequence(blocks, name=name, **self._run_kwargs)

    def down(self, channels, filters, name):
        """Returns the step to the next level: max-pooling and a projection."""
        pool = self._of_rank("MaxPooling")(2, data_format="channels_last")
        project = Projection(filters, 2, **self._regularizer)
        streams = self._streams(channels)
        layer = keras.Model(streams, project([pool(x) for x in streams]))
        return Readout(layer, name=name, **self._kwargs)

    def up(self, channels, filters, name):
        """Returns the step from the next level, which ends in the skip connection."""
        project = Projection(filters, 2, **self._regularizer)
        upsample = LinearUpsampling()
        streams = self._streams(channels)
        layer = keras.Model(streams, [upsample(x) for x in project(streams)])
        return SkipConnection(layer, name=name, **self._run_kwargs)

    def head(self, classes, activation, name):
        layer = Projection(
            classes,
            activation=activation,
            # Probabilities need full precision, also under a mixed policy.
            dtype=keras.config.dtype_policy().variable_dtype,
            **self._regularizer,
        )
        return Readout(layer, name=name, **self._kwargs)

    def _streams(self, channels):
        return [keras.Input((*[None] * self._rank, channels // 2)) for _ in range(2)]

    def _branch(self, filters):
        return keras.Sequential(
            [
                self._normalization(filters),
                keras.layers.LeakyReLU(0.01),
                self.conv(filters, 3),
            ]
        )

    def _normalization(self, filters):
        if callable(self._norm):
            return self._norm()
        if self._norm == "batch":
            return BatchNormalization()
        groups = next(n for n in range(GROUPS, 0, -1) if filters % n == 0)
        return keras.layers.GroupNormalization(
            -1 if self._norm == "instance" else groups, epsilon=1e-5
        )

    def _of_rank(self, name):
        return getattr(keras.layers, f"{name}{self._rank}D")


def _per_level(num_blocks, channels, argument):
    """Returns the number of blocks of each level."""
    if not channels:
        raise ValueError(
            "Expected at least one level; got channels=(). Give one even number for "
            "each level."
        )
    if isinstance(num_blocks, int):
        num_blocks = (num_blocks,) * len(channels)
    num_blocks = tuple(num_blocks)
    if len(num_blocks) != len(channels) or min(num_blocks, default=0) < 1:
        raise ValueError(
            f"Expected one or more blocks for each of the {len(channels)} levels of "
            f"channels={channels}; got {argument}={num_blocks}. Give one positive "
            "number for all levels, or one for each."
        )
    return num_blocks


def _check(channels, input_shape, classes, norm):
    if odd := [c for c in channels if c % 2 or c < 2]:
        raise ValueError(
            f"Expected even channels; got channels={channels}, of which {odd} cannot "
            "be split into two streams. Use even numbers."
        )
    if not 2 <= len(input_shape) <= 4 or input_shape[-1] is None:
        raise ValueError(
            "Expected an input_shape of one, two or three sizes and the channels; got "
            f"{tuple(input_shape)}. Use (depth, height, width, channels) for volumes "
            "and (height, width, channels) for images. Only sizes may be None."
        )
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(
            f"Expected a positive number of classes; got classes={classes!r}. Count "
            "the background if the classes exclude each other."
        )
    if not callable(norm) and norm not in NORMS:
        raise ValueError(
            f"norm must be one of {NORMS} or a function that returns a layer; got "
            f"norm={norm!r}."
        )
