"""i-RevNets: networks that lose nothing between the image and the last pooling.

Space to depth takes the place of strides. The body, from the image to the features, is
one reversible run with an inverse.

Reference: Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088

Block counts, widths and strides are those of the paper's section 3 and of the authors'
configuration, https://github.com/jhjacobsen/pytorch-i-revnet
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from revnet_tf._layer import promise_alike
from revnet_tf._rearrangements import Split, depth_to_space
from revnet_tf.layers import ChannelPadding, RevBlock, RevSequence, SpaceToDepth
from revnet_tf.models._ends import check_arguments, finished, head, model_input
from revnet_tf.normalization import BatchNormalization

__all__ = ["iRevNet", "iRevNet163", "iRevNet301"]


class Variant(NamedTuple):
    """A network of the paper.

    Attributes:
        num_blocks, channels, strides, first_block_size, dropout: arguments of
            `iRevNet`.
        image_size: int, the height and width of the data set's images, in pixels.
        classes: int, the number of classes of the data set.
    """

    num_blocks: tuple
    channels: tuple
    strides: tuple
    first_block_size: int
    dropout: float
    image_size: int
    classes: int


VARIANTS = {
    "iRevNet163": Variant((18, 18, 18), (16, 64, 256), (1, 2, 2), 1, 0.1, 32, 10),
    "iRevNet301": Variant(
        (6, 16, 72, 6), (24, 96, 384, 1536), (2, 2, 2, 2), 2, 0.0, 224, 1000
    ),
}


def iRevNet(
    num_blocks: Sequence[int],
    channels: Sequence[int],
    strides: Sequence[int],
    *,
    first_block_size: int = 1,
    bottleneck: bool = False,
    dropout: float = 0.0,
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple | None = None,
    pooling: str | None = None,
    classes: int = 10,
    classifier_activation: str | None = "softmax",
    kernel_regularizer: keras.Regularizer | None = None,
    bias_regularizer: keras.Regularizer | None = None,
    recompute: bool = True,
    fraction_bits: int | None = None,
    name: str = "irevnet",
) -> keras.Model:
    """Returns an i-RevNet as a functional `keras.Model`.

    The layer `body` is one `RevSequence` from the image to the features:

    - space to depth by `first_block_size`;
    - zeros as further channels, if the first stage has more channels than the image
      gives it;
    - for each stage, space to depth by its stride, and its blocks.

    In training the body stores its last output only, for any number of stages and
    blocks. With a padding it also uses its input, the images.
    `model.get_layer("body").inverse(features)` returns the images.

    Two blocks of the paper are one `RevBlock`. The layer names give the numbers of both
    blocks: `stage2_blocks3_4` has the branches `stage2_block3` and `stage2_block4`.

    Args:
        num_blocks: even ints, the number of the paper's blocks in each stage.
        channels: ints, the channels of one stream in each stage. The inner convolutions
            have a quarter of them.
        strides: ints, the block size of space to depth at the beginning of each stage,
            or 1 for none. A stage has the channels of the stage before, times the
            square of its stride.
        first_block_size: int, the block size of space to depth on the image; 1 for
            none. Defaults to `1`.
        bottleneck: bool; `True`: a block has 1x1, 3x3 and 1x1 convolutions. `False`: it
            has three 3x3 convolutions. Defaults to `False`.
        dropout: float, the rate of the dropout in each block. Defaults to `0.0`.
        include_top: bool, whether the network ends in global average pooling and a
            dense layer. Defaults to `True`.
        weights: path of a `.weights.h5` file, or `None` for random weights.
        input_tensor: `keras.KerasTensor`, the input of the model, or `None`.
        input_shape: tuple `(height, width, channels)`. Defaults to `(32, 32, 3)`,
            without top to `(None, None, 3)`. The product of all strides and of
            `first_block_size` must divide height and width.
        pooling: str, the pooling without top: `"avg"`, `"max"`, or `None` for the last
            feature map.
        classes: int, the number of classes. Defaults to `10`.
        classifier_activation: activation of the dense layer. With `None` the model
            returns logits.
        kernel_regularizer: regularizer of all convolutions and of the dense layer.
        bias_regularizer: regularizer of all other weights: the scales and offsets of
            the normalizations, and the bias of the dense layer.
        recompute: bool; `False`: use ordinary backpropagation (same values, more
            memory). Defaults to `True`.
        fraction_bits: int or `None`, the fraction bits of the streams. The body
            reconstructs such streams bit for bit; see `RevBlock`.
        name: str, the name of the model.

    Returns:
        A `keras.Model` from float images `(batch, height, width, channels)` to
        `(batch, classes)`. Without top it returns the normalized feature map, `(batch,
        height, width, channels)`, or after pooling `(batch, channels)`.

    Raises:
        ValueError: an argument has a value that the function cannot use.

    Reference:
        Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088
    """
    num_blocks, channels, strides = map(tuple, (num_blocks, channels, strides))
    check_arguments(weights, pooling)
    size = 32 if include_top else None
    inputs, x = model_input(input_tensor, input_shape or (size, size, 3))
    width = x.shape[-1] * first_block_size**2
    _check_stages(num_blocks, channels, strides, width)
    parts = _Parts(bottleneck, dropout, kernel_regularizer, bias_regularizer)
    layers = []
    if first_block_size > 1:
        layers.append(SpaceToDepth(first_block_size, name="first_space_to_depth"))
    padded = 2 * channels[0] // strides[0] ** 2
    if padded > width:
        layers.append(ChannelPadding(padded, name="padding"))
    # The first stage may begin with space to depth, on each stream.
    layers.append(Split(name="split"))
    for stage, stage_channels in enumerate(channels, 1):
        stage_name, stride = f"stage{stage}", strides[stage - 1]
        if stride > 1:
            layers.append(SpaceToDepth(stride, name=f"{stage_name}_space_to_depth"))
        branches = [
            parts.branch(
                stage_channels,
                stride if i == 1 else 1,
                preactivation=stage > 1 or i > 1,
                name=f"{stage_name}_block{i}",
            )
            for i in range(1, num_blocks[stage - 1] + 1)
        ]
        blocks = [
            RevBlock(f, g, name=f"{stage_name}_blocks{2 * i + 1}_{2 * i + 2}")
            for i, (f, g) in enumerate(zip(branches[::2], branches[1::2], strict=True))
        ]
        # The first one differs: it has the stride, or no first normalization.
        promise_alike(blocks[1:])
        layers += blocks
    x = RevSequence(
        layers, recompute=recompute, fraction_bits=fraction_bits, name="body"
    )(x)
    x = parts.norm(0.1, name="final_bn")(x)
    x = keras.layers.ReLU(name="final_relu")(x)
    x = head(
        x,
        include_top,
        pooling,
        classes,
        classifier_activation,
        kernel_regularizer,
        bias_regularizer,
    )
    return finished(keras.Model(inputs, x, name=name), weights)


class _Parts(NamedTuple):
    """Makes the layers of a network. The attributes are arguments of `iRevNet`."""

    bottleneck: bool
    dropout: float
    kernel_regularizer: keras.Regularizer | None
    bias_regularizer: keras.Regularizer | None

    def norm(self, momentum=0.9, block_size=1, **kwargs):
        kwargs |= {"block_size": block_size} if block_size > 1 else {}
        norm = DepthToSpaceNormalization if block_size > 1 else BatchNormalization
        return norm(
            momentum=momentum,
            epsilon=1e-5,
            gamma_regularizer=self.bias_regularizer,
            beta_regularizer=self.bias_regularizer,
            **kwargs,
        )

    def conv(self, filters, kernel_size, stride, name):
        """Returns a convolution without bias."""
        conv = PaddedConv2D if stride > 1 else keras.layers.Conv2D
        return conv(
            filters,
            kernel_size,
            stride,
            padding="same",
            data_format="channels_last",
            use_bias=False,
            kernel_initializer=keras.initializers.HeNormal(),
            kernel_regularizer=self.kernel_regularizer,
            name=name,
        )

    def branch(self, channels, stride, preactivation, name):
        """Returns the residual branch of a block.

        Args:
            channels: int, the channels of the output.
            stride: int, the stride of the block. With a stride the branch undoes space
                to depth first: it sees the stream before it.
            preactivation: bool; `False` leaves out the first BN-ReLU, as at the
                beginning of the network.
        """
        layers = []
        if stride > 1 and not preactivation:
            layers.append(DepthToSpace(stride))
        convs = (
            (channels // 4, 1 if self.bottleneck else 3, stride),
            (channels // 4, 3, 1),
            (channels, 1 if self.bottleneck else 3, 1),
        )
        for i, conv in enumerate(convs, 1):
            if i == 3 and self.dropout:
                layers.append(keras.layers.Dropout(self.dropout))
            if i > 1 or preactivation:
                norm = self.norm(block_size=stride if i == 1 else 1, name=f"bn{i}")
                layers += [norm, keras.layers.ReLU()]
            layers.append(self.conv(*conv, name=f"conv{i}"))
        return keras.Sequential(layers, name=name)


def _check_stages(num_blocks, channels, strides, width):
    """Raises `ValueError` for stages that are no i-RevNet.

    Args:
        width: int, the channels that enter the first stage before the padding, both
            streams together.
    """
    if not len(num_blocks) == len(channels) == len(strides) > 0:
        raise ValueError(
            "Expected num_blocks, channels and strides with one entry for each stage; "
            f"got {num_blocks}, {channels} and {strides}. Give all three equal lengths."
        )
    for count in num_blocks:
        if count < 1 or count % 2:
            near = [n for n in (count - 1, count + 1) if n > 0]
            raise ValueError(
                "Expected an even number of blocks in each stage, because two blocks "
                f"are one RevBlock; got {count} in num_blocks={num_blocks}. Use "
                f"{' or '.join(map(str, near or [2]))}."
            )
    if min(strides) < 1:
        raise ValueError(f"Expected strides of at least 1; got strides={strides}.")
    for i, (channel, stride) in enumerate(zip(channels, strides, strict=True)):
        if i == 0:
            # Padding can add channels here.
            expected = -(-width // 2) * stride**2
            fits = channel % stride**2 == 0 and channel >= expected
            expected = f"at least {expected}, a multiple of {stride**2}"
        else:
            expected = channels[i - 1] * stride**2
            fits = channel == expected
        if channel < 4 or not fits:
            raise ValueError(
                f"Expected {expected} channels in stage {i + 1}, of one stream, for "
                f"strides={strides}; got channels={channels}. Space to depth decides "
                "the channels of a stage: change channels or strides."
            )


def _variant(title):
    row = VARIANTS[title]

    def build(**kwargs) -> keras.Model:
        size = row.image_size if kwargs.get("include_top", True) else None
        kwargs["input_shape"] = kwargs.get("input_shape") or (size, size, 3)
        defaults = {
            "first_block_size": row.first_block_size,
            "dropout": row.dropout,
            "classes": row.classes,
            "name": title.lower(),
        }
        return iRevNet(
            row.num_blocks, row.channels, row.strides, **{**defaults, **kwargs}
        )

    build.__name__ = build.__qualname__ = title
    build.__doc__ = f"""Returns the {title} of the paper as a functional `keras.Model`.

    Its stages have {row.num_blocks} blocks. By default it maps images
    `(batch, {row.image_size}, {row.image_size}, 3)` to probabilities
    `(batch, {row.classes})`.

    Args:
        **kwargs: keyword arguments of `iRevNet`.

    Reference:
        Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088
    """
    return build


iRevNet163 = _variant("iRevNet163")
iRevNet301 = _variant("iRevNet301")


@keras.saving.register_keras_serializable("revnet_tf")
class DepthToSpace(keras.layers.Layer):
    """Undoes `SpaceToDepth` on one stream.

    Args:
        block_size: int, the size of a block.
    """

    def __init__(self, block_size: int, **kwargs):
        super().__init__(**kwargs)
        self.block_size = block_size

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return depth_to_space(inputs, self.block_size)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        batch_size, *sizes, channels = input_shape
        more = (size and size * self.block_size for size in sizes)
        return batch_size, *more, channels // self.block_size ** len(sizes)

    def get_config(self) -> dict:
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("revnet_tf")
class DepthToSpaceNormalization(BatchNormalization):
    """Undoes `SpaceToDepth` on one stream, and normalizes the result.

    The layer normalizes first, with the same values. Its gradient then needs the stream
    itself, and not a second tensor in another order.

    Args:
        block_size: int, the size of a block.
        **kwargs: arguments of `keras.layers.BatchNormalization`.
    """

    def __init__(self, block_size: int, **kwargs):
        super().__init__(**kwargs)
        self.block_size = block_size

    def build(self, input_shape: tuple) -> None:
        super().build((None, 1, None, input_shape[-1] // self.block_size**2))
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: input_shape[-1]})

    def call(
        self,
        inputs: tf.Tensor,
        training: bool | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        channels = inputs.shape[-1] // self.block_size**2
        # The channels of a stream have the order (position in the block, channel).
        positions = tf.reshape(inputs, [tf.shape(inputs)[0], 1, -1, channels])
        normalized = super().call(positions, training=training, mask=mask)
        normalized = tf.reshape(normalized, tf.shape(inputs))
        normalized.set_shape(inputs.shape)
        return depth_to_space(normalized, self.block_size)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return DepthToSpace(self.block_size).compute_output_shape(input_shape)

    def get_config(self) -> dict:
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("revnet_tf")
class PaddedConv2D(keras.layers.Conv2D):
    """A convolution without bias, with half a kernel of zeros on each side.

    "same" padding of an even size with stride 2 adds nothing at the top and on the
    left. A layer that pads would store a larger copy of its input.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        sides = [[size // 2] * 2 for size in self.kernel_size]
        padding = [[0, 0], *sides, [0, 0]]
        return tf.nn.conv2d(inputs, self.kernel, self.strides, padding)
