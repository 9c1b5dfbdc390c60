"""Streams of fixed-point numbers, whose sums can be undone bit for bit.

A multiple of `2**-k` that is smaller than `2**(24 - k)` is a float32 number, and so are
the sums and differences of such numbers, as long as they stay in that range: nothing is
rounded, and `(x + y) - y` is `x`. (Float64 has 53 digits where float32 has 24.)
"""

import numpy as np
import tensorflow as tf

from revnet_tf import _xla


def validate(fraction_bits, dtype):
    """Raises `ValueError` unless numbers of `dtype` can have these fraction bits."""
    if dtype not in ("float32", "float64"):
        raise ValueError(
            f"fraction_bits={fraction_bits!r} needs streams in float32 or float64, and "
            f"these are in {dtype}; change the variable dtype of the block's policy."
        )
    most = np.finfo(dtype).nmant - 1
    if type(fraction_bits) is not int or not 0 <= fraction_bits <= most:
        raise ValueError(
            f"fraction_bits={fraction_bits!r} must be an integer from 0 to {most}, or "
            "None."
        )


def limit(dtype, fraction_bits):
    """Returns the number below which all numbers of the format have to stay."""
    return 2.0 ** (np.finfo(dtype).nmant + 1 - fraction_bits)


def quantize(x, fraction_bits, elementary=False):
    """Returns the nearest fixed-point numbers, halves to the even one.

    The gradient is that of `x`. Numbers end at twice the range, NaN among them: no sum
    with a number in range is in range then.

    Args:
        x: floating-point numbers.
        fraction_bits: of the result.
        elementary: get the same bits by operations that other runtimes have, too.
    """
    if elementary:
        multiple = tf.round(x * 2.0**fraction_bits) * 2.0**-fraction_bits
        # The difference of a number and its nearest multiple is exact.
        return x - tf.stop_gradient(x - multiple)
    end = 2 * limit(x.dtype.as_numpy_dtype, fraction_bits)
    return tf.raw_ops.QuantizeAndDequantizeV2(
        input=x,
        input_min=tf.constant(-end, x.dtype),
        input_max=tf.constant(end, x.dtype),
        num_bits=1 + fraction_bits + round(np.log2(end)),
        range_given=True,
        round_mode="HALF_TO_EVEN",
    )


def convert(x, fraction_bits, elementary=False):
    """Returns floating-point numbers as fixed-point ones, with their gradient."""
    return check(quantize(x, fraction_bits, elementary), fraction_bits, elementary)


def check(x, fraction_bits, elementary=False):
    """Returns `x`.

    Where assertions can be left out (under XLA, and by the runtimes that `elementary`
    is for) it is NaN if a number is out of range.

    Raises:
        tf.errors.InvalidArgumentError: a number is out of range.
    """
    bound = limit(x.dtype.as_numpy_dtype, fraction_bits)
    largest = tf.maximum(tf.reduce_max(x), -tf.reduce_min(x))
    # (Of no numbers the largest is minus infinity. NaN is not below the bound.)
    in_range = largest < bound
    tf.debugging.Assert(
        in_range,
        [
            f"A stream has left the range of its fixed-point numbers, +-{bound:g} with "
            f"fraction_bits={fraction_bits}, or is no longer finite. Use fewer "
            "fraction bits, or normalize the outputs of the branches. Its largest "
            "number:",
            largest,
        ],
    )
    if elementary or _xla.is_traced():
        x = tf.where(in_range, x, tf.constant(np.nan, x.dtype))
    return x
