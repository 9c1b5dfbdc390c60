"""The data sets of the recipes."""

import dataclasses
import difflib
from pathlib import Path

import numpy as np
import tensorflow as tf

from training import folder, prepared
from training.imagenet import ImageNet
from training.images import ImagesInMemory, held_out, resized


def load(recipe, data_dir=None, skip_corrupt=False, download=True, run_dir=None):
    """Returns the `Images` of a recipe's data set.

    Args:
        recipe: a `Recipe`.
        data_dir: path, as for `prepared.builder`, or of the folder that holds a folder
            of pictures, or of a folder of volumes.
        skip_corrupt: bool, whether to leave out and count images that cannot be read or
            decoded. Otherwise they end the run.
        download: bool, as for `prepared.builder`.
        run_dir: path of the run folder. It stores decompressed volumes, which need it.

    Raises:
        ValueError: as for `prepared.builder`, `folder.load` or `volumes.load`, or the
            data set has another number of classes, or needs no `data_dir`.
        OSError: as for `prepared.builder`, `folder.load` or `volumes.load`, or a record
            is corrupt.
    """
    task = recipe.task
    images = task.load(data_dir, skip_corrupt, download, run_dir)
    classes = len(images.class_names)
    if task.classes not in (None, classes):
        raise ValueError(
            f"classes={task.classes}, but the data set {task.dataset} has {classes}; "
            f"use --classes {classes}, or another data set."
        )
    return images


def load_images(task, data_dir, skip_corrupt, download):
    """Returns the `Images` of a `Classification`; the arguments are as for `load`."""
    if task.dataset == "digits":
        if data_dir is not None:
            raise ValueError(
                f"data_dir={data_dir}: the digits are part of scikit-learn; leave "
                "--data-dir out."
            )
        images = _digits(task)
    elif task.dataset.split("/")[0] in prepared.names():
        builder = prepared.builder(task.dataset, data_dir, download)
        if task.dataset == "imagenet2012":
            return ImageNet(builder, skip_corrupt)
        images = _in_memory(builder, skip_corrupt, task)
    else:
        found = _folder(task.dataset, data_dir)
        images = folder.load(found, task.image_size, skip_corrupt, task.test_in_mean)
    return dataclasses.replace(images, standardize=task.standardize)


def failure(images):
    """Returns the corrupt record that ended the reading of `images`, or `None`."""
    return next((r.failure for r in images.records if r.failure), None)


def _folder(dataset, data_dir):
    """Returns the path of a folder of pictures."""
    path = Path(data_dir or "", dataset)
    if not path.is_dir():
        near = difflib.get_close_matches(dataset, ["digits", *prepared.names()])
        change = f"did you mean {' or '.join(near)}?" if near else "correct the path."
        raise FileNotFoundError(
            f"dataset={dataset}: expected a data set of TFDS or a folder of pictures, "
            f"found no folder {path}; {change}"
        )
    return path


def _digits(task):
    """Returns scikit-learn's 1,797 handwritten digits, 8x8. A fifth is for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # The values of this set go from 0 to 16, the values of all others from 0 to 255.
    images = np.round(digits.images[..., np.newaxis] * (255 / 16)).astype(np.uint8)
    # The test images do not depend on the seed of a recipe.
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    if task.image_size:
        train_images, test_images = (
            resized(images, task.image_size).numpy()
            for images in (train_images, test_images)
        )
    class_names = [str(digit) for digit in digits.target_names]
    return ImagesInMemory(
        train_images,
        train_labels,
        test_images,
        test_labels,
        class_names,
        task.test_in_mean,
    )


def _in_memory(builder, skip_corrupt, task):
    """Returns the `ImagesInMemory` of a data set of TFDS."""
    shape = builder.info.features["image"].shape
    if None in shape and not task.image_size:
        raise ValueError(
            f"image_size=None, but the images of {task.dataset} have several sizes; "
            "give --image-size."
        )

    def decode(example):
        image = example["image"]
        if task.image_size:
            image = resized(image, task.image_size)
        return image, example["label"]

    test = [name for name in folder.TEST_FOLDERS if name in builder.info.splits]
    arrays, splits = [], []
    for split in ("train", *test[:1]):
        records = prepared.Records(builder, split, skip_corrupt)
        splits.append(records)
        examples = records.decoded(records.encoded(), decode)
        try:
            batches = list(examples.batch(1024).as_numpy_iterator())
        except tf.errors.OpError as error:
            raise OSError(records.failure or error) from error
        arrays += map(np.concatenate, zip(*batches, strict=True))
        if arrays[-1].min() < 0:
            raise ValueError(
                f"{builder.data_dir}: expected a class of every image in the split "
                f"{split!r}, found none for some; use another data set."
            )
    if not test:
        images, labels = arrays
        for_test = held_out(labels)
        arrays = [
            part
            for mask in (~for_test, for_test)
            for part in (images[mask], labels[mask])
        ]
    class_names = builder.info.features["label"].names
    return ImagesInMemory(*arrays, class_names, task.test_in_mean, tuple(splits))
