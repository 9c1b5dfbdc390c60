"""Images, and the pipelines that feed them to a network.

The sets are small enough to be held decoded (CIFAR: 180 MB), so that an image of
training is a function of the seed and of how many came before it, and of nothing else.
"""

import dataclasses
import functools
import os
import threading
from pathlib import Path

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set in memory: `uint8` images `(n, height, width, channels)`, labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]

    @property
    def image_shape(self):
        return self.train_images.shape[1:]

    @functools.cached_property
    def mean_image(self):
        """Mean of each pixel over the training images; the integer sum is exact."""
        total = self.train_images.sum(axis=0, dtype=np.int64)
        return (total / len(self.train_images)).astype(np.float32)

    def normalize(self, images):
        """Subtracts the mean image, then divides by 255: the authors' order."""
        return (tf.cast(images, tf.float32) - self.mean_image) / 255

    def steps_per_epoch(self, global_batch_size):
        """Returns the number of whole batches; a different rest is left out each epoch.

        Raises:
            ValueError: there is not one.
        """
        if global_batch_size > len(self.train_images):
            raise ValueError(
                f"global_batch_size={global_batch_size} is more than the "
                f"{len(self.train_images)} training images; use a smaller one."
            )
        return len(self.train_images) // global_batch_size


def load(name, data_dir=None):
    """Returns the `Images` of a data set.

    Args:
        name: `"digits"`, `"cifar10"` or `"cifar100"`.
        data_dir: folder of TFDS data sets. Defaults to `TFDS_DATA_DIR`, then to that of
            TFDS. What is not prepared there is downloaded to it.

    Raises:
        FileNotFoundError: `data_dir` holds the data set in another place or version.
        ConnectionError: the data set is not there and cannot be downloaded.
    """
    return _digits() if name == "digits" else _tfds(name, data_dir)


def training_batches(images, recipe, first_step=0):
    """Returns the endless batches of training, `(float32 images, labels)`.

    Order, crops and flips of an epoch depend on the seed and the number of the epoch
    alone: a run that goes on from `first_step` sees what it would have seen.
    """
    # On the host, also where there is a GPU: the pipeline runs there.
    with tf.device("CPU:0"):
        pixels = tf.constant(images.train_images)
        labels = tf.constant(images.train_labels)
    size = len(images.train_images)
    batch = recipe.global_batch_size
    per_epoch = images.steps_per_epoch(batch) * batch

    def example(position):
        epoch, index = position // per_epoch, position % per_epoch
        key = tf.stack([tf.constant(recipe.seed, tf.int64), epoch])
        # A permutation that need not be held, nor be filled before the first image.
        i = tf.random.experimental.index_shuffle(index, key, size - 1)
        image = images.normalize(pixels[i])
        return augment(image, tf.random.fold_in(key, index), recipe), labels[i]

    return (
        tf.data.Dataset.range(first_step * batch, tf.int64.max)
        .map(example, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )


def augment(image, key, recipe):
    """Zero-pads, crops at random to the former size, and flips at random."""
    crop_key, flip_key = tf.unstack(tf.random.split(key))
    if recipe.pad:
        pad = [recipe.pad, recipe.pad]
        padded = tf.pad(image, [pad, pad, [0, 0]])
        image = tf.image.stateless_random_crop(padded, image.shape, crop_key)
    if recipe.flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_key)
    return image


def test_batches(images, batch_size, normalize=True):
    """Returns all test images in their order, `(images, labels)`.

    Args:
        images: `Images`.
        batch_size: the last batch may be smaller.
        normalize: whether for the network, or as `uint8` for the serving model.
    """
    batches = tf.data.Dataset.from_tensor_slices(
        (images.test_images, images.test_labels)
    ).batch(batch_size)
    if normalize:
        batches = batches.map(lambda x, y: (images.normalize(x), y))
    return batches.prefetch(tf.data.AUTOTUNE)


def _digits():
    """Scikit-learn's 1,797 handwritten digits, 8x8; a fifth of them is held out."""
    # Imported here, as TFDS below: a run needs one of the two.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # 0 to 16 in the set; stretched, so that images of all sets go from 0 to 255.
    images = np.round(digits.images[..., np.newaxis] * (255 / 16)).astype(np.uint8)
    # One split for every seed of a recipe: results are of the same test images.
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    class_names = [str(digit) for digit in digits.target_names]
    return Images(train_images, train_labels, test_images, test_labels, class_names)


def _tfds(name, data_dir):
    import tensorflow_datasets as tfds

    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir} is no folder; make it, or give the one in which "
            f"{name} lies, or is to be downloaded to."
        )
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    builder = tfds.builder_cls(name)(data_dir=data_dir)
    if not (Path(builder.data_dir) / "dataset_info.json").is_file():
        _download(builder)
    try:
        splits = builder.as_dataset(
            split=["train", "test"],
            batch_size=-1,  # all in one
            read_config=tfds.ReadConfig(try_autocache=False),
        )
    except (tf.errors.OpError, AssertionError) as error:
        raise OSError(
            f"{builder.data_dir} cannot be read: {error}. Copy or prepare it again."
        ) from error
    arrays = [split[key].numpy() for split in splits for key in ("image", "label")]
    return Images(*arrays, class_names=builder.info.features["label"].names)


def _download(builder):
    folder = Path(builder.data_dir).resolve()
    data_dir, wanted = folder.parents[1], f"{builder.name}/{builder.version}"
    found = _misplaced(builder.name, data_dir)
    if found:
        raise FileNotFoundError(
            f"data_dir={data_dir} does not hold {wanted}, but there is "
            f"{', '.join(map(str, found))}; give the folder in which {wanted} lies."
        )
    ((url, info),) = builder.url_infos.items()
    print(f"Downloading {wanted}, {info.size}, from {url} to {data_dir}", flush=True)
    problem = _unreachable(url)
    if problem:
        raise ConnectionError(
            f"{folder} is not there, and {url} cannot be reached ({problem}). Run the "
            f"command where there is a network, copy {wanted} from its data folder "
            f"to {folder}, or give the --data-dir in which it lies."
        )
    builder.download_and_prepare()


def _misplaced(name, data_dir):
    """Returns where the data set lies in another version, or a level off."""
    patterns = ("", "*/", f"{name}/*/", f"*/{name}/*/")
    infos = [p for at in patterns for p in data_dir.glob(at + "dataset_info.json")]
    return [info.parent for info in infos if name in info.parts]


def _unreachable(url):
    """Returns why `url` gives no answer within 15 seconds, `None` if it does.

    TFDS itself repeats its attempts for minutes. The client is the one it uses, with
    the same proxies and certificates; the thread is for look-ups of the host's name,
    on which no timeout has a hold.
    """
    import requests

    problem = ["no answer within 15 seconds"]

    def ask():
        try:
            with requests.get(url, stream=True, timeout=10) as response:
                response.raise_for_status()
            problem[0] = None
        except requests.RequestException as error:
            problem[0] = type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(15)
    return problem[0]
