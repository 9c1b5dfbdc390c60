"""Volumes with a class for each voxel, and the pipelines that feed their patches.

The folder is that of a task of the Medical Segmentation Decathlon, or of nnU-Net. Every
volume is decompressed once, to arrays in the run folder that the pipelines map into
memory. A patch depends on the seed and on the number of patches before it, and on
nothing else.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import tensorflow as tf
from nibabel import affines

from revnet_tf._files import replacing
from training import nifti
from training.images import ALONE, Images

# The class of voxels without a label, and of the padding of a patch.
UNLABELED = 255
# Voxels of each class of a volume, around which patches with foreground lie.
NUM_VOXELS = 1_000
# Volumes that are in memory at the same time while they are decompressed.
VOLUMES_AT_ONCE = 2
# A change of the arrays in the cache needs another number.
CACHE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Files:
    """A volume and its labels in NIfTI files."""

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def identity(self):
        """The facts on which the arrays of the cache depend."""
        paths = [path.resolve() for path in (*self.images, self.label)]
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

    def open(self, num_channels):
        """Returns the opened files: of the channels, and of the labels."""
        images = nifti.opened(self.images, num_channels)
        (label,) = nifti.opened([self.label], 1)
        nifti.check_place(self.label, label, self.images[0], images[0])
        return images, label


@dataclasses.dataclass(frozen=True)
class Layout:
    """The description of a data set of volumes.

    Attributes:
        class_names: list of strings; the first is the background.
        label_values: list of ints, the value of each class in the files.
        unlabeled: int, the value of voxels without a label, or `None`.
        channel_names: list of strings.
        channel_files: bool, whether each channel has a file of its own.
        train, test: lists of `Files`.
    """

    class_names: list[str]
    label_values: list[int]
    unlabeled: int | None
    channel_names: list[str]
    channel_files: bool
    train: list
    test: list


def load(task, data_dir, cache, skip_corrupt=False):
    """Returns the `Volumes` of a task, and writes their arrays to the cache.

    Args:
        task: a `Segmentation`.
        data_dir: path of a folder with a `dataset.json`; `None` for `brain`.
        cache: path of the folder of the arrays; it need not exist. If a volume cannot
            be used, the function removes the folders that it has made.
        skip_corrupt: bool, whether to leave out and count volumes that cannot be used.
            Otherwise an error names them.

    Raises:
        ValueError, OSError: a file is missing, damaged, or does not fit the others.
    """
    if task.dataset == "brain":
        if data_dir is not None:
            raise ValueError(
                f"data_dir={data_dir}: the brain is part of nilearn; leave --data-dir "
                "out."
            )
        from training import brain

        layout = brain.layout()
    else:
        layout = read_layout(data_dir)
    cases = [*layout.train, *layout.test]
    print(f"Reading {len(cases):,} volumes", flush=True)
    with ThreadPoolExecutor(VOLUMES_AT_ONCE) as pool:
        sizes = list(pool.map(_trying(lambda case: _sizes(case, layout)), cases))
        spacing = task.spacing or _median(sizes[: len(layout.train)])
        prepare = functools.partial(_prepare, layout, task, spacing, cache)
        made = _first_missing(cache)
        try:
            found = list(pool.map(_trying(prepare), cases))
            corrupt = [text for text in found if isinstance(text, str)]
            if corrupt and not skip_corrupt:
                more = " ..." if len(corrupt) > 5 else ""
                raise OSError(
                    f"{len(corrupt)} of {len(cases)} volumes cannot be used: "
                    f"{' '.join(corrupt[:5])}{more} Or leave them out with "
                    "--skip-corrupt."
                )
            sets = found[: len(layout.train)], found[len(layout.train) :]
            train, test = ([v for v in s if not isinstance(v, str)] for s in sets)
            for name, volumes in (("training", train), ("test", test)):
                if not volumes:
                    raise ValueError(
                        f"{data_dir}: expected a volume for the {name}, found none; "
                        "add volumes."
                    )
        except BaseException:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise
    for text in corrupt:
        print(f"Skipping {text}", file=sys.stderr)
    return Volumes(task, layout, spacing, train, test, corrupt)


def _first_missing(path):
    """Returns the highest folder of a path that does not exist, or `None`."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    return missing[-1] if missing else None


def _trying(function):
    """Returns a function that returns the message of an error, as a string."""

    def tried(*args):
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            return str(error)

    return tried


def _sizes(case, layout):
    """Returns the sizes of a voxel of a volume along the axes, from its header."""
    images, _ = case.open(len(layout.channel_names))
    affine = images[0].affine
    order = nib.io_orientation(affine)[:, 0].astype(int)
    return affines.voxel_sizes(affine)[np.argsort(order)]


def _median(sizes):
    """Returns the median spacing, as a tuple of floats."""
    good = [size for size in sizes if not isinstance(size, str)]
    if not good:
        return (1.0, 1.0, 1.0)
    return tuple(round(float(size), 4) for size in np.median(good, axis=0))


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A volume in the cache, along the axes and at the spacing of the run.

    Attributes:
        folder: path of its folder.
        shape: tuple of the sizes along the axes.
        mean, deviation: `float32` arrays, for each channel.
        voxels: list of integer arrays `(n, 3)`, the indices of some voxels of each
            class other than the background.
    """

    folder: Path
    shape: tuple[int, ...]
    mean: np.ndarray
    deviation: np.ndarray
    voxels: list[np.ndarray]

    @property
    def image(self):
        """The intensities as they are, `float32` `(x, y, z, channels)`."""
        return np.load(self.folder / "image.npy", mmap_mode="r")

    @property
    def label(self):
        """The classes, `uint8` `(x, y, z)`."""
        return np.load(self.folder / "label.npy", mmap_mode="r")

    def patch(self, start, size):
        """Returns a normalized patch and its classes. Padding is 0 and unlabeled."""
        where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        image = (self.image[where] - self.mean) / self.deviation
        label = self.label[where]
        pad = [(0, n - found) for n, found in zip(size, label.shape, strict=True)]
        label = np.pad(label, pad, constant_values=UNLABELED)
        return np.pad(image, [*pad, (0, 0)]), label


def statistics(image, normalization):
    """Returns mean and standard deviation of the channels of a volume, as `float32`.

    Voxels of intensity 0 do not count. Many programs set the voxels outside of the head
    to 0, and their share depends on the field of view.

    Args:
        image: array `(x, y, z, channels)`.
        normalization: string, `"channel"`, or `"volume"` for one mean and deviation of
            all channels.
    """
    axes = (0, 1) if normalization == "channel" else (0, 1, 2)
    # Plane by plane: a `float64` copy of the volume would need much memory.
    count = np.maximum(sum(np.count_nonzero(plane, axes) for plane in image), 1)
    mean = sum(plane.sum(axes, np.float64) for plane in image) / count
    square = sum(
        np.where(plane == 0, 0, (plane - mean) ** 2).sum(axes) for plane in image
    )
    deviation = np.where(square > 0, np.sqrt(square / count), 1)
    shape = image.shape[-1:]
    return (
        np.broadcast_to(mean, shape).astype(np.float32),
        np.broadcast_to(deviation, shape).astype(np.float32),
    )


def _prepare(layout, task, spacing, cache, case):
    """Returns the `Arrays` of a case, and writes them if the cache lacks them."""
    images, label = case.open(len(layout.channel_names))
    facts = [
        CACHE_VERSION,
        case.identity,
        list(map(float, spacing)),
        task.normalization,
        layout.label_values,
        layout.unlabeled,
    ]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = cache / f"{case.name}-{digest}"
    if not folder.is_dir():
        volume = nifti.read(case.images, images, spacing)
        classes = _classes(case.label, label, layout)
        classes = nib.Nifti1Image(classes, label.affine)
        classes = np.asarray(nifti.along_axes(classes, spacing, order=0).dataobj)
        mean, deviation = statistics(volume.channels, task.normalization)
        rng = np.random.default_rng(0)
        voxels = {}
        for value in range(1, len(layout.class_names)):
            of_class = np.flatnonzero(classes == value)
            if len(of_class):
                some = rng.choice(of_class, min(NUM_VOXELS, len(of_class)), False)
                indices = np.unravel_index(some, classes.shape)
                voxels[f"voxels_{value}"] = np.stack(indices, -1).astype(np.int32)
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(folder) as part:
                part.mkdir()
                np.save(part / "image.npy", volume.channels)
                np.save(part / "label.npy", classes)
                np.savez(part / "facts.npz", mean=mean, deviation=deviation, **voxels)
        except OSError:
            if not folder.is_dir():  # Another worker was first.
                raise
    with np.load(folder / "facts.npz") as facts:
        return Arrays(
            folder,
            np.load(folder / "label.npy", mmap_mode="r").shape,
            facts["mean"],
            facts["deviation"],
            [facts[name] for name in facts.files if name.startswith("voxels_")],
        )


def _classes(file, label, layout):
    """Returns the class of each voxel of an opened file of labels, as `uint8`."""
    values = nifti.voxels(file, label).reshape(label.shape[:3])
    known = dict(zip(layout.label_values, range(len(layout.class_names)), strict=True))
    if layout.unlabeled is not None:
        known[layout.unlabeled] = UNLABELED
    found = np.unique(values)
    if unknown := [f"{value:g}" for value in found if value not in known]:
        more = " ..." if len(unknown) > 5 else ""
        raise ValueError(
            f"{file}: expected the labels of dataset.json, "
            f"{', '.join(map(str, known))}, found {', '.join(unknown[:5])}{more}; add "
            "them there, or correct the file."
        )
    table = np.array([known[value] for value in found], np.uint8)
    return table[np.searchsorted(found, values)]


class Volumes(Images):
    """A data set of volumes: patches for the training, tiles for the test.

    An image of the base class is a patch. The tiles of a test volume cover it without
    overlap.

    Args:
        task: a `Segmentation`.
        layout: a `Layout`.
        spacing: tuple of the size of a voxel in mm along the axes.
        train, test: lists of `Arrays`.
        corrupt: list of strings, the volumes that were left out, and why.
    """

    corrupt = ()

    def __init__(self, task, layout, spacing, train, test, corrupt):
        self.task = task
        self.layout = layout
        self.spacing = spacing
        self.train, self.test = train, test
        self.corrupt = corrupt
        self.class_names = layout.class_names
        self.image_shape = (*task.patch_size, len(layout.channel_names))
        self.num_train_images = len(train) * task.patches_per_volume
        self.tiles = [
            (volume, np.array(index) * task.patch_size)
            for volume in test
            for index in np.ndindex(
                *(
                    -(-n // p)
                    for n, p in zip(volume.shape, task.patch_size, strict=True)
                )
            )
        ]
        self.num_test_images = len(self.tiles)

    @property
    def about(self):
        return {
            "class_names": self.class_names,
            "label_values": self.layout.label_values,
            "channel_names": self.layout.channel_names,
            "channel_files": self.layout.channel_files,
            "spacing": self.spacing,
        }

    def training_batches(self, recipe, first_step=0, context=ALONE):
        batch = recipe.global_batch_size
        per_epoch = self.steps_per_epoch(batch) * batch

        def example(position):
            epoch, index = divmod(int(position), per_epoch)
            order = np.random.default_rng([recipe.seed, epoch])
            number = order.permutation(self.num_train_images)[index]
            rng = np.random.default_rng([recipe.seed, epoch, index])
            return self.random_patch(self.train[number % len(self.train)], rng)

        positions = tf.data.Dataset.range(first_step * batch, tf.int64.max)
        return self._batches(positions, example, batch, context)

    def test_batches(self, batch_size, normalize=True, context=ALONE):
        """Returns all tiles. Tiles without labels fill the last batch."""
        if not normalize:
            raise ValueError("Tiles are normalized by the volume that they belong to.")
        blank = (
            np.zeros(self.image_shape, np.float32),
            np.full(self.task.patch_size, UNLABELED, np.uint8),
        )

        def example(position):
            if position >= len(self.tiles):
                return blank
            volume, start = self.tiles[position]
            return volume.patch(start, self.task.patch_size)

        positions = tf.data.Dataset.range(self.test_steps(batch_size) * batch_size)
        return self._batches(positions, example, batch_size, context)

    def random_patch(self, volume, rng):
        """Returns a random patch of a volume, and its classes."""
        size, shape = np.array(self.task.patch_size), np.array(volume.shape)
        if volume.voxels and rng.random() < self.task.foreground:
            of_class = volume.voxels[rng.integers(len(volume.voxels))]
            start = of_class[rng.integers(len(of_class))] - size // 2
        else:
            start = rng.integers(0, np.maximum(shape - size, 0) + 1)
        start = np.clip(start, 0, np.maximum(shape - size, 0))
        image, label = volume.patch(start, size)
        if self.task.flip:
            axes = np.flatnonzero(rng.random(3) < 0.5)
            image, label = np.flip(image, axes), np.flip(label, axes)
        return np.ascontiguousarray(image), np.ascontiguousarray(label)

    def _batches(self, positions, example, batch_size, context):
        """Returns the batches of the examples at positions, for one pipeline."""

        def at(position):
            kinds = tf.float32, tf.uint8
            image, label = tf.numpy_function(example, [position], kinds)
            image.set_shape(self.image_shape)
            label.set_shape(self.task.patch_size)
            return image, label

        return (
            positions.shard(context.num_input_pipelines, context.input_pipeline_id)
            .map(at, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(context.get_per_replica_batch_size(batch_size), drop_remainder=True)
            .prefetch(2)  # `AUTOTUNE` may hold many patches.
        )


def read_layout(folder):
    """Returns the `Layout` of a folder of the Decathlon or of nnU-Net.

    If `labelsTs` has labels, the volumes of `imagesTs` are for the test. Otherwise a
    fifth of the training volumes is.

    Raises:
        ValueError: `dataset.json` does not describe such a folder.
        OSError: it is missing or damaged, or a file that it names is missing.
    """
    if folder is None:
        raise ValueError(
            "dataset=decathlon: expected the folder of a task; give it as --data-dir."
        )
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; give the folder of a task of the Medical Segmentation "
            "Decathlon, or of a data set of nnU-Net, as --data-dir."
        )
    try:
        content = json.loads(path.read_bytes())
        channel_names = content.get("channel_names") or content["modality"]
        channel_names = [str(channel_names[str(i)]) for i in range(len(channel_names))]
        labels = _labels(content["labels"])
        of_nnunet = "file_ending" in content
        if of_nnunet:
            ending = content["file_ending"]
            files = _nnunet(folder, "Tr", ending, channel_names)
            test = _nnunet(folder, "Ts", ending, channel_names)
        else:
            entries = content["training"]
            pairs = [(entry["image"], entry["label"]) for entry in entries]
            files = _decathlon(folder, pairs, channel_names)
            names = [entry for entry in content.get("test", ())]
            pairs = [(name, name.replace("imagesTs", "labelsTs")) for name in names]
            labeled = any((folder / label).exists() for _, label in pairs)
            test = _decathlon(folder, pairs if labeled else [], channel_names)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: expected the description of a data set, found {reason}; correct "
            "it, or bring back a copy."
        ) from error
    if len({case.name for case in (*files, *test)}) < len(files) + len(test):
        raise ValueError(f"{path}: expected a name for each volume; rename some.")
    files = sorted(files, key=lambda case: case.name)
    if not test:
        if len(files) < 2:
            raise ValueError(
                f"{folder}: expected two labelled volumes or more, for training and "
                f"test, found {len(files)}; add some."
            )
        order = np.random.default_rng(0).permutation(len(files))
        held_out = set(order[: -(-len(files) // 5)].tolist())
        test = [files[i] for i in sorted(held_out)]
        files = [case for i, case in enumerate(files) if i not in held_out]
    unlabeled = labels.pop("ignore", None)
    names = sorted(labels, key=labels.get)
    return Layout(
        names,
        [labels[name] for name in names],
        unlabeled,
        channel_names,
        any(len(case.images) > 1 for case in files) or of_nnunet,
        files,
        test,
    )


def _labels(labels):
    """Returns the values of classes by their names."""
    if all(isinstance(value, str) for value in labels.values()):
        found = {name: int(value) for value, name in labels.items()}  # Decathlon
    else:
        found = dict(labels)
    values = list(found.values())
    whole = all(type(value) is int and 0 <= value for value in values)
    distinct = whole and len(set(values)) == len(labels) and 0 in values
    if not (distinct and 2 <= len(values) < UNLABELED):
        raise ValueError(
            f"the labels {labels} (they need one whole number for each of 2 to 254 "
            "classes, with 0 for the background)"
        )
    return found


def _decathlon(folder, pairs, channel_names):
    """Returns the `Files` of pairs of paths, of an image and of its labels."""
    found = []
    for image, label in pairs:
        name, ending = split_name(Path(image).name)
        images = [folder / image]
        of_channels = [
            images[0].with_name(f"{name}_{i:04}{ending}")
            for i in range(len(channel_names))
        ]
        # The first version of nnU-Net names images as the Decathlon does.
        if not images[0].exists() and of_channels[0].exists():
            images = of_channels
        found.append(Files(name, tuple(images), folder / label))
    return found


def _nnunet(folder, split, ending, channel_names):
    """Returns the `Files` of a folder of nnU-Net, one for each volume with labels."""
    labels, images = folder / f"labels{split}", folder / f"images{split}"
    if split == "Ts" and not labels.is_dir():
        return []
    names = set()
    for path in images.glob(f"*_0000{ending}"):
        if not path.name.startswith("."):
            names.add(path.name.removesuffix(f"_0000{ending}"))
    for path in labels.glob(f"*{ending}"):
        if not path.name.startswith("."):
            names.add(path.name.removesuffix(ending))
    return [
        Files(
            name,
            tuple(images / f"{name}_{i:04}{ending}" for i in range(len(channel_names))),
            labels / f"{name}{ending}",
        )
        for name in sorted(names)
    ]


def split_name(file_name):
    """Returns the name and the ending of a NIfTI file."""
    name = re.sub(r"\.nii(\.gz)?$", "", file_name)
    return name, file_name.removeprefix(name)
