"""Pictures of one's own: a folder with one folder of pictures for each class."""

import dataclasses
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from training import paths
from training.images import ImagesInMemory, decode_picture, held_out

TEST_FOLDERS = ("test", "validation", "val")
# Files that Windows writes into folders. The names of other systems begin with a dot.
SYSTEM_FILES = ("thumbs.db", "desktop.ini")


@dataclasses.dataclass
class Pictures:
    """The outcome of the reading, with the attributes of `prepared.Records`."""

    corrupt: list[str]
    failure = None  # `load` raises an error.


def load(folder, image_size=None, skip_corrupt=False, test_in_mean=False):
    """Returns the `ImagesInMemory` of a folder, in color.

    The folder holds one folder for each class, or `train` and `test` that hold these.
    Without `test`, a fifth of each class is for the test. The function ignores hidden
    files, and files beside the folders of the classes.

    Args:
        folder: path of the folder.
        image_size: int, the height and width to which every picture is resized, or
            `None` if all pictures have one size.
        skip_corrupt: bool, whether to leave out and count files that are no pictures.
            Otherwise an error names them.
        test_in_mean: bool, as for `ImagesInMemory`.

    Raises:
        ValueError: the folder has another layout, a class has no picture for the
            training, or the pictures have several sizes.
        OSError: a file cannot be read, or is no picture.
    """
    train, test = _splits(folder)
    class_names = [path.name for path in _folders(train)]
    if len(class_names) < 2:
        raise ValueError(
            f"{train}: expected a folder of pictures for each of two or more classes, "
            f"found {len(class_names)}; sort the pictures into folders."
        )
    of_train = _files(train, class_names)
    of_test = _files(test, class_names) if test else []
    files, labels = zip(*of_train, *of_test, strict=True)
    print(f"Reading {len(files):,} pictures in {folder}", flush=True)

    def decode(file):
        return decode_picture(file, 3, image_size)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda file: read(file, decode), files))

    good = np.array([not isinstance(image, str) for image in images])
    corrupt = [f"{files[i]}: {images[i]}" for i in np.flatnonzero(~good)]
    if corrupt and not skip_corrupt:
        more = ", ..." if len(corrupt) > 5 else ""
        raise OSError(
            f"{len(corrupt)} of {len(files)} files cannot be read as pictures: "
            f"{', '.join(corrupt[:5])}{more}; remove them, or leave them out with "
            "--skip-corrupt."
        )
    for text in corrupt:
        print(f"Skipping {text}", file=sys.stderr)
    files = [files[i] for i in np.flatnonzero(good)]
    images = [images[i] for i in np.flatnonzero(good)]
    labels = np.array(labels)[good]
    for_test = np.flatnonzero(good) >= len(of_train) if test else held_out(labels)
    for label, name in enumerate(class_names):
        if label not in labels[~for_test]:
            raise ValueError(
                f"{train / name}: expected a picture that can be read, found none; add "
                "pictures, or remove the folder."
            )
    if not any(for_test):
        raise ValueError(
            f"{test or folder}: expected pictures for the test, found none; add some, "
            "or give a class two pictures."
        )
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"expected pictures of one size, found {_size(image)} in {file} and "
                f"{_size(images[0])} in {files[0]}; give --image-size."
            )
    images = np.stack(images)
    return ImagesInMemory(
        images[~for_test],
        labels[~for_test],
        images[for_test],
        labels[for_test],
        class_names,
        test_in_mean,
        (Pictures(corrupt),),
    )


def _splits(folder):
    """Returns the folder of the training classes, and the folder of the test classes.

    The second is `None` if one folder is for both.
    """
    # A folder `train` of pictures is a class.
    if not ((folder / "train").is_dir() and _folders(folder / "train")):
        return folder, None
    found = (folder / name for name in TEST_FOLDERS)
    return folder / "train", next((path for path in found if path.is_dir()), None)


def _folders(folder):
    """Returns the folders in a folder."""
    return [path for path in _visible(folder) if path.is_dir()]


def _visible(folder):
    """Returns the paths in a folder without those that the system has put there."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name.lower() not in SYSTEM_FILES
    ]


def _files(split, class_names):
    """Returns `(path, label)` of all pictures in the folders of the classes."""
    found = []
    for folder in _folders(split):
        paths.check_encoding(folder)  # The name of the class is part of the export.
        if folder.name not in class_names:
            raise ValueError(
                f"{folder}: expected one of the training classes "
                f"{', '.join(class_names)}; remove the folder, or add the class to "
                f"{split.with_name('train')}."
            )
        files = _visible(folder)
        if not files:
            raise ValueError(
                f"{folder}: expected pictures of this class, found none; add some, or "
                "remove the folder."
            )
        found += [(file, class_names.index(folder.name)) for file in files]
    return found


def read(file, decode):
    """Returns the `uint8` image of a file, or a string: why it has none.

    Args:
        file: path of the file.
        decode: function from the content of a file to the image.
    """
    if not file.is_file():
        return "is no file"  # To open a pipe would wait for a writer.
    try:
        # This is faster than a transfer of small images to a GPU.
        with tf.device("CPU:0"):
            return decode(file.read_bytes()).numpy()
    except OSError as error:
        return error.strerror
    except tf.errors.OpError as error:
        return re.sub(r"^\{\{.*?\}\} | \[Op:\w+\]", "", error.message)


def _size(image):
    height, width, _ = image.shape
    return f"{width}x{height}"
