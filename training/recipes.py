"""The named recipes: one for each reproduced result."""

from training.recipe import Recipe

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
