"""A sliding window: the network on overlapping windows of a volume of any size.

The windows overlap by half or more. Their probabilities are blended with the weights of
a Gaussian bell. The bell is a product of one factor for each axis, and so is its sum
over a grid of windows. The shares of the windows in a voxel are therefore known for
each axis alone, and no sum of weights is stored.
"""

from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf


def shares(size, window):
    """Returns the windows along an axis, and their shares in each of their voxels.

    Args:
        size: int or scalar tensor, the size of the axis, at least `window`.
        window: int, the size of a window.

    Returns:
        The starts, `(n,)` int32, and the shares, `(n, window)` float32. The shares of
        all windows in one voxel sum to 1.
    """
    stride = max(window // 2, 1)
    count = 1 - (window - size) // stride  # rounds up
    starts = tf.range(count) * (size - window) // tf.maximum(count - 1, 1)
    steps = tf.range(window)
    distance = tf.cast(steps, tf.float32) - (window - 1) / 2
    bell = tf.exp(-0.5 * (distance / (window / 8)) ** 2)
    voxels = starts[:, tf.newaxis] + steps
    bells = tf.broadcast_to(bell, tf.shape(voxels))
    total = tf.math.unsorted_segment_sum(bells, voxels, size)
    return starts, bells / tf.gather(total, voxels)


@keras.saving.register_keras_serializable("training")
class SlidingWindow(keras.layers.Layer):
    """Maps a volume as it is to the probabilities of the classes of its voxels.

    The layer normalizes the volume. A volume that is smaller than the window is padded,
    and the result is cut to its size.

    Args:
        network: `keras.Model`, maps normalized windows to logits.
        normalization: string, as for `training.recipe.Segmentation`.

    Input shape:
        `(1, x, y, z, channels)`, of any size.

    Output shape:
        `(1, x, y, z, classes)`.
    """

    def __init__(self, network, normalization, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.normalization = normalization
        self.window = network.input_shape[1:4]
        self.channels = network.input_shape[4]
        self.classes = network.output_shape[-1]
        self._row = tf.function(
            lambda slab: self._blend(slab, axis=2),
            [tf.TensorSpec((1, None, None, None, self.channels))],
            autograph=False,
        )

    def build(self, input_shape):
        self.built = True  # The network is.

    def call(self, volume):
        axes = [1, 2, 3] if self.normalization == "channel" else [1, 2, 3, 4]
        # As `volumes.statistics`.
        counts = tf.cast(volume != 0, tf.float32)
        count = tf.maximum(tf.reduce_sum(counts, axes, keepdims=True), 1.0)
        mean = tf.reduce_sum(volume, axes, keepdims=True) / count
        square = tf.reduce_sum(counts * (volume - mean) ** 2, axes, keepdims=True)
        deviation = tf.where(square > 0, tf.sqrt(square / count), 1.0)
        volume = (volume - mean) / deviation
        x, y, z = tf.unstack(tf.shape(volume)[1:4])
        missing = tf.maximum(self.window - tf.stack([x, y, z]), 0)
        padding = tf.pad(
            tf.stack([tf.zeros_like(missing), missing], 1), [[1, 1], [0, 0]]
        )
        return self._blend(tf.pad(volume, padding), axis=1)[:, :x, :y, :z]

    def planes(self, image, mean, deviation) -> Iterator[np.ndarray]:
        """Yields the probabilities of a volume, some planes at a time, in their order.

        The memory does not depend on the number of planes.

        Args:
            image: array `(x, y, z, channels)`, which may be mapped from a file.
            mean, deviation: arrays `(channels,)`, with which to normalize.
        """
        size = np.maximum(image.shape[:3], self.window)
        pad = [(0, n - found) for n, found in zip(size, image.shape[:3], strict=True)]
        depth = self.window[0]
        starts, weights = (part.numpy() for part in shares(int(size[0]), depth))
        blended = np.zeros((depth, *size[1:], self.classes), np.float32)
        for start, end, weight in zip(
            starts, [*starts[1:], image.shape[0]], weights, strict=True
        ):
            slab = (image[start : start + depth] - mean) / deviation
            slab = np.pad(slab, [*pad, (0, 0)])[np.newaxis]
            found = self._row(tf.constant(slab, tf.float32))[0].numpy()
            blended += found * weight[:, np.newaxis, np.newaxis, np.newaxis]
            done = end - start
            yield blended[:done, : image.shape[1], : image.shape[2]].copy()
            blended[:-done] = blended[done:]
            blended[-done:] = 0

    def _blend(self, volume, axis):
        """Returns the probabilities of a volume that has the size of a window before
        `axis`, blended over the windows along `axis` and the axes after it."""
        if axis == 4:
            window = tf.ensure_shape(volume, (1, *self.window, self.channels))
            logits = self.network(window, training=False)
            return tf.nn.softmax(tf.cast(logits, tf.float32))
        window, shape = self.window[axis - 1], tf.unstack(tf.shape(volume))
        starts, weights = shares(shape[axis], window)

        def only(value, other):
            return [value if i == axis else other for i in range(5)]

        def add(i, total):
            where = starts[i] + tf.range(window)
            part = self._blend(tf.gather(volume, where, axis=axis), axis + 1)
            part *= tf.reshape(weights[i], only(window, 1))
            after = shape[axis] - window - starts[i]
            return i + 1, total + tf.pad(part, only([starts[i], after], [0, 0]))

        _, total = tf.while_loop(
            lambda i, _: i < tf.shape(starts)[0],
            add,
            (0, tf.zeros([*shape[:4], self.classes])),
            (tf.TensorShape(()), tf.TensorShape([None] * 4 + [self.classes])),
            parallel_iterations=1,
        )
        return total

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.classes)

    def get_config(self):
        return super().get_config() | {
            "network": keras.saving.serialize_keras_object(self.network),
            "normalization": self.normalization,
        }

    @classmethod
    def from_config(cls, config):
        network = keras.saving.deserialize_keras_object(config.pop("network"))
        return cls(network, **config)
