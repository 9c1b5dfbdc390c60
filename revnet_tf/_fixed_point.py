"""Streams in fixed point, whose sums can be undone bit for bit.

Float32 represents every multiple of `2**-k` below `2**(24 - k)` exactly. Sums and
differences of such values are also exact within that range: `(x + y) - y` equals `x`.
Float64 has 53 binary digits where float32 has 24.
"""

import numpy as np
import tensorflow as tf

from revnet_tf import _xla


def validate(fraction_bits, dtype):
    """Raises `ValueError` unless streams of `dtype` can have these fraction bits."""
    if dtype not in ("float32", "float64"):
        raise ValueError(
            "Expected streams in float32 or float64 for "
            f"fraction_bits={fraction_bits!r}; got {dtype}. Change the variable dtype "
            "of the block's policy."
        )
    most = np.finfo(dtype).nmant - 1
    if type(fraction_bits) is not int or not 0 <= fraction_bits <= most:
        raise ValueError(
            f"fraction_bits must be an integer from 0 to {most}, or None; got "
            f"fraction_bits={fraction_bits!r}."
        )


def limit(dtype, fraction_bits):
    """Returns the bound of the range. Values of a stream are below it."""
    return 2.0 ** (np.finfo(dtype).nmant + 1 - fraction_bits)


def quantize(x, fraction_bits, elementary=False):
    """Returns the nearest values in fixed point, and rounds a half to even.

    The gradient is that of `x`. Values, including NaN, are clipped to twice the range,
    so a sum with them is detected as out of range.

    Args:
        x: floating-point tensor.
        fraction_bits: int, the fraction bits of the result.
        elementary: bool; `True`: compute the same bits with operations that other
            runtimes also have. Defaults to `False`.
    """
    if elementary:
        multiple = tf.round(x * 2.0**fraction_bits) * 2.0**-fraction_bits
        # The difference of a value and its nearest multiple is exact.
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
    """Returns a floating-point tensor in fixed point, with its gradient."""
    return check(quantize(x, fraction_bits, elementary), fraction_bits, elementary)


def check(x, fraction_bits, elementary=False):
    """Returns `x`, and raises an error if a value is out of range.

    XLA and other runtimes drop assertions. There the result is NaN instead.

    Raises:
        tf.errors.InvalidArgumentError: a value is out of range.
    """
    bound = limit(x.dtype.as_numpy_dtype, fraction_bits)
    largest = tf.maximum(tf.reduce_max(x), -tf.reduce_min(x))
    # The maximum of an empty tensor is minus infinity. NaN is not below the bound.
    in_range = largest < bound
    tf.debugging.Assert(
        in_range,
        [
            f"Expected a stream within +-{bound:g}, the range of "
            f"fraction_bits={fraction_bits}. Use fewer fraction bits, or normalize the "
            "outputs of the branches. The largest absolute value:",
            largest,
        ],
    )
    if elementary or _xla.is_traced():
        x = tf.where(in_range, x, tf.constant(np.nan, x.dtype))
    return x
