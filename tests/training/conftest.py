"""Made-up data sets, prepared as TFDS prepares the real ones."""

import numpy as np
import pytest
import tensorflow as tf


def store(data_dir, name, version, image, splits, class_names):
    """Prepares a data set.

    Args:
        data_dir: folder to write to.
        name, version: of the data set.
        image: TFDS feature of the images.
        splits: dictionary of lists of examples.
        class_names: list of strings.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    example = next(iter(splits.values()))[0]
    features = {
        key: tfds.features.Text() for key in example if key not in ("image", "label")
    }
    features["image"] = image
    features["label"] = tfds.features.ClassLabel(names=class_names)
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        data_dir=data_dir,
        features=tfds.features.FeaturesDict(features),
        split_datasets={k: list(enumerate(v)) for k, v in splits.items()},
        disable_shuffling=True,
    )
    return data_dir


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of a made-up CIFAR-10, 20 and 10 images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)

    def split(size):
        return [
            {
                "id": f"{i}",
                "image": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
                "label": i % 10,
            }
            for i in range(size)
        ]

    return store(
        tmp_path_factory.mktemp("tfds"),
        "cifar10",
        "3.0.2",
        tfds.features.Image(shape=(32, 32, 3)),
        {"train": split(20), "test": split(10)},
        list("abcdefghij"),
    )


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """The folder of a made-up ImageNet: 12 and 5 JPEG images of different sizes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)

    def split(size):
        examples = []
        for i in range(size):
            height, width = rng.integers(100, 400, 2)
            # Smooth, as a photograph is: noise would not survive the compression.
            image = tf.image.resize(rng.integers(0, 256, (4, 4, 3)), (height, width))
            examples.append(
                {
                    "image": tf.cast(image, tf.uint8).numpy(),
                    "label": 10 * i,
                    "file_name": f"n{i:08}_{i}.JPEG",
                }
            )
        return examples

    return store(
        tmp_path_factory.mktemp("tfds"),
        "imagenet2012",
        "5.1.0",
        tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        {"train": split(12), "validation": split(5)},
        [f"n{i:08}" for i in range(1000)],
    )
