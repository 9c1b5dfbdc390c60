"""Batch normalization whose gradient stores less than Keras's."""

import keras
import tensorflow as tf

from revnet_tf import _xla

__all__ = ["BatchNormalization"]

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
