"""Batch normalization that spares memory and, in a reversible block, time."""

import keras
import tensorflow as tf

from revnet_tf import custom_gradient, reuse, xla

# Of the inputs that TensorFlow's fused operation takes.
_DTYPES = ("float16", "bfloat16", "float32")


class _Reusing(keras.layers.BatchNormalization):
    """Keras's layer, which in a branch computes the moments of its input once.

    They are kept, two numbers a channel, for the second evaluation: those of the input
    that it has rebuilt would be less exact.
    """

    # Private, and Keras has no public place where a layer could bring its own moments.
    # (The test of how often a step computes them notices if it goes.)
    def _moments(self, inputs, mask):
        moments = super()._moments
        if mask is not None or self.synchronized:
            return moments(inputs, mask)
        kept, is_kept = reuse.once(lambda: moments(inputs, mask))
        if not is_kept:
            return kept
        axis = self.axis % len(inputs.shape)
        shape = [-1 if i == axis else 1 for i in range(len(inputs.shape))]

        def with_gradient(x):
            mean, variance = map(tf.identity, kept)
            count = tf.cast(tf.size(x) / tf.size(mean), x.dtype)

            def gradient(d_mean, d_variance):
                d_mean, d_variance, center = (
                    tf.reshape(t, shape) for t in (d_mean, d_variance, mean)
                )
                return (d_mean + 2 * d_variance * (x - center)) / count

            return [mean, variance], gradient

        return custom_gradient.call(with_gradient, inputs)


def reusing(layer):
    """Returns the layer; for Keras's own, one with its values that is `_Reusing`."""
    if type(layer) is not keras.layers.BatchNormalization:
        return layer
    same = object.__new__(_Reusing)
    object.__setattr__(same, "__dict__", layer.__dict__)
    return same


@keras.saving.register_keras_serializable("revnet_tf")
class BatchNormalization(_Reusing):
    """Keras's layer, with TensorFlow's fused operation for batches of images.

    It computes the same. The gradient of the operations that Keras puts it together
    from holds five tensors of the size of the input at a time; that of the fused one,
    for which it is a single operation, its two inputs and its output. Where the fused
    operation does not fit (synchronized replicas, renormalization, a mask, float64, an
    axis other than the last of four), the layer does what Keras's does; and under XLA,
    which makes a difference of two large numbers of the variance.

    Args:
        **kwargs: of `keras.layers.BatchNormalization`.
    """

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable) or not self._is_fusible(inputs, mask):
            return super().call(inputs, training=training, mask=mask)
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self._float32(self.gamma, 1.0),
            offset=self._float32(self.beta, 0.0),
            mean=[],
            variance=[],
            epsilon=self.epsilon,
            is_training=True,
        )
        # The operation divides by `count - 1`, and moving statistics are of what was
        # normalized with. (Of one number the variance may be 0 / 0.)
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), "float32")
        variance = tf.math.multiply_no_nan(variance, (count - 1) / count)
        for moving, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            old = tf.cast(moving, "float32")
            moving.assign(old * self.momentum + new * (1.0 - self.momentum))
        # Without this, TensorFlow's graph optimizer joins the operation with a ReLU
        # after it: that keeps a mask, too, whose odd size has the allocator waste more.
        y = tf.ensure_shape(y, inputs.shape)
        return tf.cast(y, self.compute_dtype)

    def _is_fusible(self, inputs, mask):
        return (
            len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and inputs.dtype in _DTYPES
            and mask is None
            and not self.synchronized
            and not self.renorm
            and not xla.is_traced()
        )

    def _float32(self, weight, default):
        if weight is None:
            return tf.fill(self.moving_mean.shape, default)
        return tf.cast(weight, "float32")
