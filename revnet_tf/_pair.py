"""One tensor or two: how the inputs of a layer are a pair of streams."""

from typing import NamedTuple

import tensorflow as tf

# One tensor or a pair of them, and their shapes.
Tensors = tf.Tensor | tuple[tf.Tensor, tf.Tensor]
Shape = tuple[int | None, ...]
Shapes = Shape | tuple[Shape, Shape]


class Pair(NamedTuple):
    """Splits a list of tensors into streams, and joins streams to such a list.

    Attributes:
        axis: int, the axis of one tensor that is split evenly. `None`: the tensors are
            the streams.
    """

    axis: int | None = None

    def split(self, tensors):
        return list(tensors if self.axis is None else tf.split(*tensors, 2, self.axis))

    def join(self, streams):
        if self.axis is not None:
            return [tf.concat(streams, self.axis)]
        # New tensors: a block uses its first stream, too, to compute the second.
        return [tf.identity(stream) for stream in streams]

    def split_mask(self, mask):
        """Returns the mask of each stream, `None` for a stream without."""
        if mask is None:
            return None, None
        if self.axis is None:
            return tuple(mask)
        if self.axis < len(mask.shape):
            return tuple(tf.split(mask, 2, self.axis))
        return mask, mask


def pair_of(inputs, axis):
    """Returns the `Pair` of one tensor, split on `axis`, or of a pair of tensors."""
    if isinstance(inputs, (list, tuple)):
        return Pair()
    return Pair(axis % len(inputs.shape))


def stream_shapes(name, shapes, axis):
    """Returns the shapes of both streams.

    Args:
        name: str, the name of the layer, for messages.
        shapes: the shape of one tensor, or a pair of shapes.
        axis: int, the axis on which one tensor is split.

    Raises:
        ValueError: there are no two streams.
    """
    if isinstance(shapes, tf.TensorShape):
        shapes = tuple(shapes.as_list())
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise ValueError(f"{name} takes one tensor or a pair (x1, x2); got {shapes!r}.")
    if any(isinstance(shape, (list, tuple)) for shape in shapes):
        if len(shapes) != 2 or not all(
            isinstance(shape, (list, tuple))
            and not any(isinstance(size, (list, tuple)) for size in shape)
            for shape in shapes
        ):
            raise ValueError(
                f"{name} takes one tensor or a pair (x1, x2); got inputs of the shapes "
                f"{shapes!r}."
            )
        return tuple(shapes[0]), tuple(shapes[1])
    rank = len(shapes)
    if not -rank <= axis < rank or axis % rank == 0:
        raise ValueError(
            f"axis={axis} is not an axis that an input of shape {tuple(shapes)} can be "
            f"split on; use one from 1 to {rank - 1}, or a negative one (axis 0 is the "
            "batch)."
        )
    size = shapes[axis]
    if not size or size % 2:
        entries = "an unknown number of" if size is None else size
        raise ValueError(
            f"An input of shape {tuple(shapes)} has {entries} entries on axis={axis}, "
            "which cannot be split into two equal streams; use an even number, or call "
            "the layer on a pair (x1, x2)."
        )
    shape = list(shapes)
    shape[axis] = size // 2
    return tuple(shape), tuple(shape)


def joined_shape(shape1, shape2, input_shape, axis):
    """Returns the shape of the output for an input of shape `input_shape`."""
    if isinstance(input_shape[0], (list, tuple)):
        return [shape1, shape2]
    shape = list(shape1)
    shape[axis] += shape2[axis]
    return tuple(shape)
