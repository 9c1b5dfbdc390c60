"""Space to depth for one, two and three spatial dimensions, channels last."""

import tensorflow as tf


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
