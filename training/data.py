"""The data sets of the recipes."""

import numpy as np
import tensorflow as tf

from training import prepared
from training.imagenet import ImageNet
from training.images import ImagesInMemory


def load(recipe, data_dir=None, skip_corrupt=False, download=True):
    """Returns the `Images` of a recipe's data set.

    Args:
        recipe: a `Recipe`.
        data_dir, download: as for `prepared.builder`.
        skip_corrupt: bool, whether to leave out and count images that cannot be read or
            decoded. Otherwise they end the run.

    Raises:
        ValueError: the data set has another number of classes, or is no TFDS data set
            and `data_dir` is given.
        OSError: as for `prepared.builder`, or a record is corrupt.
    """
    task = recipe.task
    if task.dataset == "digits":
        if data_dir is not None:
            raise ValueError(
                f"data_dir={data_dir}: the digits are part of scikit-learn; leave "
                "--data-dir out."
            )
        images = _digits(task.test_in_mean)
    else:
        builder = prepared.builder(task.dataset, data_dir, download)
        if task.dataset == "imagenet2012":
            images = ImageNet(builder, skip_corrupt)
        else:
            images = _in_memory(builder, skip_corrupt, task.test_in_mean)
    if len(images.class_names) != task.classes:
        raise ValueError(
            f"classes={task.classes}, but this copy of {task.dataset} has "
            f"{len(images.class_names)}; use that number, or another --data-dir."
        )
    return images


def failure(images):
    """Returns the corrupt record that ended the reading of `images`, or `None`."""
    return next((r.failure for r in images.records if r.failure), None)


def _digits(test_in_mean):
    """Scikit-learn's 1,797 handwritten digits, 8x8; a fifth of them is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # The images of this set go from 0 to 16, those of all others from 0 to 255.
    images = np.round(digits.images[..., np.newaxis] * (255 / 16)).astype(np.uint8)
    # The test images do not depend on the seed of a recipe.
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    class_names = [str(digit) for digit in digits.target_names]
    return ImagesInMemory(
        train_images, train_labels, test_images, test_labels, class_names, test_in_mean
    )


def _in_memory(builder, skip_corrupt, test_in_mean):
    arrays, splits = [], []
    for split in ("train", "test"):
        records = prepared.Records(builder, split, skip_corrupt)
        splits.append(records)
        examples = records.decoded(
            records.encoded(), lambda example: (example["image"], example["label"])
        )
        try:
            batches = list(examples.batch(1024).as_numpy_iterator())
        except tf.errors.OpError as error:
            raise OSError(records.failure or error) from error
        arrays += map(np.concatenate, zip(*batches, strict=True))
    class_names = builder.info.features["label"].names
    return ImagesInMemory(*arrays, class_names, test_in_mean, tuple(splits))
