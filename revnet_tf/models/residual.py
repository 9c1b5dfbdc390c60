"""The paper's reversible networks, and the residual networks of equal size.

All convolutions are "same"-padded and have no bias. Batch normalization has the
constants of the authors' code: epsilon 1e-3 and momentum 0.99.

Reference: Gomez et al., 2017, tables 1 and 2, https://arxiv.org/abs/1707.04585

Block counts, widths and stems are those of the authors' configuration,
`cifar_configs.py` and `imagenet_configs.py` in
https://github.com/renmengye/revnet-public/blob/master/resnet/configs
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import keras

from revnet_tf._layer import promise_alike
from revnet_tf._recompute import Stem
from revnet_tf.layers import DownsamplingBlock, PoolingShortcut, RevBlock, RevSequence
from revnet_tf.models._ends import check_arguments, finished, head, model_input
from revnet_tf.normalization import BatchNormalization

__all__ = [
    "ResNet",
    "RevNet",
    "ResNet32",
    "ResNet110",
    "ResNet164",
    "ResNet50",
    "ResNet101",
    "RevNet38",
    "RevNet110",
    "RevNet164",
    "RevNet56",
    "RevNet104",
]


class StemSpec(NamedTuple):
    """The layers before the first stage: convolution, BN, ReLU and perhaps pooling.

    Attributes:
        kernel_size, strides: ints, arguments of the convolution.
        max_pool: bool, whether "same"-padded 3x3 max-pooling of stride 2 follows.
        image_size: int, the height and width of the data set's images, in pixels.
        classes: int, the number of classes of the data set.
    """

    kernel_size: int
    strides: int
    max_pool: bool
    image_size: int
    classes: int


STEMS = {
    "cifar": StemSpec(3, 1, False, 32, 10),
    "imagenet": StemSpec(7, 2, True, 224, 1000),
}


class Variant(NamedTuple):
    """A network of the paper.

    Attributes:
        reversible: bool; `True`: a `RevNet`, `False`: a `ResNet`.
        num_blocks, channels, bottleneck, stem: arguments of that function.
    """

    reversible: bool
    num_blocks: tuple
    channels: tuple
    bottleneck: bool
    stem: str


VARIANTS = {
    "ResNet32": Variant(False, (5, 5, 5), (16, 16, 32, 64), False, "cifar"),
    "ResNet110": Variant(False, (18, 18, 18), (16, 16, 32, 64), False, "cifar"),
    "ResNet164": Variant(False, (18, 18, 18), (16, 16, 32, 64), True, "cifar"),
    "RevNet38": Variant(True, (3, 3, 3), (32, 32, 64, 112), False, "cifar"),
    "RevNet110": Variant(True, (9, 9, 9), (32, 32, 64, 128), False, "cifar"),
    "RevNet164": Variant(True, (9, 9, 9), (32, 32, 64, 128), True, "cifar"),
    "ResNet50": Variant(False, (3, 4, 6, 3), (64, 64, 128, 256, 512), True, "imagenet"),
    "ResNet101": Variant(
        False, (3, 4, 23, 3), (64, 64, 128, 256, 512), True, "imagenet"
    ),
    # The authors' file calls this network revnet-54. It has 6 * 9 + 2 layers.
    "RevNet56": Variant(
        True, (2, 2, 3, 2), (128, 128, 256, 512, 832), True, "imagenet"
    ),
    "RevNet104": Variant(
        True, (2, 2, 11, 2), (128, 128, 256, 512, 832), True, "imagenet"
    ),
}


def RevNet(
    num_blocks: Sequence[int],
    channels: Sequence[int],
    bottleneck: bool = False,
    *,
    stem: str = "cifar",
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | None = "softmax",
    kernel_regularizer: keras.Regularizer | None = None,
    recompute: bool = True,
    fraction_bits: int | None = None,
    name: str = "revnet",
) -> keras.Model:
    """Returns a reversible residual network as a functional `keras.Model`.

    The layers `stage1`, `stage2`, ... return the outputs of the stages. Every stage
    except the first halves height and width.

    Args:
        num_blocks: ints, the number of blocks of each stage.
        channels: even ints, the channels of the stem and then of each stage. Both
            streams are counted.
        bottleneck: bool; `True`: a branch has 1x1, 3x3 and 1x1 convolutions, and a
            stage is 4 times as wide as its entry in `channels`. `False`: a branch has
            two 3x3 convolutions. Defaults to `False`.
        stem: str, `"cifar"` or `"imagenet"`. The first is a 3x3 convolution. The second
            is a 7x7 convolution and 3x3 max-pooling, both of stride 2. It leaves a
            quarter of height and width. Defaults to `"cifar"`.
        include_top: bool, whether the network ends in global average pooling and a
            dense layer. Defaults to `True`.
        weights: path of a `.weights.h5` file, or `None` for random weights.
        input_tensor: `keras.KerasTensor`, the input of the model, or `None`.
        input_shape: tuple `(height, width, channels)`. Defaults to `(32, 32, 3)`, with
            the ImageNet stem to `(224, 224, 3)`. Without top it defaults to
            `(None, None, 3)`.
        pooling: str, the pooling without top: `"avg"`, `"max"`, or `None` for the last
            feature map.
        classes: int, the number of classes. Defaults to 10, with the ImageNet stem to
            1000.
        classifier_activation: activation of the dense layer. With `None` the model
            returns logits.
        kernel_regularizer: regularizer of all convolutions and of the dense layer.
        recompute: bool; `False`: use ordinary backpropagation (same values, more
            memory). Defaults to `True`.
        fraction_bits: int or `None`, the fraction bits of the streams. The stages
            reconstruct such streams bit for bit; see `RevBlock`.
        name: str, the name of the model.

    Returns:
        A `keras.Model` from float images `(batch, height, width, channels)` to
        `(batch, classes)`. Without top it returns the feature map of the last stage,
        `(batch, height, width, channels)`, or after pooling `(batch, channels)`.

    Raises:
        ValueError: an argument has a value that the function cannot use.

    Reference:
        Gomez et al., 2017, section 3, https://arxiv.org/abs/1707.04585
    """
    if odd := [c for c in channels if c % 2]:
        raise ValueError(
            f"Expected even channels; got channels={tuple(channels)}, of which {odd} "
            "cannot be split into two streams. Use even numbers."
        )
    network = _Network(
        num_blocks,
        channels,
        bottleneck,
        stem,
        include_top,
        weights,
        input_tensor,
        input_shape,
        pooling,
        classes,
        classifier_activation,
        kernel_regularizer,
        name,
    )
    return network.build(
        lambda layers: Stem(keras.Sequential(layers), recompute=recompute, name="stem"),
        lambda x, stage: _reversible_stage(x, stage, network, recompute, fraction_bits),
    )


def ResNet(
    num_blocks: Sequence[int],
    channels: Sequence[int],
    bottleneck: bool = False,
    *,
    stem: str = "cifar",
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | None = "softmax",
    kernel_regularizer: keras.Regularizer | None = None,
    name: str = "resnet",
) -> keras.Model:
    """Returns a residual network with pre-activation as a functional `keras.Model`.

    The paper compares RevNets with these networks. Arguments and return value are those
    of `RevNet`, with two differences: `channels` may be odd, and the network recomputes
    nothing.

    Reference:
        He et al., 2016, https://arxiv.org/abs/1603.05027, as in Gomez et al., 2017
    """
    network = _Network(
        num_blocks,
        channels,
        bottleneck,
        stem,
        include_top,
        weights,
        input_tensor,
        input_shape,
        pooling,
        classes,
        classifier_activation,
        kernel_regularizer,
        name,
    )
    return network.build(
        lambda layers: keras.Sequential(layers, name="stem"),
        lambda x, stage: _residual_stage(x, stage, network),
    )


def _variant(title):
    row = VARIANTS[title]
    network = RevNet if row.reversible else ResNet
    size, classes = STEMS[row.stem].image_size, STEMS[row.stem].classes

    def build(**kwargs) -> keras.Model:
        kwargs = {"name": title.lower(), **kwargs}
        return network(
            row.num_blocks, row.channels, row.bottleneck, stem=row.stem, **kwargs
        )

    build.__name__ = build.__qualname__ = title
    build.__doc__ = f"""Returns the paper's {title} as a functional `keras.Model`.

    Its stages have {row.num_blocks} blocks. By default it maps images
    `(batch, {size}, {size}, 3)` to probabilities `(batch, {classes})`.

    Args:
        **kwargs: keyword arguments of `{network.__name__}`, except `stem`.

    Reference:
        Gomez et al., 2017, tables 1 and 2, https://arxiv.org/abs/1707.04585
    """
    return build


ResNet32 = _variant("ResNet32")
ResNet110 = _variant("ResNet110")
ResNet164 = _variant("ResNet164")
RevNet38 = _variant("RevNet38")
RevNet110 = _variant("RevNet110")
RevNet164 = _variant("RevNet164")
ResNet50 = _variant("ResNet50")
ResNet101 = _variant("ResNet101")
RevNet56 = _variant("RevNet56")
RevNet104 = _variant("RevNet104")


class _Stage(NamedTuple):
    """A stage of a network.

    Attributes:
        name: str, the name of the layer that returns the stage's output.
        num_blocks: int, the number of blocks.
        filters: int, the channels of the output, both streams together.
        strides: int, the strides of the first block.
        preactivation: bool, whether the first branch begins with BN-ReLU.
    """

    name: str
    num_blocks: int
    filters: int
    strides: int
    preactivation: bool


@dataclasses.dataclass(frozen=True)
class _Network:
    """The arguments that all networks share, and the parts made from them."""

    num_blocks: Sequence[int]
    channels: Sequence[int]
    bottleneck: bool
    stem: str
    include_top: bool
    weights: str | os.PathLike | None
    input_tensor: keras.KerasTensor | None
    input_shape: tuple | None
    pooling: str | None
    classes: int | None
    classifier_activation: str | None
    kernel_regularizer: keras.Regularizer | None
    name: str

    def __post_init__(self):
        num_blocks, channels = tuple(self.num_blocks), tuple(self.channels)
        if len(channels) != len(num_blocks) + 1:
            raise ValueError(
                f"Expected {len(num_blocks) + 1} channels for num_blocks={num_blocks}; "
                f"got channels={channels}. Give one entry for the stem and one for "
                "each stage."
            )
        if min(num_blocks, default=0) < 1:
            raise ValueError(
                f"Expected at least one stage of at least one block; got "
                f"num_blocks={num_blocks}. Each stage needs a block."
            )
        if self.stem not in STEMS:
            raise ValueError(
                f"stem must be one of {tuple(STEMS)}; got stem={self.stem!r}."
            )
        check_arguments(self.weights, self.pooling)

    def build(self, make_stem, make_stage):
        """Returns the model.

        Args:
            make_stem: function, `make_stem(layers)` returns one layer.
            make_stage: function, `make_stage(x, stage)` returns the output of a
                `_Stage`.
        """
        stem = STEMS[self.stem]
        size = stem.image_size if self.include_top else None
        shape = self.input_shape or (size, size, 3)
        inputs, x = model_input(self.input_tensor, shape)
        layers = [
            self.conv(self.channels[0], stem.kernel_size, stem.strides),
            batch_norm(),
            keras.layers.ReLU(),
        ]
        if stem.max_pool:
            layers.append(keras.layers.MaxPool2D(3, 2, "same", "channels_last"))
        x = make_stem(layers)(x)
        for i, num_blocks in enumerate(self.num_blocks):
            stage = _Stage(
                name=f"stage{i + 1}",
                num_blocks=num_blocks,
                filters=self.channels[i + 1] * (4 if self.bottleneck else 1),
                strides=1 if i == 0 else 2,
                # The stem ends in BN-ReLU.
                preactivation=i > 0,
            )
            x = make_stage(x, stage)
        x = batch_norm(name="final_bn")(x)
        x = keras.layers.ReLU(name="final_relu")(x)
        x = head(
            x,
            self.include_top,
            self.pooling,
            stem.classes if self.classes is None else self.classes,
            self.classifier_activation,
            self.kernel_regularizer,
        )
        return finished(keras.Model(inputs, x, name=self.name), self.weights)

    def conv(self, filters, kernel_size, strides=1):
        """Returns a `Conv2D` without bias, initialized as in the authors' code."""
        stddev = math.sqrt(2 / (kernel_size * kernel_size * filters))
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding="same",
            data_format="channels_last",
            use_bias=False,
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=stddev),
            kernel_regularizer=self.kernel_regularizer,
        )

    def branch(self, filters, strides=1, preactivation=True):
        """Returns a branch: BN-ReLU-conv twice, with bottleneck three times.

        Args:
            filters: int, the channels of the output. The inner width of a bottleneck
                is a quarter of it.
            strides: int, the strides of the first convolution.
            preactivation: bool; `False` leaves out the first BN-ReLU, as in the first
                block of the paper's networks.
        """
        convs = [(filters, 3), (filters, 3)]
        if self.bottleneck:
            convs = [(filters // 4, 1), (filters // 4, 3), (filters, 1)]
        layers = []
        for i, (width, kernel_size) in enumerate(convs):
            if preactivation or i > 0:
                layers += [batch_norm(), keras.layers.ReLU()]
            layers.append(self.conv(width, kernel_size, strides if i == 0 else 1))
        return keras.Sequential(layers)

    def shortcut(self, filters, strides):
        """Returns a layer that maps the input of a branch to its output's shape."""
        if self.bottleneck:
            return self.conv(filters, 1, strides)
        return PoolingShortcut(filters, strides)


def batch_norm(**kwargs) -> BatchNormalization:
    """Returns a `BatchNormalization` with the constants of the authors' code."""
    return BatchNormalization(momentum=0.99, epsilon=1e-3, **kwargs)


def _reversible_stage(x, stage, network, recompute, fraction_bits):
    half = stage.filters // 2
    f = network.branch(half, stage.strides, stage.preactivation)
    g = network.branch(half)
    blocks = [
        RevBlock(network.branch(half), network.branch(half))
        for _ in range(stage.num_blocks - 1)
    ]
    promise_alike(blocks)
    if stage.strides == 1 and x.shape[-1] == stage.filters:
        blocks.insert(0, RevBlock(f, g))
    else:
        x = DownsamplingBlock(
            f,
            g,
            network.shortcut(half, stage.strides),
            network.shortcut(half, stage.strides),
            recompute=recompute,
            name=f"{stage.name}_downsampling" if blocks else stage.name,
        )(x)
    if blocks:
        x = RevSequence(
            blocks, recompute=recompute, fraction_bits=fraction_bits, name=stage.name
        )(x)
    return x


def _residual_stage(x, stage, network):
    for i in range(stage.num_blocks):
        shortcut = x
        if i > 0:
            branch = network.branch(stage.filters)
        else:
            branch = network.branch(stage.filters, stage.strides, stage.preactivation)
            if stage.strides > 1 or x.shape[-1] != stage.filters:
                shortcut = network.shortcut(stage.filters, stage.strides)(x)
        last = i == stage.num_blocks - 1
        add = keras.layers.Add(
            name=stage.name if last else f"{stage.name}_block{i + 1}"
        )
        x = add([shortcut, branch(x)])
    return x
