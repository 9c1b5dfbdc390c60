"""The named recipes: the paper's results, short runs, and data of one's own."""

from training.recipe import (
    SGD,
    Adam,
    Cosine,
    ImageNetClassification,
    Piecewise,
    Recipe,
    ResNet,
    RevNet,
    RevUNet,
    Segmentation,
    SmallImageClassification,
    iRevNet,
)

# The paper's networks, as in `VARIANTS` of `revnet_tf.models.residual`; a test compares
# both. Above each, the paper's test error in percent on CIFAR-10 and on CIFAR-100, and
# the test error of an independent rerun.
CIFAR_NETWORKS = {
    # 7.14, 29.95; rerun 7.26, 30.90
    "resnet32": ResNet((5, 5, 5), (16, 16, 32, 64), False),
    # 7.24, 28.96; rerun 6.86, 28.83. 112 channels, where the deeper RevNets have 128
    "revnet38": RevNet((3, 3, 3), (32, 32, 64, 112), False),
    # 5.74, 26.44; rerun 6.01, 26.70
    "resnet110": ResNet((18, 18, 18), (16, 16, 32, 64), False),
    # 5.76, 25.40; rerun 5.98, 26.00
    "revnet110": RevNet((9, 9, 9), (32, 32, 64, 128), False),
    # 5.24, 23.37; rerun 5.43, 23.21
    "resnet164": ResNet((18, 18, 18), (16, 16, 32, 64), True),
    # 5.17, 23.69; rerun 5.44, 23.61
    "revnet164": RevNet((9, 9, 9), (32, 32, 64, 128), True),
}

# Above each, the paper's top-1 error of a single crop in percent, if the paper has it.
IMAGENET_NETWORKS = {
    "resnet50": ResNet((3, 4, 6, 3), (64, 64, 128, 256, 512), True),
    "revnet56": RevNet((2, 2, 3, 2), (128, 128, 256, 512, 832), True),
    # 23.01
    "resnet101": ResNet((3, 4, 23, 3), (64, 64, 128, 256, 512), True),
    # 23.10
    "revnet104": RevNet((2, 2, 11, 2), (128, 128, 256, 512, 832), True),
}

# The networks of Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088, as in
# `VARIANTS` of `revnet_tf.models.irevnet`; a test compares both. Above each, the
# accuracy of its sources in percent.
IREVNETS = {
    # about 94.5 on CIFAR-10
    "irevnet163": iRevNet((18, 18, 18), (16, 64, 256), (1, 2, 2), dropout=0.1),
    # 74.0 top-1 of a single crop on ImageNet
    "irevnet301": iRevNet(
        (6, 16, 72, 6), (24, 96, 384, 1536), (2, 2, 2, 2), first_block_size=2
    ),
}


def _cifar(classes, network):
    """The recipe of a network on CIFAR-10 or CIFAR-100.

    Gomez et al., 2017, https://arxiv.org/abs/1707.04585. The values are from the
    authors' published configuration, https://github.com/renmengye/revnet-public,
    resnet/configs/cifar_configs.py. On two cores of an AMD EPYC, a step of RevNet-38
    takes 0.55 s, the whole run 12 hours. A step of ResNet-32 takes 0.33 s.
    """
    return Recipe(
        CIFAR_NETWORKS[network],
        # The authors pad by 2, not by the usual 4.
        SmallImageClassification(f"cifar{classes}", classes, pad=2, flip=True),
        SGD(weight_decay=2e-4, momentum=0.9),
        Piecewise(learning_rate=0.1, decay_steps=(40_000, 60_000)),
        global_batch_size=100,
        train_steps=80_000,  # 160 epochs of 50,000 images
    )


def _cifar_irevnet(classes):
    """The recipe of i-RevNet-163 on CIFAR-10 or CIFAR-100.

    Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088, section 4. A step
    takes the CPU time of 8 steps of RevNet-38: the whole run takes some 4 days on two
    CPU cores.
    """
    epoch = 50_000 // 128  # whole batches
    return Recipe(
        IREVNETS["irevnet163"],
        SmallImageClassification(
            f"cifar{classes}", classes, pad=4, flip=True, standardize=True
        ),
        SGD(weight_decay=5e-4, momentum=0.9),
        Piecewise(
            learning_rate=0.1,
            decay_steps=(60 * epoch, 120 * epoch, 160 * epoch),
            decay_factor=0.2,
        ),
        global_batch_size=128,
        train_steps=200 * epoch,
    )


SHORT_NETWORKS = {
    "revnet38": CIFAR_NETWORKS["revnet38"],
    "resnet32": CIFAR_NETWORKS["resnet32"],
    # A step takes the CPU time of a step of RevNet-38.
    "irevnet": iRevNet((2, 2, 4), (16, 64, 256), (1, 2, 2)),
}


def _short(network):
    """The recipe of a network on CIFAR-10 for some 40 minutes on two CPU cores.

    No row of the paper. Two epochs of ResNet-32 with this shape of schedule, one seed
    each: 70.9 % of the test images with a highest learning rate of 0.1, 70.5 % with
    0.3.
    """
    return Recipe(
        SHORT_NETWORKS[network],
        SmallImageClassification("cifar10", 10, pad=2, flip=True),
        SGD(weight_decay=2e-4, momentum=0.9),
        Cosine(learning_rate=0.1, warmup_steps=1_000),
        global_batch_size=100,
        train_steps=4_500,  # 9 epochs
    )


def _imagenet(network):
    """The recipe of a network on ImageNet, from the authors' imagenet_configs.py."""
    return Recipe(
        network,
        ImageNetClassification("imagenet2012", 1000),
        SGD(weight_decay=1e-4, momentum=0.9),
        Piecewise(learning_rate=0.1, decay_steps=(160_000, 320_000, 480_000)),
        global_batch_size=256,  # on 4 GPUs
        train_steps=600_000,  # 120 epochs of 1,281,167 images
    )


RECIPES = {
    # No row of the paper. Three seeds: 98.3 to 99.4 % of the held-out digits, in less
    # than a minute each on two CPU cores. Mirrored digits are other signs, hence no
    # flip.
    "digits_revnet": Recipe(
        RevNet((2, 2), (32, 32, 64), False),
        SmallImageClassification("digits", 10, pad=1, flip=False),
        SGD(weight_decay=2e-4, momentum=0.9),
        Piecewise(learning_rate=0.1, decay_steps=(560, 784)),
        global_batch_size=50,
        train_steps=896,  # 32 epochs of 28 steps
    ),
    **{
        f"cifar{classes}_{network}": _cifar(classes, network)
        for classes in (10, 100)
        for network in CIFAR_NETWORKS
    },
    **{f"imagenet_{k}": _imagenet(network) for k, network in IMAGENET_NETWORKS.items()},
    **{f"cifar{classes}_irevnet163": _cifar_irevnet(classes) for classes in (10, 100)},
    # The batch, the rate and the steps of the RevNets.
    "imagenet_irevnet301": _imagenet(IREVNETS["irevnet301"]),
    **{f"cifar10_{network}_short": _short(network) for network in SHORT_NETWORKS},
    # No row of the paper: pictures of one's own, in a folder.
    "pictures_revnet": Recipe(
        RevNet((2, 2, 2), (32, 32, 64, 128), False),
        SmallImageClassification(
            "pictures", classes=None, image_size=64, pad=4, flip=True
        ),
        SGD(weight_decay=2e-4, momentum=0.9),
        Cosine(learning_rate=0.05, warmup_steps=100),
        global_batch_size=32,
        train_steps=1_000,
    ),
    # No row of a paper: half of one average brain, some minutes on two CPU cores. Seed
    # 0: Dice of 0.904 for grey and 0.908 for white matter on the other half.
    "brain_revunet": Recipe(
        RevUNet((16, 32, 64, 128), norm="instance"),
        Segmentation(
            "brain",
            4,
            spacing=(2.0, 2.0, 2.0),
            patch_size=(32, 32, 32),
            patches_per_volume=100,
            # Instance normalization needs to see patches outside of the brain, too.
            foreground=2 / 3,
            flip=True,
        ),
        Adam(weight_decay=1e-5),
        Cosine(learning_rate=3e-3, warmup_steps=20),
        global_batch_size=1,
        train_steps=600,  # 6 epochs
    ),
    # The network, the optimizer and the batch size of Brügger et al., 2019,
    # https://arxiv.org/abs/1906.06148, with patches. The steps are those of nnU-Net,
    # https://github.com/MIC-DKFZ/nnUNet.
    "decathlon_revunet": Recipe(
        RevUNet((60, 120, 240, 360, 480)),
        Segmentation("decathlon", classes=None, patch_size=(128, 128, 128), flip=True),
        Adam(weight_decay=1e-5),
        Cosine(learning_rate=1e-4),
        global_batch_size=1,
        train_steps=250_000,
    ),
}
