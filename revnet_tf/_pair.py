"""One tensor or two: the pair of streams in the inputs of a layer."""

from typing import NamedTuple

import tensorflow as tf

# One tensor or a pair of them, and their shapes.
Tensors = tf.Tensor | tuple[tf.Tensor, tf.Tensor]
Shape = tuple[int | None, ...]
Shapes = Shape | tuple[Shape, Shape]


class Pair(NamedTuple):
    """Splits a list of tensors into streams, and joins streams to a list of tensors.

    Attributes:
        axis: int, the axis on which one tensor is split evenly. `None`: the tensors
            are the streams.
        leading: tuple of `_coupling.Rearrangement`, applied to the one tensor before it
            is split.
    """

    axis: int | None = None
    leading: tuple = ()

    def split(self, tensors):
        for block in self.leading:
            tensors = block.there(tensors)
        return list(tensors if self.axis is None else tf.split(*tensors, 2, self.axis))

    def join(self, streams):
        """Undoes `split`. It maps gradients for streams to gradients for tensors."""
        if self.axis is not None:
            tensors = [tf.concat(streams, self.axis)]
            for block in reversed(self.leading):
                tensors = block.back(tensors)
            return tensors
        # New tensors, because a block also uses its first stream to compute the second.
        return [tf.identity(stream) for stream in streams]

    def split_mask(self, mask):
        """Returns the mask of each stream, or `None` for a stream without a mask."""
        if mask is None:
            return None, None
        if isinstance(mask, (list, tuple)):
            return tuple(mask)
        if self.axis is not None and self.axis < len(mask.shape):
            return tuple(tf.split(mask, 2, self.axis))
        return mask, mask


class Pairs(NamedTuple):
    """Splits several tensors into streams. Each `Pair` splits one tensor."""

    pairs: tuple
    leading = ()

    def split(self, tensors):
        split = zip(self.pairs, tensors, strict=True)
        return [stream for pair, tensor in split for stream in pair.split([tensor])]

    def join(self, streams):
        return [
            tensor
            for i, pair in enumerate(self.pairs)
            for tensor in pair.join(streams[2 * i : 2 * i + 2])
        ]


def listed(name, shapes):
    """Returns a list of one shape, or of two.

    Args:
        name: str, the name of the layer, for messages.
        shapes: tuple, the shape of one tensor, or a pair of shapes.

    Raises:
        ValueError: `shapes` are those of more tensors, or of none.
    """
    if isinstance(shapes, tf.TensorShape):
        shapes = tuple(shapes.as_list())
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise ValueError(f"{name} takes one tensor or a pair (x1, x2); got {shapes!r}.")
    if not any(isinstance(shape, (list, tuple)) for shape in shapes):
        return [tuple(shapes)]
    if len(shapes) != 2 or not all(
        isinstance(shape, (list, tuple))
        and not any(isinstance(size, (list, tuple)) for size in shape)
        for shape in shapes
    ):
        raise ValueError(
            f"{name} takes one tensor or a pair (x1, x2); got inputs of the shapes "
            f"{shapes!r}."
        )
    return [tuple(shape) for shape in shapes]


def stream_shapes(name, shapes, axis):
    """Returns the shapes of both streams.

    Args:
        name, shapes: the arguments of `listed`.
        axis: int, the axis on which one tensor is split.

    Raises:
        ValueError: the shapes give no two streams.
    """
    shapes = listed(name, shapes)
    if len(shapes) == 2:
        return tuple(shapes)
    (shape,) = shapes
    rank = len(shape)
    if not -rank <= axis < rank or axis % rank == 0:
        raise ValueError(
            f"Expected an axis from 1 to {rank - 1}, or a negative one, for an input "
            f"of shape {shape}; got axis={axis}. Axis 0 is the batch, which cannot be "
            "split."
        )
    size = shape[axis]
    if not size or size % 2:
        entries = "an unknown number of" if size is None else size
        raise ValueError(
            "Expected an input that can be split into two equal streams; the shape "
            f"{shape} has {entries} entries on axis={axis}. Use an even number, or "
            "call the layer on a pair (x1, x2)."
        )
    half = list(shape)
    half[axis] = size // 2
    return tuple(half), tuple(half)


def joined_shape(shape1, shape2, input_shape, axis):
    """Returns the shape of the output, one or a pair as `input_shape` is."""
    if isinstance(input_shape[0], (list, tuple)):
        return type(input_shape)([shape1, shape2])
    shape = list(shape1)
    shape[axis] += shape2[axis]
    return tuple(shape)
