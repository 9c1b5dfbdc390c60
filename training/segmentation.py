"""Segmentation of volumes: loss, scores, the model for servers, and predictions."""

import re
import sys

import keras
import numpy as np
from keras import ops

from revnet_tf._files import replacing
from training import nifti
from training.volumes import UNLABELED, split_name, statistics
from training.windows import SlidingWindow


class DiceCrossEntropy(keras.losses.Loss):
    """Dice loss of the classes other than the background, plus cross-entropy.

    The classes are integers `(batch, x, y, z)`. Voxels of the class `UNLABELED` do not
    count.
    """

    def call(self, y_true, y_pred):
        axes = tuple(range(1, len(y_pred.shape) - 1))
        labeled = ops.cast(ops.not_equal(y_true, UNLABELED), y_pred.dtype)
        entropy = keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True, ignore_class=UNLABELED
        )
        count = ops.maximum(ops.sum(labeled, axes), 1)
        truth = ops.one_hot(ops.cast(y_true, "int32"), y_pred.shape[-1])
        found = ops.softmax(y_pred) * labeled[..., None]
        dice = keras.losses.dice(truth[..., 1:], found[..., 1:], axis=axes)
        return ops.sum(entropy, axes) / count + ops.mean(dice, axis=-1)


class CrossEntropy(keras.metrics.Mean):
    """The mean cross-entropy of the labeled voxels."""

    def __init__(self, from_logits, **kwargs):
        super().__init__(**kwargs)
        self.from_logits = from_logits

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true = ops.cast(y_true, y_pred.dtype)
        entropy = keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, self.from_logits, ignore_class=UNLABELED
        )
        super().update_state(entropy, ops.not_equal(y_true, UNLABELED))


class Dice(keras.metrics.IoU):
    """The Dice score of classes, over all voxels that the metric has seen.

    The score of several classes is the mean over those that occur.
    """

    def result(self):
        right = ops.diag(self.total_cm)
        total = ops.sum(self.total_cm, 0) + ops.sum(self.total_cm, 1)
        right, total = (ops.take(x, self.target_class_ids) for x in (right, total))
        # The score of a class that does not occur is 0 of 1.
        dice = 2 * right / ops.maximum(total, 1)
        return ops.sum(dice) / ops.maximum(ops.sum(ops.cast(total > 0, "float32")), 1)


def metrics(classes, from_logits):
    """Returns the metrics of a segmentation, of logits or of probabilities."""
    found = [CrossEntropy(from_logits, name="cross_entropy")]
    names = {"dice": range(1, classes)} | {f"dice_{i}": [i] for i in range(1, classes)}
    for name, ids in names.items():
        # The sum of integers would overflow.
        found.append(Dice(classes, ids, name, "float32", sparse_y_pred=False))
    return found


def serving_model(task, network):
    """Returns the model from a volume at the run's spacing to probabilities."""
    volume = keras.Input(
        batch_shape=(1, None, None, None, network.input_shape[-1]), name="volume"
    )
    windows = SlidingWindow(
        network, task.normalization, name="probabilities", dtype="float32"
    )
    return keras.Model(volume, windows(volume), name=f"{network.name}_serving")


def evaluate(task, model, volumes, picture=None):
    """Returns the scores of a serving model on whole test volumes, by their names.

    With the path of a picture, the function draws the first volume.
    """
    found = metrics(model.output_shape[-1], from_logits=False)
    windows = model.layers[-1]
    for volume in volumes.test:
        labels, truth = [], volume.label
        for planes in windows.planes(volume.image, volume.mean, volume.deviation):
            begin = sum(map(len, labels))
            labels.append(planes.argmax(-1))
            for metric in found:
                metric.update_state(truth[begin : begin + len(planes)], planes)
        if picture and volume is volumes.test[0]:
            draw_slices(picture, volumes, volume, np.concatenate(labels))
    values = {metric.name: float(metric.result()) for metric in found}
    return {name: values[key] for name, key in task.scores(volumes.class_names).items()}


def draw_slices(path, volumes, volume, found):
    """Draws image, truth and prediction `found` of a volume in three planes."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    image, truth = volume.image[..., 0], np.array(volume.label)
    labeled = (truth != UNLABELED) & (truth > 0)
    classes = len(volumes.class_names)
    colors = ListedColormap([f"C{i % 10}" for i in range(classes)])
    limits = np.percentile(image, [0.5, 99.5])

    figure = Figure(figsize=(9, 9.5), layout="constrained")
    planes = ("sagittal", "coronal", "axial")
    for axis, row in enumerate(figure.subplots(3, 3)):
        others = [i for i in range(3) if i != axis]
        # The plane with the most voxels of the classes.
        at = int(labeled.sum(axis=tuple(others)).argmax())
        across, up = (volumes.spacing[i] for i in others)
        for axes, title, labels in zip(
            row, ("image", "truth", "prediction"), (None, truth, found), strict=True
        ):
            options = {"origin": "lower", "aspect": up / across}
            gray = np.take(image, at, axis).T
            axes.imshow(gray, cmap="gray", vmin=limits[0], vmax=limits[1], **options)
            if labels is not None:
                labels = np.take(labels, at, axis).T
                hidden = np.ma.masked_where((labels == 0) | (labels >= classes), labels)
                axes.imshow(
                    hidden,
                    cmap=colors,
                    vmin=-0.5,
                    vmax=classes - 0.5,
                    alpha=0.6,
                    interpolation="nearest",
                    **options,
                )
            axes.set(title=title, xticks=[], yticks=[])
        row[0].set_ylabel(planes[axis])
    handles = [
        Patch(color=colors(i), label=name)
        for i, name in enumerate(volumes.class_names)
        if i
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    with replacing(path) as part:
        figure.savefig(part, dpi=100)


def export_options(task, model):
    """Returns the arguments of `export_saved_model` for a serving model."""
    # Two windows along each axis.
    size = [n + 1 for n in task.patch_size]
    shape = (1, *size, model.input_shape[-1])
    labels = ops.cast(ops.argmax(model.output, -1), "uint8")
    return {
        "signatures": {"labels": labels},
        "examples": np.random.default_rng(0).normal(size=shape).astype(np.float32),
    }


def inputs(files, result):
    """Returns the inputs of a prediction, tuples of files by the names of outputs.

    The function reads all files.

    Raises:
        ValueError, OSError: as for `nifti.opened` and `nifti.voxels`, or two volumes
            have one name, or a volume has not all of its channels.
    """
    channels = len(result["channel_names"])
    volumes = {}
    for file in files:
        name, _ = split_name(file.name)
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        of_channel = result["channel_files"] and match
        name, number = (match[1], int(match[2])) if of_channel else (name, None)
        parts = volumes.setdefault(name, {})
        if parts and (number in parts or None in (number, *parts)):
            other = next(iter(parts.values()))
            raise ValueError(
                f"expected a name for each input, found {other} and {file}; rename one."
            )
        parts[number] = file
    found = {}
    for name, parts in volumes.items():
        missing = [f"{i:04}" for i in range(channels) if i not in parts]
        if None not in parts and (missing or len(parts) > channels):
            raise ValueError(
                f"{name}: expected the files of {channels} channel(s), {name}_0000 to "
                f"{name}_{channels - 1:04}, found {', '.join(map(str, parts.values()))}"
                "; give each of them."
            )
        found[f"{name}.nii.gz"] = [parts[number] for number in sorted(parts)]
        folders = {file.parent.resolve() for file in parts.values()}
        if len(folders) > 1:
            raise ValueError(
                f"expected the channels of {name} in one folder, found "
                f"{', '.join(map(str, parts.values()))}; move or rename some."
            )
    print(f"Reading {len(found):,} volumes", file=sys.stderr)
    for of_volume in found.values():
        images = nifti.opened(of_volume, channels)
        for file, image in zip(of_volume, images, strict=True):
            nifti.voxels(file, image)
    return found


def predict(model, inputs, output, result, normalization):
    """Writes the labels of each volume in its own space, as the data set has them."""
    values = np.array(result["label_values"])
    values = values.astype(np.min_scalar_type(values.max()))
    channels = len(result["channel_names"])
    for number, (name, files) in enumerate(inputs.items(), 1):
        images = nifti.opened(files, channels)
        volume = nifti.read(files, images, result["spacing"])
        mean, deviation = statistics(volume.channels, normalization)
        labels, total = [], len(volume.channels)
        for planes in model.layers[-1].planes(volume.channels, mean, deviation):
            labels.append(values[planes.argmax(-1)])
            done = sum(map(len, labels)) / total
            print(f"{name} ({number} of {len(inputs)}): {done:.0%}", file=sys.stderr)
        nifti.write_labels(
            output / name, np.concatenate(labels), volume.affine, images[0]
        )
        print(output / name, flush=True)
