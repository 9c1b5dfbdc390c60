"""The order of operations, where the arithmetic leaves it open."""

import math

import tensorflow as tf

from revnet_tf import _xla


def wait(done, tensors):
    """Returns `tensors`, which are there only when all of `done` (one or more) are.

    A graph's executor keeps to control dependencies. XLA drops them and keeps to data:
    there the tensors go through a loop that never turns, by a condition that XLA cannot
    know before `done`. It neither copies them nor is joined with what uses them, if
    everything from here on uses what is returned, and nothing `tensors`.
    """
    if tf.executing_eagerly():
        return list(tensors)
    if not _xla.is_traced():
        with tf.control_dependencies(done):
            return [tf.identity(t) for t in tensors]
    flat, begin, end = (tf.constant([i]) for i in (-1, 0, 1))
    first_numbers = [
        tf.cast(tf.strided_slice(tf.reshape(t, flat), begin, end), tf.float32)
        for t in done
    ]
    _, *tensors = tf.while_loop(
        lambda turns, *tensors: turns,
        lambda turns, *tensors: (tf.constant(False), *map(tf.zeros_like, tensors)),
        [tf.reduce_any(tf.concat(first_numbers, 0) > math.inf), *tensors],
    )
    return tensors
