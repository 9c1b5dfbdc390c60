"""The paper's reversible networks, and the residual networks they are matched with.

Reference: Gomez et al., 2017, tables 1 and 2, https://arxiv.org/abs/1707.04585; block
counts, widths and stems as in the authors' configuration, `cifar_configs.py` and
`imagenet_configs.py` in
https://github.com/renmengye/revnet-public/blob/master/resnet/configs
"""

import functools
import os
from typing import NamedTuple

import keras

from revnet_tf import branches
from revnet_tf.layers import RevBlock, RevSequence


class Stem(NamedTuple):
    """What comes before the first stage: convolution, BN, ReLU and perhaps pooling.

    Attributes:
        kernel_size, strides: of the convolution.
        max_pool: whether 3x3 max-pooling of stride 2 follows, "same"-padded.
        image_size: height and width of the images that it is for, in pixels.
        classes: number of their classes.
    """

    kernel_size: int
    strides: int
    max_pool: bool
    image_size: int
    classes: int


STEMS = {
    "cifar": Stem(3, 1, False, 32, 10),
    "imagenet": Stem(7, 2, True, 224, 1000),
}


class Variant(NamedTuple):
    """A network of the paper.

    Attributes:
        reversible: `RevNet` or `ResNet`.
        num_blocks: blocks of each stage.
        channels: of the stem, then of each stage; both streams together.
        bottleneck: the residual function; with `True` a stage is 4 times as wide.
        stem: key of `STEMS`.
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
    # The authors' file calls it revnet-54; it has 6 * 9 + 2 layers.
    "RevNet56": Variant(
        True, (2, 2, 3, 2), (128, 128, 256, 512, 832), True, "imagenet"
    ),
    "RevNet104": Variant(
        True, (2, 2, 11, 2), (128, 128, 256, 512, 832), True, "imagenet"
    ),
}


def RevNet(
    num_blocks,
    channels,
    bottleneck=False,
    *,
    stem="cifar",
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="softmax",
    kernel_regularizer=None,
    recompute=True,
    fraction_bits=None,
    name="revnet",
):
    """Returns a reversible residual network as a functional `keras.Model`.

    The layers `stage1`, `stage2`, ... give the stages' outputs. Every stage but the
    first halves height and width.

    Args:
        num_blocks: number of blocks of each stage.
        channels: channels of the stem, then of each stage, both streams together; even
            numbers.
        bottleneck: whether a branch is 1x1, 3x3, 1x1 convolutions, and a stage 4 times
            as wide as `channels` says, rather than two 3x3 convolutions.
        stem: `"cifar"` (3x3 convolution) or `"imagenet"` (7x7 convolution, then 3x3
            max-pooling, both of stride 2: a quarter of height and width is left).
        include_top: whether to end in global average pooling and a dense layer.
        weights: `None` (random) or the path of a `.weights.h5` file.
        input_tensor: Keras tensor to use as the input.
        input_shape: `(height, width, channels)`. Defaults to `(32, 32, 3)`, with the
            ImageNet stem to `(224, 224, 3)`, and without top to `(None, None, 3)`.
        pooling: without top, `None` (the last feature map), `"avg"` or `"max"`.
        classes: number of classes. Defaults to 10, with the ImageNet stem to 1000.
        classifier_activation: of the dense layer; `None` returns logits.
        kernel_regularizer: of all convolutions and of the dense layer.
        recompute: if `False`, use ordinary backpropagation (same values, more memory).
        fraction_bits: of the streams, rebuilt bit for bit; as for `RevBlock`.
        name: of the model.

    Returns:
        A `keras.Model` from float images `(batch, height, width, channels)` to
        `(batch, classes)`; without top, to `(batch, height, width, channels)` of the
        last stage, or after pooling `(batch, channels)`.

    Raises:
        ValueError: an argument cannot be used; the message says why.

    Reference:
        Gomez et al., 2017, section 3, https://arxiv.org/abs/1707.04585
    """
    if odd := [c for c in channels if c % 2]:
        raise ValueError(
            f"channels={tuple(channels)}: {odd} cannot be split into two streams; use "
            "even numbers."
        )
    return _network(
        lambda layers: branches.Stem(
            keras.Sequential(layers), recompute=recompute, name="stem"
        ),
        functools.partial(
            _reversible_stage, recompute=recompute, fraction_bits=fraction_bits
        ),
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


def ResNet(
    num_blocks,
    channels,
    bottleneck=False,
    *,
    stem="cifar",
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="softmax",
    kernel_regularizer=None,
    name="resnet",
):
    """Returns the residual network with pre-activation that a RevNet is matched with.

    Arguments and return value are those of `RevNet`, except that `channels` may be odd
    and nothing is recomputed.

    Reference:
        He et al., 2016, https://arxiv.org/abs/1603.05027, as in Gomez et al., 2017
    """
    return _network(
        lambda layers: keras.Sequential(layers, name="stem"),
        _residual_stage,
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


def _variant(title):
    row = VARIANTS[title]
    network = RevNet if row.reversible else ResNet
    size, classes = STEMS[row.stem].image_size, STEMS[row.stem].classes

    def build(**kwargs):
        kwargs = {"name": title.lower(), **kwargs}
        return network(
            row.num_blocks, row.channels, row.bottleneck, stem=row.stem, **kwargs
        )

    build.__name__ = build.__qualname__ = title
    build.__doc__ = f"""Returns the paper's {title} as a functional `keras.Model`.

    Its stages have {row.num_blocks} blocks. It maps images
    `(batch, {size}, {size}, 3)` to probabilities `(batch, {classes})`, unless the
    arguments say otherwise.

    Args:
        **kwargs: the keyword arguments of `{network.__name__}`, but `stem`.

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


def _network(
    make_stem,
    stage,
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
):
    if len(channels) != len(num_blocks) + 1:
        raise ValueError(
            f"channels={tuple(channels)} has {len(channels)} entries; with "
            f"num_blocks={tuple(num_blocks)} it needs {len(num_blocks) + 1}, one for "
            "the stem and one for each stage."
        )
    if min(num_blocks, default=0) < 1:
        raise ValueError(f"num_blocks={tuple(num_blocks)}: each stage needs a block.")
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r} must be one of {tuple(STEMS)}.")
    if weights is not None and not os.path.exists(weights):
        raise ValueError(
            f"weights={weights!r} is not the path of a file; give that of a "
            "`.weights.h5` file, or `None`."
        )
    if pooling not in (None, "avg", "max"):
        raise ValueError(f"pooling={pooling!r} must be None, 'avg' or 'max'.")

    stem = STEMS[stem]
    if input_tensor is None:
        size = stem.image_size if include_top else None
        inputs = input_tensor = keras.Input(input_shape or (size, size, 3))
    else:
        inputs = keras.utils.get_source_inputs(input_tensor)
        inputs = inputs[0] if len(inputs) == 1 else inputs
    parts = branches.Parts(bottleneck, kernel_regularizer)
    layers = [
        parts.conv(channels[0], stem.kernel_size, stem.strides),
        branches.batch_norm(),
        keras.layers.ReLU(),
    ]
    if stem.max_pool:
        layers.append(keras.layers.MaxPool2D(3, 2, "same", "channels_last"))
    x = make_stem(layers)(input_tensor)
    for i, (blocks, filters) in enumerate(zip(num_blocks, channels[1:], strict=True)):
        x = stage(
            x,
            parts,
            num_blocks=blocks,
            filters=4 * filters if bottleneck else filters,
            strides=1 if i == 0 else 2,
            # The stem has BN-ReLU of its own.
            preactivation=i > 0,
            name=f"stage{i + 1}",
        )
    x = branches.batch_norm(name="final_bn")(x)
    x = keras.layers.ReLU(name="final_relu")(x)
    if include_top or pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D("channels_last", name="avg_pool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D("channels_last", name="max_pool")(x)
    if include_top:
        x = keras.layers.Dense(
            stem.classes if classes is None else classes,
            activation=classifier_activation,
            kernel_initializer=keras.initializers.VarianceScaling(
                1.0, "fan_in", "uniform"
            ),
            kernel_regularizer=kernel_regularizer,
            # Under a mixed policy too, probabilities need the full precision.
            dtype=keras.config.dtype_policy().variable_dtype,
            name="predictions",
        )(x)
    model = keras.Model(inputs, x, name=name)
    if weights is not None:
        model.load_weights(weights)
    return model


def _reversible_stage(
    x,
    parts,
    num_blocks,
    filters,
    strides,
    preactivation,
    name,
    recompute,
    fraction_bits,
):
    half = filters // 2
    f = parts.branch(half, strides, preactivation)
    g = parts.branch(half)
    blocks = []
    if strides == 1 and x.shape[-1] == filters:
        blocks.append(RevBlock(f, g))
    else:
        x = branches.DownsamplingBlock(
            f,
            g,
            parts.shortcut(half, strides),
            parts.shortcut(half, strides),
            recompute=recompute,
            name=f"{name}_downsampling" if num_blocks > 1 else name,
        )(x)
    for _ in range(num_blocks - 1):
        blocks.append(RevBlock(parts.branch(half), parts.branch(half)))
    if blocks:
        x = RevSequence(
            blocks, recompute=recompute, fraction_bits=fraction_bits, name=name
        )(x)
    return x


def _residual_stage(x, parts, num_blocks, filters, strides, preactivation, name):
    for i in range(num_blocks):
        shortcut = x
        if i == 0 and (strides > 1 or x.shape[-1] != filters):
            shortcut = parts.shortcut(filters, strides)(x)
        if i == 0:
            branch = parts.branch(filters, strides, preactivation)
        else:
            branch = parts.branch(filters)
        last = i == num_blocks - 1
        x = keras.layers.Add(name=name if last else f"{name}_block{i + 1}")(
            [shortcut, branch(x)]
        )
    return x
