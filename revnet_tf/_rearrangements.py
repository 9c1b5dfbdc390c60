"""Reversible layers without weights, which move values and add zeros."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from revnet_tf import _coupling
from revnet_tf._functional import CallArguments, Variables
from revnet_tf._pair import Pair, Shape, Shapes, Tensors, listed
from revnet_tf._reversible import RearrangingLayer


class Rearrangement(RearrangingLayer):
    """A reversible layer without weights, on the last axis.

    Subclasses define `shapes_after`, `there` and `back`: functions of one tensor or of
    two streams, as in a `_coupling.Rearrangement`.
    """

    takes_whole = True
    adds_zeros = False

    def __init__(self, **kwargs):
        super().__init__(axis=-1, **kwargs)
        self.supports_masking = True

    def build(self, input_shape: Shapes) -> None:
        shapes = listed(self.name, input_shape)
        if any(len(shape) < 2 or not shape[-1] for shape in shapes):
            raise ValueError(
                f"Expected an input of {self.name} of shape (batch, ..., channels), "
                f"with a known number of channels; got {input_shape}. Give the size of "
                "the last axis."
            )
        self._widths = [shape[-1] for shape in shapes]
        self._output_shapes = self.shapes_after(shapes)

    def widths(self, num_streams: int) -> list[int]:
        """Returns the widths of the input as one tensor, or as two streams."""
        if len(self._widths) == num_streams:
            return self._widths
        return [sum(self._widths) // num_streams] * num_streams

    def pairs(self, tensors: Tensors) -> tuple[Pair, Pair]:
        before, after = sum(self._widths), sum(s[-1] for s in self._output_shapes)
        if before % 2 or after % 2:
            return Pair(), Pair()
        return super().pairs(tensors)

    def block(
        self, arguments: CallArguments | None = None, owner: Variables | None = None
    ) -> _coupling.Rearrangement:
        return _coupling.Rearrangement(self._checked_there, self.back, self.adds_zeros)

    def _checked_there(self, tensors):
        shapes = [tuple(x.shape) for x in tensors]
        widths = self.widths(len(shapes))
        if [shape[-1] for shape in shapes] != widths:
            raise ValueError(
                f"Expected {' and '.join(map(str, widths))} channels, for which "
                f"{self.name} was built; got inputs of the shapes {shapes}. Make a new "
                "layer for another width."
            )
        self.shapes_after(shapes)
        return self.there(tensors)

    def get_config(self) -> dict:
        config = super().get_config()
        del config["axis"]  # The constructor has none.
        return config


@keras.saving.register_keras_serializable("revnet_tf")
class SpaceToDepth(Rearrangement):
    """Moves the positions in each block of space to the channels, without loss.

    The layer is reversible and has no weights. It takes the place of a stride: it
    divides height and width by `block_size` and loses no value.

    The layer acts on each stream by itself:

    - A pair: on each of the two tensors.
    - One tensor: on both halves of the channels, the streams of a `RevBlock`. If the
      number of channels is odd, on the whole tensor.
    - In a `RevSequence` that is called on one tensor: before the first `RevBlock` on
      the whole tensor, later on each stream.

    After the first `RevBlock`, layers that are called one by one therefore equal a
    sequence. Before it, the order of the channels differs if their number is even.

    Args:
        block_size: int, the size of a block in each spatial dimension, at least 2.
            Defaults to `2`.
        **kwargs: the arguments `recompute` and `fraction_bits` of `RevBlock`, and those
            of `keras.layers.Layer`.

    Input shape:
        `(batch, *sizes, channels)` with one, two or three sizes, such as
        `(batch, height, width, channels)`, or a pair of such tensors. `block_size`
        must divide the sizes.

    Output shape:
        The sizes are divided by `block_size`. With `n` sizes there are
        `block_size**n` times as many channels. The channels of a stream have the order
        (position in the block, channel). In two dimensions the values for a stream are
        those of `tf.nn.space_to_depth`.

    Raises:
        ValueError: `block_size` does not divide a size that is known when the layer is
            built or called, or the input has a mask.
        tf.errors.InvalidArgumentError: `block_size` does not divide a size that is not
            known before.

    Reference:
        Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088
    """

    moves_positions = True

    def __init__(self, block_size: int = 2, **kwargs):
        super().__init__(**kwargs)
        if type(block_size) is not int or block_size < 2:
            raise ValueError(
                "block_size must be an integer of at least 2; got "
                f"block_size={block_size!r}."
            )
        self.block_size = block_size

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        return [self._shape_after(shape) for shape in shapes]

    def _shape_after(self, shape):
        batch_size, *sizes, channels = shape
        if not 1 <= len(sizes) <= 3:
            raise ValueError(
                "Expected an input of shape (batch, *sizes, channels) with one, two or "
                f"three sizes; {self.name} got the shape {shape}."
            )
        if any(size and size % self.block_size for size in sizes):
            raise ValueError(
                f"Expected sizes that block_size={self.block_size} divides; "
                f"{self.name} got the shape {shape}. Resize, crop or pad the input."
            )
        inner = (size and size // self.block_size for size in sizes)
        return batch_size, *inner, channels * self.block_size ** len(sizes)

    def there(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [space_to_depth(self._divisible(x), self.block_size) for x in tensors]

    def back(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [depth_to_space(x, self.block_size) for x in tensors]

    def _divisible(self, x):
        """Returns `x`, and raises an error if an open size is not divisible."""
        if None not in x.shape[1:-1]:
            return x
        sizes = tf.shape(x)[1:-1]
        fits = tf.reduce_all(sizes % self.block_size == 0)
        text = (
            f"Expected sizes that block_size={self.block_size} divides. Resize, crop "
            f"or pad the input of {self.name}. The sizes:"
        )
        with tf.control_dependencies([tf.debugging.Assert(fits, [text, sizes])]):
            return tf.identity(x)

    def get_config(self) -> dict:
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("revnet_tf")
class ChannelPadding(Rearrangement):
    """Adds zeros as the last channels. The inverse drops them.

    The layer is reversible and has no weights. It acts on one tensor, or on the join of
    a pair: it joins the streams, adds the channels, and splits the result into two
    equal streams.

    Args:
        channels: int, the channels of the output, both streams together.
        **kwargs: the arguments `recompute` and `fraction_bits` of `RevBlock`, and those
            of `keras.layers.Layer`.

    Input shape:
        `(batch, ..., channels)`, or a pair of such tensors.

    Output shape:
        The shape of the input with `channels` on the last axis. For a pair, each tensor
        has half of them.

    The backward pass of a `RevBlock` after the padding gets exact zeros: in a sequence
    in every mode, else in a graph. A sequence that is called on one tensor and begins
    with a padding also uses its own input in the backward pass.

    Raises:
        ValueError: the input has more than `channels` channels, or it is a pair and
            `channels` is odd.

    Reference:
        Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088
    """

    adds_zeros = True

    def __init__(self, channels: int, **kwargs):
        super().__init__(**kwargs)
        if type(channels) is not int or channels < 1:
            raise ValueError(
                f"channels must be an integer above 0; got channels={channels!r}."
            )
        self.channels = channels

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        width = sum(shape[-1] for shape in shapes)
        if width > self.channels:
            raise ValueError(
                f"Expected at most {self.channels} channels, because the padding of "
                f"{self.name} drops none; got {width}. Use channels={width} or more."
            )
        if self.channels % len(shapes):
            raise ValueError(
                f"Expected an even number of channels for two streams; {self.name} has "
                f"channels={self.channels}. Use {self.channels + 1}."
            )
        return [(*shape[:-1], self.channels // len(shapes)) for shape in shapes]

    def there(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        x = tf.concat(tensors, -1)
        extra = self.channels - x.shape[-1]
        x = tf.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[0, extra]])
        return tf.split(x, len(tensors), -1)

    def back(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        widths = self.widths(len(tensors))
        x = tf.concat(tensors, -1)[..., : sum(widths)]
        return tf.split(x, widths, -1)

    def get_config(self) -> dict:
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("revnet_tf")
class Split(Rearrangement):
    """Makes a `RevSequence` split one tensor here, before its first `RevBlock`.

    The layer changes no value and no shape.

    Args:
        **kwargs: arguments of `keras.layers.Layer`.
    """

    takes_whole = False

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        return list(self.stream_shapes(shapes if len(shapes) == 2 else shapes[0]))

    def there(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return list(tensors)

    def back(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return list(tensors)


def space_to_depth(x, block_size):
    """Moves the positions in each block of space to the channels.

    Args:
        x: tensor `(batch, *sizes, channels)`. `block_size` divides the sizes.
        block_size: int, the size of a block in each dimension.

    Returns:
        Tensor with the sizes divided by `block_size`. The new channels have the order
        (position in the block, channel).
    """
    batch, *sizes, channels = _sizes(x)
    n = len(sizes)
    if n == 2:  # one kernel, and one operation of other runtimes
        return tf.nn.space_to_depth(x, block_size)
    inner = [size // block_size for size in sizes]
    split = [part for size in inner for part in (size, block_size)]
    x = tf.reshape(x, [batch, *split, channels])
    order = [0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1]
    x = tf.transpose(x, order)
    return tf.reshape(x, [batch, *inner, channels * block_size**n])


def depth_to_space(x, block_size):
    """Returns the tensor that `space_to_depth` maps to `x`."""
    batch, *sizes, channels = _sizes(x)
    n = len(sizes)
    if n == 2:
        return tf.nn.depth_to_space(x, block_size)
    channels //= block_size**n
    x = tf.reshape(x, [batch, *sizes, *[block_size] * n, channels])
    order = [0, *(i for j in range(1, n + 1) for i in (j, j + n)), 2 * n + 1]
    x = tf.transpose(x, order)
    return tf.reshape(x, [batch, *(size * block_size for size in sizes), channels])


def _sizes(x):
    """Returns the sizes of all axes, as ints where they are known."""
    sizes = tf.shape(x)
    return [sizes[i] if size is None else size for i, size in enumerate(x.shape)]
