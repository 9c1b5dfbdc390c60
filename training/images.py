"""Images, and the pipelines that feed them to a network.

A training image depends on the seed and on the number of images before it, and on
nothing else. The shuffled elements are small: the positions of images in memory, or
encoded images in files.

The images of a step do not depend on the number of workers and replicas. Each of W
workers makes every W-th image, and all workers make the same number of batches.
"""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

ALONE = tf.distribute.InputContext()


class Images:
    """A data set of images: pipelines for training and test, and how to normalize.

    Attributes:
        image_shape: tuple, `(height, width, channels)`.
        class_names: list of strings, in the order of the labels.
        num_train_images, num_test_images: ints, the numbers of images, including
            corrupt images. The length of an epoch depends on `num_train_images`.
        mean: `float32` array of the shape of an image, which `normalize` subtracts.
        scale: number, or array of one number for each channel, by which `normalize`
            then divides.
        records: tuple of the `prepared.Records` of the splits. It is empty if the
            images are not read from files.
    """

    records = ()

    @property
    def corrupt(self):
        """The corrupt records found so far: file, number and reason of each."""
        return [text for records in self.records for text in records.corrupt]

    @property
    def about(self):
        """The facts of the data set that `result.json` records."""
        return {"class_names": self.class_names}

    def normalize(self, images):
        return (tf.cast(images, tf.float32) - self.mean) / self.scale

    def steps_per_epoch(self, global_batch_size):
        """Returns the number of whole batches. Each epoch leaves out other images.

        Raises:
            ValueError: the images do not fill one batch.
        """
        if global_batch_size > self.num_train_images:
            raise ValueError(
                f"global_batch_size={global_batch_size} is more than the "
                f"{self.num_train_images} training images; use a smaller one."
            )
        return self.num_train_images // global_batch_size

    def test_steps(self, batch_size):
        """Returns the number of batches of all test images."""
        return -(-self.num_test_images // batch_size)

    def training_batches(self, recipe, first_step=0, context=ALONE):
        """Returns the endless batches of training, `(float32 images, labels)`.

        Order and augmentation of an epoch depend only on the seed and on the number of
        the epoch. A run that resumes at `first_step` sees the images of a run without
        interruption.

        Args:
            recipe: a `Recipe`, with its global batch size.
            first_step: int, the number of steps to leave out.
            context: `tf.distribute.InputContext`. The function returns the batches of
                its pipeline. Each batch is for one replica.
        """
        raise NotImplementedError

    def test_batches(self, batch_size, normalize=True, context=ALONE):
        """Returns all test images in their order, `(images, labels, weights)`.

        Args:
            batch_size: int, the batch size of all replicas together. Blank images of
                weight 0 fill the last batch.
            normalize: bool, whether to normalize the images for the network. Otherwise
                they are `uint8`, as the serving model takes them.
            context: as for `training_batches`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ImagesInMemory(Images):
    """A data set in memory: `uint8` images `(n, height, width, channels)`, and labels.

    `normalize` subtracts the mean image and divides by 255. With `standardize` it
    subtracts the mean of each channel and divides by its standard deviation. These are
    the values of the training images, with `test_in_mean` of all images.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    test_in_mean: bool = False
    records: tuple = ()
    standardize: bool = False

    @property
    def image_shape(self):
        return self.train_images.shape[1:]

    @property
    def num_train_images(self):
        return len(self.train_images)

    @property
    def num_test_images(self):
        return len(self.test_images)

    @functools.cached_property
    def mean(self):
        if self.standardize:
            means, _ = self._moments
            return np.broadcast_to(means, self.image_shape).astype(np.float32)
        # The sum is exact: the values are integers.
        total = sum(images.sum(axis=0, dtype=np.int64) for images in self._in_mean)
        return (total / sum(map(len, self._in_mean))).astype(np.float32)

    @functools.cached_property
    def scale(self):
        if not self.standardize:
            return 255  # The authors divide after they subtract the mean, too.
        _, deviations = self._moments
        return np.where(deviations > 0, deviations, 1).astype(np.float32)

    @property
    def _in_mean(self):
        return [self.train_images, self.test_images][: 1 + self.test_in_mean]

    @functools.cached_property
    def _moments(self):
        """The mean and the standard deviation of each channel."""
        values = np.arange(256)
        # Exact, and without a copy of all images in a wider dtype.
        counts = sum(
            np.stack(
                [
                    np.bincount(channel.ravel(), minlength=256)
                    for channel in np.moveaxis(images, -1, 0)
                ]
            )
            for images in self._in_mean
        )
        shares = counts / counts.sum(axis=1, keepdims=True)
        means = shares @ values
        return means, np.sqrt(shares @ values**2 - means**2)

    def training_batches(self, recipe, first_step=0, context=ALONE):
        # The pipeline runs on the host, also on a machine with a GPU.
        with tf.device("CPU:0"):
            pixels = tf.constant(self.train_images)
            labels = tf.constant(self.train_labels)
        size = len(self.train_images)
        batch = recipe.global_batch_size
        per_epoch = self.steps_per_epoch(batch) * batch

        def example(position):
            epoch, index = position // per_epoch, position % per_epoch
            key = tf.stack([tf.constant(recipe.seed, tf.int64), epoch])
            # A permutation of all positions would need memory, and time at the start.
            i = tf.random.experimental.index_shuffle(index, key, size - 1)
            image = self.normalize(pixels[i])
            return augment(image, tf.random.fold_in(key, index), recipe.task), labels[i]

        return (
            tf.data.Dataset.range(first_step * batch, tf.int64.max)
            .shard(context.num_input_pipelines, context.input_pipeline_id)
            .map(example, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(context.get_per_replica_batch_size(batch), drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
        )

    def test_batches(self, batch_size, normalize=True, context=ALONE):
        examples = tf.data.Dataset.from_tensor_slices(
            (self.test_images, self.test_labels)
        ).shard(context.num_input_pipelines, context.input_pipeline_id)
        if normalize:
            examples = examples.map(lambda x, y: (self.normalize(x), y))
        return full_batches(examples, self.test_steps(batch_size), batch_size, context)


def full_batches(examples, steps, batch_size, context):
    """Returns the batches of `(image, label, weight)`. Blanks fill the last batch.

    Without the blanks, some replicas would get no image from a smaller last batch. A
    convolution of no image has had outputs of a wrong shape (TensorFlow 2.21, CPU).

    Args:
        examples: data set of the images and labels of one pipeline of `context`.
        steps: int, the number of batches.
        batch_size: int, the batch size of all replicas together.
        context: `tf.distribute.InputContext`.
    """
    blank = tf.nest.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec
    )
    blanks = tf.data.Dataset.from_tensors((*blank, 0.0)).repeat()
    examples = examples.map(lambda image, label: (image, label, 1.0))
    size = steps * batch_size // context.num_input_pipelines
    batch_size = context.get_per_replica_batch_size(batch_size)
    batches = examples.concatenate(blanks).take(size).batch(batch_size, True)
    return batches.prefetch(tf.data.AUTOTUNE)


def augment(image, key, task):
    """Pads with zeros, crops at random to the size before, and flips at random."""
    crop_key, flip_key = tf.unstack(tf.random.split(key))
    if task.pad:
        pad = [task.pad, task.pad]
        padded = tf.pad(image, [pad, pad, [0, 0]])
        image = tf.image.stateless_random_crop(padded, image.shape, crop_key)
    if task.flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_key)
    return image


def decode_picture(file, channels, size=None):
    """Decodes a JPEG, PNG, GIF, BMP or WebP file; of an animation the first picture.

    Args:
        file: scalar string tensor, the content of the file.
        channels: int, 3 for color or 1 for gray, to which every picture is converted.
        size: int, as for `resized`, or `None` for the size of the picture.

    Returns:
        `uint8` image `(height, width, channels)`.
    """
    image = tf.io.decode_image(file, channels, expand_animations=False)
    image = tf.ensure_shape(image, (None, None, channels))
    return image if size is None else resized(image, size)


def resized(image, size):
    """Returns the whole of a `uint8` image, resized to `(size, size)`."""
    # Without `antialias` a large picture is sampled at few points.
    image = tf.image.resize(image, (size, size), antialias=True)
    return tf.cast(tf.round(image), tf.uint8)


def held_out(labels):
    """Returns a boolean array that selects a fifth of each class for the test.

    The choice depends on the labels alone, not on the seed of a recipe. A class of one
    example has no example for the test.

    Args:
        labels: integer array `(n,)`.
    """
    rng = np.random.default_rng(0)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        found = rng.permutation(np.flatnonzero(labels == label))
        mask[found[: -(-len(found) // 5)] if len(found) > 1 else []] = True
    return mask
