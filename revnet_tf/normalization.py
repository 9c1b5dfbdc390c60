"""Normalization layers whose gradients need less memory than Keras's."""

import keras
import tensorflow as tf

from revnet_tf import _custom_gradient, _xla

__all__ = ["BatchNormalization", "GroupNormalization"]

# The dtypes that TensorFlow's fused operation takes.
_DTYPES = ("float16", "bfloat16", "float32")


@keras.saving.register_keras_serializable("revnet_tf")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer, with TensorFlow's fused operation for inputs of any rank.

    The values are those of `keras.layers.BatchNormalization`. The gradient needs less
    memory: three tensors of the size of the layer's input, two inputs and one output.
    The gradient of Keras's operations needs five such tensors.

    The layer uses Keras's operations in these cases:

    - synchronized replicas, renormalization, or a mask;
    - float64;
    - an axis other than the last one;
    - XLA, which computes the variance of the fused operation as a difference of two
      large values.

    Args:
        **kwargs: arguments of `keras.layers.BatchNormalization`.
    """

    def call(
        self,
        inputs: tf.Tensor,
        training: bool | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        if not (training and self.trainable) or not self._is_fusible(inputs, mask):
            return super().call(inputs, training=training, mask=mask)
        # The operation takes images. Volumes and sequences become images of one pixel.
        is_image = len(inputs.shape) == 4
        x = inputs if is_image else tf.reshape(inputs, [-1, 1, 1, inputs.shape[-1]])
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self._float32(self.gamma, 1.0),
            offset=self._float32(self.beta, 0.0),
            mean=[],
            variance=[],
            epsilon=self.epsilon,
            is_training=True,
        )
        # The operation returns the variance divided by `count - 1`. Moving statistics
        # follow the variance divided by `count`. For one value it may be 0 / 0.
        count = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), "float32")
        variance = tf.math.multiply_no_nan(variance, (count - 1) / count)
        for moving, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            old = tf.cast(moving, "float32")
            moving.assign(old * self.momentum + new * (1.0 - self.momentum))
        if not is_image:
            y = tf.reshape(y, tf.shape(inputs))
        # Without this, TensorFlow's graph optimizer fuses the operation with a ReLU
        # after it, and stores a mask. The allocator wastes memory on the mask's odd
        # size.
        y = tf.ensure_shape(y, inputs.shape)
        return tf.cast(y, self.compute_dtype)

    def _is_fusible(self, inputs, mask):
        return (
            self.axis in (-1, len(inputs.shape) - 1)
            and inputs.dtype in _DTYPES
            and mask is None
            and not self.synchronized
            and not self.renorm
            and not _xla.is_traced()
        )

    def _float32(self, weight, default):
        if weight is None:
            return tf.fill(self.moving_mean.shape, default)
        return tf.cast(weight, "float32")


@keras.saving.register_keras_serializable("revnet_tf")
class GroupNormalization(keras.layers.GroupNormalization):
    """Keras's layer, whose gradient stores its input and the statistics only.

    The values are those of `keras.layers.GroupNormalization`. With `groups=-1` the
    layer is an instance normalization. It uses Keras's operations for an axis other
    than the last one.

    Args:
        **kwargs: arguments of `keras.layers.GroupNormalization`.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if self.axis not in (-1, len(inputs.shape) - 1):
            return super().call(inputs)

        def normalize(x, gamma, beta):
            return _group_normalization(x, gamma, beta, self.groups, self.epsilon)

        dtype = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        arguments = [inputs]
        for weight, default in ((self.gamma, 1.0), (self.beta, 0.0)):
            if weight is None:
                weight = tf.fill([inputs.shape[-1]], default)
            arguments.append(tf.cast(weight, dtype))
        if training:
            (y,) = _custom_gradient.call(normalize, *arguments)
        else:
            (y,), _ = normalize(*arguments)
        return tf.cast(tf.ensure_shape(y, inputs.shape), self.compute_dtype)


def _group_normalization(inputs, gamma, beta, groups, epsilon):
    """Returns the normalized inputs in a list, and the function of their gradients."""
    channels = inputs.shape[-1]
    pixels = [tf.shape(inputs)[0], -1, channels]

    def of_groups(values):  # (batch, 1, channels): the mean of each group
        grouped = tf.reshape(values, [-1, groups, channels // groups])
        mean = tf.reduce_mean(grouped, 2, keepdims=True)
        return tf.reshape(tf.broadcast_to(mean, tf.shape(grouped)), tf.shape(values))

    def of_pixels(values):
        return tf.reduce_mean(values, 1, keepdims=True)

    x = tf.reshape(tf.cast(inputs, gamma.dtype), pixels)
    mean = of_groups(of_pixels(x))
    variance = of_groups(of_pixels(tf.math.squared_difference(x, mean)))
    rstd = tf.math.rsqrt(variance + epsilon)
    scale = rstd * gamma
    y = x * scale + (beta - mean * scale)

    def gradient(dy):
        # Otherwise the executor of a graph subtracts the mean in the forward pass.
        with tf.control_dependencies([dy]):
            x = tf.identity(inputs)
        x = tf.reshape(tf.cast(x, gamma.dtype), pixels)
        dy = tf.reshape(tf.cast(dy, gamma.dtype), pixels)
        # Means over the pixels. Each needs one further tensor of the size of `x`.
        d_beta = of_pixels(dy)
        d_gamma = of_pixels(dy * (x - mean)) * rstd
        # dx = scale * dy - rstd * (m1 + normalized * m2), by powers of `x`
        m1, m2 = of_groups(gamma * d_beta), of_groups(gamma * d_gamma)
        slope = -m2 * rstd * rstd
        dx = dy * scale + x * slope - (slope * mean + m1 * rstd)
        count = tf.cast(tf.shape(x)[1], gamma.dtype)
        dx = tf.reshape(tf.cast(dx, inputs.dtype), tf.shape(inputs))
        return dx, *(tf.reduce_sum(d, [0, 1]) * count for d in (d_gamma, d_beta))

    return [tf.reshape(tf.cast(y, inputs.dtype), tf.shape(inputs))], gradient
