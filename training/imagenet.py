"""ImageNet, read from its files: 1.28 million JPEG images of any size."""

import numpy as np
import tensorflow as tf

from training import prepared
from training.images import ALONE, Images, full_batches

SIZE = 224
# Encoded images, some 110 KB each, from which the next is drawn.
SHUFFLE_BUFFER = 10_000


class ImageNet(Images):
    """`imagenet2012` of TFDS. The validation set is for the test.

    Args:
        builder: TFDS builder of the prepared data set.
        skip_corrupt: bool, whether to leave out images that cannot be read or decoded.
    """

    image_shape = (SIZE, SIZE, 3)
    # To [-1, 1].
    mean = np.full(image_shape, 127.5, np.float32)
    scale = 127.5

    def __init__(self, builder, skip_corrupt=False):
        from tensorflow_datasets import decode

        self.class_names = builder.info.features["label"].names
        # This class decodes images after the shuffle, and decodes only the crop.
        decoders = {"image": decode.SkipDecoding()}
        self.records = self.train, self.test = [
            prepared.Records(builder, split, skip_corrupt, decoders)
            for split in ("train", "validation")
        ]
        # These include corrupt images, which only the reading finds.
        self.num_train_images, self.num_test_images = len(self.train), len(self.test)

    def training_batches(self, recipe, first_step=0, context=ALONE):
        batch = recipe.global_batch_size
        shard = context.num_input_pipelines, context.input_pipeline_id
        per_epoch = self.steps_per_epoch(batch) * batch

        def epoch(number):
            key = tf.stack([tf.constant(recipe.seed, tf.int64), number])
            seed = tf.random.stateless_uniform([], key, 0, tf.int64.max, tf.int64)

            def example(example, position):
                image = random_crop(example["image"], tf.random.fold_in(key, position))
                return self.normalize(255 * image), example["label"]

            records = self.train.encoded(SHUFFLE_BUFFER, seed).enumerate()
            # Every worker reads all files, and decodes only its share.
            records = records.shard(*shard).map(lambda i, record: (*record, i))
            # The next images replace corrupt images, so that epochs have one length.
            examples = self.train.decoded(records, example).repeat()
            return examples.take(per_epoch // context.num_input_pipelines)

        first_epoch, rest = divmod(first_step * batch, per_epoch)
        return (
            tf.data.Dataset.range(first_epoch, tf.int64.max)
            .flat_map(epoch)
            .skip(rest // context.num_input_pipelines)
            .batch(context.get_per_replica_batch_size(batch), drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
        )

    def test_batches(self, batch_size, normalize=True, context=ALONE):
        def example(example):
            image = centre_crop(example["image"])
            return self.normalize(image) if normalize else image, example["label"]

        records = self.test.encoded().shard(
            context.num_input_pipelines, context.input_pipeline_id
        )
        examples = self.test.decoded(records, example)
        return full_batches(examples, self.test_steps(batch_size), batch_size, context)


def random_crop(encoded, key):
    """Decodes a window of a JPEG image and distorts it as in Inception's training.

    The function flips the window at random, and changes its brightness, saturation, hue
    and contrast. The ranges are those of https://github.com/tensorflow/models,
    research/slim/preprocessing/inception_preprocessing.py.

    Returns:
        `float32` image `(224, 224, 3)` from 0 to 1.
    """
    keys = tf.unstack(tf.random.split(key, 6))
    image = random_window(encoded, keys[0]) / 255
    image = tf.image.stateless_random_flip_left_right(image, keys[1])
    image = tf.image.stateless_random_brightness(image, 32 / 255, keys[2])
    image = tf.image.stateless_random_saturation(image, 0.5, 1.5, keys[3])
    image = tf.image.stateless_random_hue(image, 0.2, keys[4])
    image = tf.image.stateless_random_contrast(image, 0.5, 1.5, keys[5])
    return tf.clip_by_value(image, 0.0, 1.0)


def random_window(encoded, key):
    """Decodes a window of 5 to 100 % of the area, with a ratio of 3/4 to 4/3.

    Returns:
        `float32` image `(224, 224, 3)` from 0 to 255.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(encoded),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        key,
        min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.05, 1.0),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
    return tf.image.resize(image, (SIZE, SIZE))


def centre_crop(encoded):
    """Returns the middle 7/8 of each side of a JPEG image, `uint8`, `(224, 224, 3)`."""
    image = tf.image.decode_jpeg(encoded, channels=3)
    image = tf.image.resize(tf.image.central_crop(image, 0.875), (SIZE, SIZE))
    return tf.cast(tf.round(image), tf.uint8)
