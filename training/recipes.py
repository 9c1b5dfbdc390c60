"""What is trained and how: a dataclass, and one named recipe per reproduced result.

No TensorFlow here, so that the command line answers before it is loaded.
"""

import dataclasses
import math

DATASETS = ("digits", "cifar10", "cifar100", "imagenet2012")
SCHEDULES = ("piecewise", "cosine")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run. Every field is a flag of `python -m training.train`.

    Args:
        dataset: `"digits"` (inside scikit-learn), or, from TFDS, `"cifar10"`,
            `"cifar100"` or `"imagenet2012"`.
        classes: number of classes; the data set must have as many.
        reversible: whether the network is a RevNet, or its matched ResNet.
        num_blocks: blocks per stage.
        channels: channels of the stem, then of each stage; both streams together.
        bottleneck: whether branches are 1x1, 3x3, 1x1 rather than two 3x3.
        recompute: whether a RevNet rebuilds activations in the backward pass instead
            of storing them. A ResNet always stores them.
        fraction_bits: of the streams of a RevNet as fixed-point numbers, which are
            rebuilt bit for bit; floating-point ones if not given.
        global_batch_size: images per step, over all replicas.
        learning_rate: of the first step, or, with a warm-up, the highest.
        schedule: `"piecewise"` (divided by ten at each of `decay_steps`), or
            `"cosine"` (up from 0 over `warmup_steps`, then down to 0 at the end).
        decay_steps: steps from which a piecewise learning rate is a tenth of what it
            was.
        warmup_steps: steps over which a cosine schedule rises.
        momentum: of SGD.
        weight_decay: `w * weight_decay` is added to the gradient of each conv and
            dense kernel `w`.
        train_steps: steps of the whole run; need not be whole epochs.
        pad: pixels of zeros on each side, from which a random crop is taken. (Those of
            ImageNet are cropped, mirrored and distorted as for Inception.)
        flip: whether half of the images are mirrored.
        test_in_mean: whether the mean image that is subtracted is that of training and
            test images, as the authors have it, rather than of training images.
        seed: of the initial weights and of the order and augmentation of the images.
        precision: `"float32"`, or `"mixed_bfloat16"` or `"mixed_float16"`, where
            branches compute in 16 bits, streams and weights are float32, and, for
            float16, the loss is scaled.
        jit: whether XLA compiles the step. If not given, as Keras does: on one GPU.
        deterministic: whether two runs are equal bit for bit, also one that stores
            activations and one that rebuilds fixed-point streams.
    """

    dataset: str
    classes: int
    reversible: bool
    num_blocks: tuple[int, ...]
    channels: tuple[int, ...]
    bottleneck: bool
    global_batch_size: int
    learning_rate: float
    train_steps: int
    weight_decay: float
    pad: int = 0
    flip: bool = False
    test_in_mean: bool = False
    schedule: str = "piecewise"
    decay_steps: tuple[int, ...] = ()
    warmup_steps: int = 0
    momentum: float = 0.9
    recompute: bool = True
    fraction_bits: int | None = None
    seed: int = 0
    precision: str = "float32"
    jit: bool | None = None
    deterministic: bool = False

    def __post_init__(self):
        def require(field, condition, change):
            if not condition:
                raise ValueError(f"{field}={getattr(self, field)!r}: {change}.")

        require("dataset", self.dataset in DATASETS, f"use one of {DATASETS}")
        require("num_blocks", self.num_blocks, "give the blocks of each stage")
        require(
            "channels",
            len(self.channels) == len(self.num_blocks) + 1,
            "give the stem's channels, then those of each of the "
            f"{len(self.num_blocks)} stages",
        )
        for field in ("num_blocks", "channels", "decay_steps"):
            positive = all(value > 0 for value in getattr(self, field))
            require(field, positive, "use numbers above 0")
        require(
            "decay_steps",
            list(self.decay_steps) == sorted(set(self.decay_steps)),
            "give the steps in increasing order",
        )
        for field in ("classes", "global_batch_size", "train_steps", "learning_rate"):
            value = getattr(self, field)
            require(field, 0 < value < math.inf, "use a number above 0")
        for field, options in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            possible = getattr(self, field) in options
            require(field, possible, f"use one of {', '.join(options)}")
        for field, schedule in (
            ("decay_steps", "piecewise"),
            ("warmup_steps", "cosine"),
        ):
            used = self.schedule == schedule
            change = f"of use with schedule={schedule!r} only"
            require(field, used or not getattr(self, field), change)
        require(
            "warmup_steps",
            self.warmup_steps < self.train_steps,
            "use less than train_steps",
        )
        for field in ("weight_decay", "pad", "warmup_steps"):
            value = getattr(self, field)
            require(field, 0 <= value < math.inf, "use 0 or more")
        if self.fraction_bits is not None:
            change = "use a number from 0 to 22, and a reversible network"
            possible = 0 <= self.fraction_bits <= 22 and self.reversible
            require("fraction_bits", possible, change)
        if self.dataset == "imagenet2012":
            for field in ("pad", "flip", "test_in_mean"):
                change = "not for imagenet2012, which is prepared in its own way"
                require(field, not getattr(self, field), change)
        require("momentum", 0 <= self.momentum < 1, "use a number from 0 to below 1")
        # The seeds of NumPy, which Keras sets too, end there.
        require("seed", 0 <= self.seed < 2**32, "use a number from 0 to 2**32 - 1")


# Gomez et al., 2017, https://arxiv.org/abs/1707.04585; the numbers are those of the
# authors' published configuration, https://github.com/renmengye/revnet-public,
# resnet/configs/cifar_configs.py. A step of RevNet-38 takes 0.55 s on two cores of an
# AMD EPYC, the whole run 12 hours; one of ResNet-32 0.33 s.
_CIFAR = {
    "global_batch_size": 100,
    "learning_rate": 0.1,
    "decay_steps": (40_000, 60_000),
    "train_steps": 80_000,  # 160 epochs of 50,000 images
    "weight_decay": 2e-4,
    "pad": 2,  # not the usual 4
    "flip": True,
}

# reversible, num_blocks, channels, bottleneck: the rows of `revnet_tf.models.VARIANTS`,
# which a test compares. Above each, the paper's test error in percent on CIFAR-10 and
# on CIFAR-100, and that of an independent rerun.
CIFAR_NETWORKS = {
    # 7.14, 29.95; rerun 7.26, 30.90
    "resnet32": (False, (5, 5, 5), (16, 16, 32, 64), False),
    # 7.24, 28.96; rerun 6.86, 28.83. 112 channels, where the deeper RevNets have 128
    "revnet38": (True, (3, 3, 3), (32, 32, 64, 112), False),
    # 5.74, 26.44; rerun 6.01, 26.70
    "resnet110": (False, (18, 18, 18), (16, 16, 32, 64), False),
    # 5.76, 25.40; rerun 5.98, 26.00
    "revnet110": (True, (9, 9, 9), (32, 32, 64, 128), False),
    # 5.24, 23.37; rerun 5.43, 23.21
    "resnet164": (False, (18, 18, 18), (16, 16, 32, 64), True),
    # 5.17, 23.69; rerun 5.44, 23.61
    "revnet164": (True, (9, 9, 9), (32, 32, 64, 128), True),
}

# The same source, resnet/configs/imagenet_configs.py.
_IMAGENET = {
    "global_batch_size": 256,  # on 4 GPUs
    "learning_rate": 0.1,
    "decay_steps": (160_000, 320_000, 480_000),
    "train_steps": 600_000,  # 120 epochs of 1,281,167 images
    "weight_decay": 1e-4,
}

# As above, with the paper's top-1 error in percent of a single crop, where it has one.
IMAGENET_NETWORKS = {
    "resnet50": (False, (3, 4, 6, 3), (64, 64, 128, 256, 512), True),
    "revnet56": (True, (2, 2, 3, 2), (128, 128, 256, 512, 832), True),
    # 23.01
    "resnet101": (False, (3, 4, 23, 3), (64, 64, 128, 256, 512), True),
    # 23.10
    "revnet104": (True, (2, 2, 11, 2), (128, 128, 256, 512, 832), True),
}

# No row of the paper: as far as some 40 minutes on two CPU cores go. Two epochs of
# ResNet-32 with this shape of schedule, one seed each: 70.9 % of the test images with a
# highest learning rate of 0.1, 70.5 % with 0.3.
_SHORT = {
    "global_batch_size": 100,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "warmup_steps": 1_000,
    "train_steps": 4_500,  # 9 epochs
    "weight_decay": 2e-4,
    "pad": 2,
    "flip": True,
}

RECIPES = {
    # No row of the paper. Three seeds: 98.3 to 99.4 % of the held-out digits, in
    # less than a minute each on two CPU cores. Mirrored digits are other signs, hence
    # no flip.
    "digits_revnet": Recipe(
        dataset="digits",
        classes=10,
        reversible=True,
        num_blocks=(2, 2),
        channels=(32, 32, 64),
        bottleneck=False,
        global_batch_size=50,
        learning_rate=0.1,
        decay_steps=(560, 784),
        train_steps=896,  # 32 epochs of 28 steps
        weight_decay=2e-4,
        pad=1,
        flip=False,
    ),
    **{
        f"cifar{classes}_{network}": Recipe(f"cifar{classes}", classes, *row, **_CIFAR)
        for classes in (10, 100)
        for network, row in CIFAR_NETWORKS.items()
    },
    **{
        f"imagenet_{network}": Recipe("imagenet2012", 1000, *row, **_IMAGENET)
        for network, row in IMAGENET_NETWORKS.items()
    },
    **{
        f"cifar10_{network}_short": Recipe(
            "cifar10", 10, *CIFAR_NETWORKS[network], **_SHORT
        )
        for network in ("revnet38", "resnet32")
    },
}
