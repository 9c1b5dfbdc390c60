"""The description of a training run: dataclasses whose fields are flags.

No TensorFlow here, so that the command line answers before it is loaded.
"""

import dataclasses
import operator
import types
import typing

DATASETS = ("digits", "cifar10", "cifar100", "imagenet2012")
SCHEDULES = ("piecewise", "cosine")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

COUNT = {"above": 0, "below": 2**31}
# The largest float32 is 3.4e38.
POSITIVE = {"above": 0, "below": 3e38}
NOT_NEGATIVE = {"at least": 0, "below": 3e38}

_BOUNDS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt}


def setting(help, limits=None, **default):
    """Returns a dataclass field with the help text of its flag.

    Args:
        help: string, the help text.
        limits: dictionary, as for `check`.
        **default: `default`, the default value. A field without one is required.
    """
    return dataclasses.field(metadata={"help": help, "limits": limits or {}}, **default)


def check(name, value, kind, limits):
    """Raises `ValueError` unless a value has the right type and is within limits.

    Args:
        name: string, the name of the value.
        value: the value.
        kind: type, one of `int`, `float`, `bool`, `str`, `tuple[kind, ...]` and
            `kind | None`.
        limits: dictionary of bounds, at the keys `"above"`, `"at least"` and `"below"`,
            or of all possible values, at the key `"options"`. They are for each element
            of a tuple.
    """
    if isinstance(kind, types.UnionType):
        kind, _ = typing.get_args(kind)
        if value is None:
            return
    is_list = typing.get_origin(kind) is tuple
    if is_list:
        kind, _ = typing.get_args(kind)
    options = limits.get("options")
    bounds = {word: limits[word] for word in limits if word in _BOUNDS}
    if options:
        wanted = f"one of {', '.join(options)}"
    elif kind in (int, float):
        wanted = f"a number {' and '.join(f'{w} {bounds[w]}' for w in bounds)}"
        wanted += ", an integer" if kind is int else ""
    else:
        wanted = {bool: "true or false", str: "a string"}[kind]

    def possible(element):
        # `bool` is a subclass of `int`, and an int stands for a float.
        return (
            type(element) in (kind, int if kind is float else kind)
            and (not options or element in options)
            and all(_BOUNDS[word](element, bounds[word]) for word in bounds)
        )

    elements = value if is_list and isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) != is_list or not all(map(possible, elements)):
        wanted = f"a list, each element {wanted}" if is_list else wanted
        raise ValueError(f"{name}={value!r}: use {wanted}.")


class Settings:
    """A dataclass whose fields are made by `setting`, and checked."""

    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            limits = field.metadata["limits"]
            check(field.name, getattr(self, field.name), kinds[field.name], limits)

    def require(self, field, condition, change):
        """Raises `ValueError` with what to change, unless a condition is met."""
        if not condition:
            raise ValueError(f"{field}={getattr(self, field)!r}: {change}.")

    @classmethod
    def from_json(cls, content):
        """Returns the instance whose fields a JSON object has.

        A field that is not there has its default: the object may be older than it.

        Raises:
            ValueError: a field is unknown, has an impossible value, or is missing and
                has no default.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        for name in content.keys() - fields:
            raise ValueError(f"this version has no field {name!r}")
        for name, default in fields.items():
            if default is dataclasses.MISSING and name not in content:
                raise ValueError(f"the field {name!r} is missing")
        tuples = {k: tuple(v) for k, v in content.items() if isinstance(v, list)}
        return cls(**content | tuples)


@dataclasses.dataclass(frozen=True)
class Recipe(Settings):
    """One training run. Every field is a flag of `python -m training.train`."""

    dataset: str = setting(
        "digits (part of scikit-learn), or, from TFDS, cifar10, cifar100 or "
        "imagenet2012.",
        {"options": DATASETS},
    )
    classes: int = setting("number of classes of the data set.", COUNT)
    reversible: bool = setting("use a RevNet, or its matched ResNet.")
    num_blocks: tuple[int, ...] = setting(
        "blocks of each stage.", {"above": 0, "below": 10_001}
    )
    channels: tuple[int, ...] = setting(
        "channels of the stem, then of each stage; both streams together.",
        {"above": 0, "below": 2**15},
    )
    bottleneck: bool = setting(
        "use branches of 1x1, 3x3, 1x1 convolutions, not of two 3x3 ones."
    )
    global_batch_size: int = setting("images per step, over all replicas.", COUNT)
    learning_rate: float = setting(
        "learning rate of the first step; with a warm-up, the highest one.", POSITIVE
    )
    train_steps: int = setting("steps of the whole run; need not be epochs.", COUNT)
    weight_decay: float = setting(
        "w * weight_decay is added to the gradient of each conv and dense kernel w.",
        NOT_NEGATIVE,
    )
    pad: int = setting(
        "pixels of zeros on each side of an image, of which a random crop is taken.",
        {"at least": 0, "below": 2**15},
        default=0,
    )
    flip: bool = setting("mirror half of the images.", default=False)
    test_in_mean: bool = setting(
        "subtract the mean of training and test images, as the paper's authors do, "
        "not of training images only.",
        default=False,
    )
    schedule: str = setting(
        "piecewise (a tenth of the learning rate from each of the decay steps on) or "
        "cosine (up from 0 in the warm-up, then down to 0 at the end).",
        {"options": SCHEDULES},
        default="piecewise",
    )
    decay_steps: tuple[int, ...] = setting(
        "steps from which on a piecewise learning rate is a tenth of its last value.",
        COUNT,
        default=(),
    )
    warmup_steps: int = setting(
        "steps in which a cosine schedule rises.",
        {"at least": 0, "below": 2**31},
        default=0,
    )
    momentum: float = setting(
        "momentum of SGD.", {"at least": 0, "below": 1}, default=0.9
    )
    recompute: bool = setting(
        "reconstruct activations of a RevNet in the backward pass, not store them.",
        default=True,
    )
    fraction_bits: int | None = setting(
        "use fixed-point streams with this number of fraction bits, which a RevNet "
        "reconstructs bit for bit; without the flag, floating-point streams.",
        {"at least": 0, "below": 23},
        default=None,
    )
    seed: int = setting(
        "seed of the initial weights, and of order and augmentation of the images.",
        # The range of NumPy's seeds, which Keras sets, too.
        {"at least": 0, "below": 2**32},
        default=0,
    )
    precision: str = setting(
        "float32, or mixed_bfloat16 or mixed_float16: branches compute in 16 bits, "
        "streams and weights are float32, and the loss is scaled for float16.",
        {"options": PRECISIONS},
        default="float32",
    )
    jit: bool | None = setting(
        "compile the step with XLA; without the flag, Keras decides: on one GPU only.",
        default=None,
    )
    deterministic: bool = setting(
        "make two runs equal bit for bit; with fixed-point streams, also one that "
        "reconstructs activations and one that stores them.",
        default=False,
    )

    def __post_init__(self):
        super().__post_init__()
        require = self.require
        require("num_blocks", self.num_blocks, "give the blocks of each stage")
        require(
            "channels",
            len(self.channels) == len(self.num_blocks) + 1,
            "give the stem's channels, then those of each of the "
            f"{len(self.num_blocks)} stages",
        )
        require(
            "decay_steps",
            list(self.decay_steps) == sorted(set(self.decay_steps)),
            "give the steps in increasing order",
        )
        for field, schedule in (
            ("decay_steps", "piecewise"),
            ("warmup_steps", "cosine"),
        ):
            used = self.schedule == schedule
            change = f"of use with schedule={schedule!r} only"
            require(field, used or not getattr(self, field), change)
        change = f"use less than train_steps={self.train_steps}"
        require("warmup_steps", self.warmup_steps < self.train_steps, change)
        fixed_point = self.fraction_bits is not None
        change = "of use with a reversible network only"
        require("fraction_bits", self.reversible or not fixed_point, change)
        if self.dataset == "imagenet2012":
            for field in ("pad", "flip", "test_in_mean"):
                change = "not for imagenet2012, which is prepared in its own way"
                require(field, not getattr(self, field), change)

    def unreached_steps(self):
        """Returns the decay steps that the run does not reach."""
        return [step for step in self.decay_steps if step >= self.train_steps]
