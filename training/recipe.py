"""The description of a training run: a network, a task, an optimizer and a schedule.

Each is a dataclass that owns its fields, and every field is a flag of `training.train`.
A new network, task, optimizer or schedule is a new dataclass in `PARTS`, whose `build`
makes the Keras object.

Only these methods load TensorFlow, so that the command line answers without it.
"""

import dataclasses
import importlib.util
import typing
from typing import Any, NamedTuple

from training.settings import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Settings,
    check,
    setting,
)


@dataclasses.dataclass(frozen=True)
class ResNet(Settings):
    """The paper's ordinary network, `revnet_tf.models.ResNet`."""

    num_blocks: tuple[int, ...] = setting(
        "blocks of each stage.", {"above": 0, "below": 10_001}
    )
    channels: tuple[int, ...] = setting(
        "channels of the stem, then of each stage; of a U-Net, of each level; both "
        "streams together.",
        {"above": 0, "below": 2**14},
    )
    bottleneck: bool = setting(
        "use branches of 1x1, 3x3 and 1x1 convolutions, not of 3x3 convolutions only."
    )

    def __post_init__(self):
        super().__post_init__()
        stages = len(self.num_blocks)
        self.require("num_blocks", stages, "give the blocks of each stage")
        change = (
            f"give the stem's channels, then one number for each of {stages} stages"
        )
        self.require("channels", len(self.channels) == stages + 1, change)

    def build(self, task, images, optimizer):
        """Returns the Keras model, normalized images to logits."""
        from revnet_tf import models

        return getattr(models, type(self).__name__)(
            **vars(self),
            stem="imagenet" if task.dataset == "imagenet2012" else "cifar",
            input_shape=images.image_shape,
            classes=len(images.class_names),
            classifier_activation=None,
            kernel_regularizer=optimizer.kernel_regularizer(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reversible(Settings):
    """A network with reversible blocks."""

    recompute: bool = setting(
        "reconstruct activations in the backward pass, do not store them.", default=True
    )
    fraction_bits: int | None = setting(
        "use fixed-point streams with this number of fraction bits, which are "
        "reconstructed bit for bit; without the flag, floating-point streams.",
        {"at least": 0, "below": 23},
        default=None,
    )


@dataclasses.dataclass(frozen=True)
class RevNet(_Reversible, ResNet):
    """The paper's reversible network, `revnet_tf.models.RevNet`."""


@dataclasses.dataclass(frozen=True)
class iRevNet(_Reversible):
    """The network without any loss up to its head, `revnet_tf.models.iRevNet`."""

    num_blocks: tuple[int, ...] = setting(
        "blocks of each stage.", {"above": 0, "below": 10_001}
    )
    stream_channels: tuple[int, ...] = setting(
        "channels of each stage of an i-RevNet, of one stream.",
        {"above": 3, "below": 2**14},
    )
    strides: tuple[int, ...] = setting(
        "block size of space to depth before each stage of an i-RevNet; 1 for none.",
        {"above": 0, "below": 2**7},
    )
    first_block_size: int = setting(
        "block size of space to depth on the image, before an i-RevNet; 1 for none.",
        {"above": 0, "below": 2**7},
        default=1,
    )
    dropout: float = setting(
        "rate of dropout in each block of an i-RevNet.",
        {"at least": 0, "below": 1},
        default=0.0,
    )
    bottleneck: bool = setting(
        "use branches of 1x1, 3x3 and 1x1 convolutions, not of 3x3 convolutions only.",
        default=False,
    )

    def __post_init__(self):
        super().__post_init__()
        even = self.num_blocks and not any(count % 2 for count in self.num_blocks)
        change = "give an even number of blocks for each stage; two are one RevBlock"
        self.require("num_blocks", even, change)
        change = f"give one number for each of {len(self.num_blocks)} stages"
        for field in ("stream_channels", "strides"):
            same = len(getattr(self, field)) == len(self.num_blocks)
            self.require(field, same, change)

    def build(self, task, images, optimizer):
        """Returns the Keras model, normalized images to logits."""
        from revnet_tf import models

        arguments = dict(vars(self))
        # The published schedule decays all weights.
        regularizer = optimizer.kernel_regularizer()
        return models.iRevNet(
            channels=arguments.pop("stream_channels"),
            **arguments,
            input_shape=images.image_shape,
            classes=len(images.class_names),
            classifier_activation=None,
            kernel_regularizer=regularizer,
            bias_regularizer=regularizer,
        )


@dataclasses.dataclass(frozen=True)
class RevUNet(_Reversible):
    """The partially reversible U-Net, `revnet_tf.models.RevUNet`."""

    channels: tuple[int, ...] = setting(
        "channels of the stem, then of each stage; of a U-Net, of each level; both "
        "streams together.",
        {"above": 0, "below": 2**14},
    )
    encoder_blocks: int = setting(
        "blocks of each level of the encoder of a U-Net.",
        {"above": 0, "below": 10_001},
        default=1,
    )
    decoder_blocks: int = setting(
        "blocks of each level of the decoder of a U-Net.",
        {"above": 0, "below": 10_001},
        default=1,
    )
    norm: str = setting(
        "normalization of a U-Net: group, instance or batch.",
        {"options": ("group", "instance", "batch")},
        default="group",
    )

    def __post_init__(self):
        super().__post_init__()
        self.require("channels", self.channels, "give the channels of each level")

    def build(self, task, images, optimizer):
        """Returns the Keras model, normalized patches to logits of each voxel."""
        from revnet_tf import models

        return models.RevUNet(
            **vars(self),
            input_shape=images.image_shape,
            classes=len(images.class_names),
            classifier_activation=None,
            kernel_regularizer=optimizer.kernel_regularizer(),
        )


@dataclasses.dataclass(frozen=True)
class Task(Settings):
    """The data, the loss and the scores of a recipe, and the use of its network.

    Attributes:
        score: string, the name of the score that the program reports beside the loss.
        error: string, the label of 100 % less this score, in the curves.
        formats: tuple of strings, the formats of `training.export` for its models.
    """

    formats = ("saved_model", "litert", "litert_int8", "onnx")

    dataset: str = setting("name of the data set, or path of a folder of pictures.")
    classes: int | None = setting(
        "number of classes that the data set must have.", COUNT
    )

    def __post_init__(self):
        super().__post_init__()
        change = "give the name of a data set, or the path of a folder of pictures"
        self.require("dataset", self.dataset, change)
        task = DATASET.of(self.dataset)
        self.require("dataset", task is type(self), f"it belongs to {task.__name__}")

    def as_trained(self, result):
        """Returns the task with what a finished run took from its training data."""
        return self

    def load(self, data_dir, skip_corrupt, download, run_dir):
        """Returns the `Images` of the data set, for the arguments of `data.load`."""
        raise NotImplementedError

    def loss(self):
        """Returns the Keras loss of logits."""
        raise NotImplementedError

    def metrics(self, classes, from_logits=True):
        """Returns the Keras metrics of logits, or of probabilities."""
        raise NotImplementedError

    def scores(self, class_names):
        """Returns the names of the metrics by the names that the program reports."""
        raise NotImplementedError

    def serving_model(self, network, images):
        """Returns the model from inputs as they are to probabilities."""
        raise NotImplementedError

    def evaluate(self, model, images, run_dir=None):
        """Returns the scores of a serving model on the test images, by their names.

        With a run folder, the function draws the pictures of this task there.
        """
        raise NotImplementedError

    def export_options(self, model, result):
        """Returns the arguments of `export_saved_model` for a serving model."""
        raise NotImplementedError

    def inputs(self, files, result):
        """Returns the inputs of a prediction: tuples of files, by the names of outputs.

        Raises:
            ValueError, OSError: the network of the run cannot take a file.
        """
        raise NotImplementedError

    def predict(self, model, inputs, output, result):
        """Writes the predictions of a serving model for `inputs` to a folder."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Images of one class each, with cross-entropy."""

    score = "accuracy"
    error = "error, %"

    def load(self, data_dir, skip_corrupt, download, run_dir):
        from training import data

        return data.load_images(self, data_dir, skip_corrupt, download)

    def decoder(self, image_shape):
        """Returns the function from a file to an image, for servers."""
        from revnet_tf.export import decode_image

        return decode_image(image_shape)

    def loss(self):
        import keras

        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def metrics(self, classes, from_logits=True):
        from keras import metrics

        return [
            metrics.SparseCategoricalAccuracy("accuracy"),
            # Keras adds the regularization to the value that it reports as `loss`.
            metrics.SparseCategoricalCrossentropy(
                "cross_entropy", from_logits=from_logits
            ),
        ]

    def scores(self, class_names):
        return {"loss": "cross_entropy", "accuracy": "accuracy"}

    def serving_model(self, network, images):
        from training import classification

        return classification.serving_model(network, images)

    def evaluate(self, model, images, run_dir=None):
        from training import classification

        return classification.evaluate(self, model, images)

    def export_options(self, model, result):
        from training import classification

        return classification.export_options(self, model, result)

    def inputs(self, files, result):
        return {"predictions.csv": files}

    def predict(self, model, inputs, output, result):
        from training import classification

        classification.predict(self, model, inputs, output, result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mirrored(Settings):
    """A task whose images can be mirrored in training."""

    flip: bool = setting(
        "mirror half of the images; volumes, along each axis.", default=False
    )


@dataclasses.dataclass(frozen=True)
class SmallImageClassification(_Mirrored, Classification):
    """Images in memory, normalized, and augmented by crops and flips."""

    image_size: int | None = setting(
        "height and width to which every image is resized; without the flag, images "
        "keep their size, which must be the same for all.",
        {"above": 0, "below": 2**12},
        default=None,
    )
    pad: int = setting(
        "pixels of zeros on each side of an image, before a random crop.",
        {"at least": 0, "below": 33},
        default=0,
    )
    test_in_mean: bool = setting(
        "subtract the mean of training and test images, as the paper's authors do, "
        "not of training images only.",
        default=False,
    )
    standardize: bool = setting(
        "subtract the mean of each channel and divide by its standard deviation; "
        "without the flag, subtract the mean image and divide by 255.",
        default=False,
    )

    def decoder(self, image_shape):
        if self.image_size is None:
            return super().decoder(image_shape)
        from training.images import decode_picture

        height, _, channels = image_shape
        return lambda file: decode_picture(file, channels, height)


@dataclasses.dataclass(frozen=True)
class ImageNetClassification(Classification):
    """Photographs in files, cropped, mirrored and distorted as for Inception."""

    def decoder(self, image_shape):
        from training.imagenet import centre_crop

        return centre_crop


@dataclasses.dataclass(frozen=True)
class Segmentation(_Mirrored, Task):
    """Volumes with a class for each voxel, with Dice loss plus cross-entropy."""

    spacing: tuple[float, ...] = setting(
        "size of a voxel in mm along x, y and z, to which volumes are resampled; "
        "without the flag, the median of the training volumes.",
        POSITIVE,
        default=(),
    )
    patch_size: tuple[int, ...] = setting(
        "voxels of a patch along x, y and z. The network sees one patch at a time.",
        {"above": 0, "below": 2**12},
        default=(64, 64, 64),
    )
    patches_per_volume: int = setting(
        "patches of each training volume in an epoch.", COUNT, default=8
    )
    foreground: float = setting(
        "share of the patches around a voxel of a class other than the background.",
        {"at least": 0, "below": 1.001},
        default=1 / 3,
    )
    normalization: str = setting(
        "subtract the mean and divide by the standard deviation of each channel, or "
        "of the whole volume; voxels of intensity 0 do not count.",
        {"options": ("channel", "volume")},
        default="channel",
    )

    formats = ("saved_model",)
    score = "dice"
    error = "100 - Dice, %"

    def __post_init__(self):
        super().__post_init__()
        three = "give three numbers, for x, y and z"
        self.require("spacing", len(self.spacing) in (0, 3), three)
        self.require("patch_size", len(self.patch_size) == 3, three)

    def as_trained(self, result):
        return dataclasses.replace(self, spacing=tuple(result["spacing"]))

    def _check_packages(self):
        self.require(
            "dataset",
            all(map(importlib.util.find_spec, ("nibabel", "nilearn"))),
            "it needs the packages nibabel and nilearn; install the extra `volumes`",
        )

    def load(self, data_dir, skip_corrupt, download, run_dir):
        self._check_packages()
        from training import volumes

        return volumes.load(self, data_dir, run_dir / "volumes", skip_corrupt)

    def loss(self):
        from training import segmentation

        return segmentation.DiceCrossEntropy()

    def metrics(self, classes, from_logits=True):
        from training import segmentation

        return segmentation.metrics(classes, from_logits)

    def scores(self, class_names):
        of_classes = {
            f"dice_{name}": f"dice_{i}" for i, name in enumerate(class_names) if i
        }
        return {"loss": "cross_entropy", "dice": "dice"} | of_classes

    def serving_model(self, network, images):
        from training import segmentation

        return segmentation.serving_model(self, network)

    def evaluate(self, model, images, run_dir=None):
        from training import segmentation

        picture = run_dir and run_dir / "slices.png"
        return segmentation.evaluate(self, model, images, picture)

    def export_options(self, model, result):
        from training import segmentation

        return segmentation.export_options(self, model)

    def inputs(self, files, result):
        self._check_packages()
        from training import segmentation

        return segmentation.inputs(files, result)

    def predict(self, model, inputs, output, result):
        from training import segmentation

        segmentation.predict(model, inputs, output, result, self.normalization)


class Optimizer(Settings):
    """Base class of optimizers."""

    def kernel_regularizer(self):
        """Returns the Keras regularizer of kernels that is part of the loss, or `None`.

        The weight decay of Keras's optimizers is decoupled from the gradient.
        """
        return None


@dataclasses.dataclass(frozen=True)
class _Penalized(Optimizer):
    """An optimizer with weight decay as a penalty in the loss."""

    weight_decay: float = setting(
        "w * weight_decay is added to the gradient of each conv and dense kernel w, in "
        "an i-RevNet of each weight.",
        NOT_NEGATIVE,
    )

    def kernel_regularizer(self):
        import keras

        # The gradient of c * w**2 is 2 * c * w.
        return keras.regularizers.L2(self.weight_decay / 2)


@dataclasses.dataclass(frozen=True)
class SGD(_Penalized):
    """SGD with momentum."""

    momentum: float = setting(
        "momentum of SGD.", {"at least": 0, "below": 1}, default=0.9
    )

    def build(self, learning_rate):
        import keras

        return keras.optimizers.SGD(learning_rate, self.momentum)


@dataclasses.dataclass(frozen=True)
class Adam(_Penalized):
    """Adam, with Keras's defaults for its moments."""

    def build(self, learning_rate):
        import keras

        return keras.optimizers.Adam(learning_rate)


@dataclasses.dataclass(frozen=True)
class Schedule(Settings):
    """The learning rate as a function of the step."""

    learning_rate: float = setting(
        "learning rate of the first step; with a warm-up, the highest rate.", POSITIVE
    )

    def check_steps(self, train_steps: int) -> None:
        """Raises `ValueError` if the schedule does not fit the steps of a run."""

    def unreached_steps(self, train_steps: int) -> list[int]:
        """Returns the steps of the schedule that a run does not reach."""
        return []


@dataclasses.dataclass(frozen=True)
class Piecewise(Schedule):
    """A learning rate that falls by a factor at each of the decay steps."""

    decay_steps: tuple[int, ...] = setting(
        "steps at which a piecewise learning rate falls.", COUNT, default=()
    )
    decay_factor: float = setting(
        "factor of a piecewise learning rate at each of the decay steps.",
        {"above": 0, "below": 1},
        default=0.1,
    )

    def __post_init__(self):
        super().__post_init__()
        is_sorted = list(self.decay_steps) == sorted(set(self.decay_steps))
        self.require("decay_steps", is_sorted, "give the steps in increasing order")

    def unreached_steps(self, train_steps):
        return [step for step in self.decay_steps if step >= train_steps]

    def build(self, train_steps):
        import keras

        if not self.decay_steps:
            return self.learning_rate
        return keras.optimizers.schedules.PiecewiseConstantDecay(
            # A boundary is the last step of the rate before it.
            [step - 1 for step in self.decay_steps],
            [
                self.learning_rate * self.decay_factor**i
                for i in range(len(self.decay_steps) + 1)
            ],
        )


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """A learning rate that rises in the warm-up, then falls along half a cosine."""

    warmup_steps: int = setting(
        "steps in which a cosine schedule rises.",
        {"at least": 0, "below": 2**31},
        default=0,
    )

    def check_steps(self, train_steps):
        change = f"use less than train_steps={train_steps}"
        self.require("warmup_steps", self.warmup_steps < train_steps, change)

    def build(self, train_steps):
        import keras

        return keras.optimizers.schedules.CosineDecay(
            0.0 if self.warmup_steps else self.learning_rate,
            train_steps - self.warmup_steps,
            warmup_target=self.learning_rate if self.warmup_steps else None,
            warmup_steps=self.warmup_steps,
        )


PARTS = {
    "network": (ResNet, RevNet, iRevNet, RevUNet),
    "task": (SmallImageClassification, ImageNetClassification, Segmentation),
    "optimizer": (SGD, Adam),
    "schedule": (Piecewise, Cosine),
}


class Choice(NamedTuple):
    """A flag that chooses the class of a part.

    Fields that both classes have keep their values.

    Attributes:
        flag: string, the name of the flag.
        help: string, its help text.
        classes: dictionary, the class of each value of the flag.
        other: the class of every other value, or `None` if there is no other.
    """

    flag: str
    help: str
    classes: dict[Any, type[Settings]]
    other: type[Settings] | None = None

    @property
    def kind(self) -> type:
        """The type of the values."""
        return type(next(iter(self.classes)))

    @property
    def options(self) -> tuple:
        """All possible values; empty if every value is possible."""
        return () if self.other else tuple(self.classes)

    def of(self, value: Any) -> type[Settings]:
        """Returns the class of a value; raises `ValueError` if there is none."""
        check(self.flag, value, self.kind, {"options": self.options})
        return self.classes.get(value, self.other)

    def decides(self, cls: type[Settings]) -> bool:
        """Returns whether the flag chooses between a class and others."""
        return cls in (*self.classes.values(), self.other)


DATASET = Choice(
    "dataset",
    "digits (part of scikit-learn), an image classification data set of TFDS such as "
    "cifar10 or imagenet2012, or a folder with a folder of pictures for each class. "
    "For a U-Net: brain (part of nilearn), or decathlon, a folder of volumes.",
    {
        "imagenet2012": ImageNetClassification,
        "brain": Segmentation,
        "decathlon": Segmentation,
    },
    other=SmallImageClassification,
)
CHOICES = (
    Choice(
        "reversible",
        "use a RevNet, or its matched ResNet.",
        {True: RevNet, False: ResNet},
    ),
    DATASET,
    Choice(
        "schedule",
        "piecewise (falls at each of the decay steps) or cosine (rises from 0 in the "
        "warm-up, and falls to 0 at the end).",
        {"piecewise": Piecewise, "cosine": Cosine},
    ),
)


@dataclasses.dataclass(frozen=True)
class Recipe(Settings):
    """One training run."""

    network: Settings
    task: Settings
    optimizer: Settings
    schedule: Settings
    global_batch_size: int = setting("images per step, over all replicas.", COUNT)
    train_steps: int = setting("steps of the whole run; need not be epochs.", COUNT)
    seed: int = setting(
        "seed of the initial weights, and of order and augmentation of the images.",
        # The range of NumPy's seeds, which Keras sets, too.
        {"at least": 0, "below": 2**32},
        default=0,
    )
    precision: str = setting(
        "float32, or mixed_bfloat16 or mixed_float16: branches compute in 16 bits, "
        "streams and weights are float32, and the loss is scaled for float16.",
        {"options": ("float32", "mixed_bfloat16", "mixed_float16")},
        default="float32",
    )
    jit: bool | None = setting(
        "compile the step with XLA; without the flag, Keras decides: on one GPU only.",
        default=None,
    )
    deterministic: bool = setting(
        "make two runs equal bit for bit; with fixed-point streams, also a run that "
        "reconstructs activations and a run that stores them.",
        default=False,
    )

    def __post_init__(self):
        super().__post_init__()
        volumes = isinstance(self.task, Segmentation)
        self.task.require(
            "dataset",
            volumes == isinstance(self.network, RevUNet),
            f"a {type(self.network).__name__} needs a data set of "
            f"{'images with one class each' if volumes else 'volumes'}; choose such a "
            "data set, or another recipe",
        )
        self.schedule.check_steps(self.train_steps)

    def parts(self) -> dict[str, Settings]:
        """Returns the network, the task, the optimizer and the schedule."""
        return {name: getattr(self, name) for name in PARTS}

    def values(self) -> dict[str, Any]:
        """Returns the values of all flags of the recipe, by their names."""
        found = {}
        for part in (*self.parts().values(), self):
            for choice in CHOICES:
                for value, cls in choice.classes.items():
                    if cls is type(part):
                        found[choice.flag] = value
            found |= {f.name: getattr(part, f.name) for f in part.settings()}
        return found

    def replace(self, **changes: Any) -> "Recipe":
        """Returns the recipe with other values of its flags.

        Raises:
            TypeError: the recipe has no such flag.
            ValueError: a value is impossible.
        """
        parts, own = {}, dict(changes)
        for name, part in self.parts().items():
            cls, values = type(part), vars(part) | changes
            for choice in CHOICES:
                if choice.flag in changes and choice.decides(cls):
                    cls = choice.of(own.pop(choice.flag))
            fields = [f.name for f in cls.settings() if f.name in values]
            parts[name] = cls(**{field: values[field] for field in fields})
            own = {field: own[field] for field in own if field not in fields}
        return dataclasses.replace(self, **parts, **own)

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as an object for a JSON file."""
        parts = {
            name: {"kind": type(part).__name__} | vars(part)
            for name, part in self.parts().items()
        }
        return vars(self) | parts

    @classmethod
    def from_json(cls, content):
        if not any(isinstance(content.get(name), dict) for name in PARTS):
            content = _with_parts(content)
        parts = {}
        for name in PARTS.keys() & content.keys():
            kinds = {kind.__name__: kind for kind in PARTS[name]}
            try:
                if not isinstance(content[name], dict):
                    raise ValueError(f"expected an object, found {content[name]!r}")
                fields = {"kind": None} | content[name]
                check("kind", fields["kind"], str, {"options": tuple(kinds)})
                parts[name] = kinds[fields.pop("kind")].from_json(fields)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return super().from_json(content | parts)


def _with_parts(content):
    """Returns today's form of a `recipe.json` from before recipes had parts."""
    # One object held every field, including the fields of other choices.
    content = {"schedule": "piecewise"} | content
    parts = {}
    for name, (cls, *_) in PARTS.items():
        for choice in CHOICES:
            if choice.decides(cls):
                if choice.flag not in content:
                    raise ValueError(f"the field {choice.flag!r} is missing")
                cls = choice.of(content[choice.flag])
        fields = {f.name: content[f.name] for f in cls.settings() if f.name in content}
        parts[name] = {"kind": cls.__name__} | fields
    own = [field.name for field in Recipe.settings()]
    rest = {k: v for k, v in content.items() if k in own or k not in flags()}
    return rest | parts


def flags() -> dict[str, tuple[Any, str, tuple]]:
    """Returns the flags of all recipes: type, help text and possible values by name."""
    found = {}
    for choice in CHOICES:
        found[choice.flag] = (choice.kind, choice.help, choice.options)
    for cls in (*(cls for classes in PARTS.values() for cls in classes), Recipe):
        kinds = typing.get_type_hints(cls)
        for field in cls.settings():
            found.setdefault(
                field.name, (kinds[field.name], field.metadata["help"], ())
            )
    return found
