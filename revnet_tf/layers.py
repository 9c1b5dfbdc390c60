"""The blocks of reversible networks: Keras layers that reverse or recompute."""

import itertools
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from revnet_tf import _coupling
from revnet_tf._functional import CallArguments, Variables
from revnet_tf._layer import PairLayer
from revnet_tf._pair import Pair, Shape, Shapes, Tensors, listed
from revnet_tf._rearrangements import ChannelPadding, SpaceToDepth
from revnet_tf._recompute import Recompute
from revnet_tf._reversible import RearrangingLayer, ReversibleLayer

__all__ = [
    "ChannelPadding",
    "DownsamplingBlock",
    "PoolingShortcut",
    "Recompute",
    "RevBlock",
    "RevSequence",
    "SpaceToDepth",
]


@keras.saving.register_keras_serializable("revnet_tf")
class RevBlock(ReversibleLayer):
    """Reversible residual block: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Reversible means that the inputs can be computed from the outputs. In training the
    block stores no activations. The backward pass reconstructs them, for about the
    computation of one more forward pass.

    Blocks that are called one after the other store as little as one block if the
    training step is a graph, as in `model.fit`. This holds for functional, sequential
    and subclassed models. In eager mode TensorFlow stores the output of every block.
    A `RevSequence` stores the last output only, in eager mode, too.

    Args:
        f: Keras layer, maps the second stream to the shape of the first.
        g: Keras layer, maps the first stream to the shape of the second.
        axis: int, the axis on which a single input is split. Defaults to `-1`.
        recompute: bool; `False`: use ordinary backpropagation (same values, more
            memory). The attribute can be set at any time. It takes effect in the next
            trace of the model. Defaults to `True`.
        fraction_bits: int `k` or `None`. With `k` the streams are in fixed point:
            multiples of `2**-k` between `-2**(24 - k)` and `2**(24 - k)`, in float64
            with 53 for 24. The backward pass reconstructs them bit for bit. The block
            rounds its input and the outputs of the branches; gradients ignore the
            rounding. A value out of the range raises an error; under XLA the result
            is NaN. XLA may compile a branch in two ways and round the results to
            neighbouring multiples. For a network with normalization, use 10 to 14.
            Defaults to `None`, floating-point streams.
        anchor: bool; `True`: store the inputs of the block. Rounding errors of later
            blocks then do not reach earlier ones. The attribute can be set at any
            time, as `recompute`. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`. The streams have the variable
            dtype of the policy, float32 under `mixed_float16` and `mixed_bfloat16`.

    Call arguments:
        inputs: tensor `(batch, ..., channels)` with an even size on `axis`, or a pair
            of tensors `(x1, x2)`.
        training: bool, passed to `f` and `g`, in the forward pass and in the
            recomputation. With `False` or `None` nothing is recomputed.
        mask: mask of the input, or a pair of masks. Keras passes it by itself. The
            block passes it to the branches that take a mask. The output has the mask
            if both branches support masking.
        **kwargs: further arguments of the branches: tensors, also sparse, ragged and
            nested ones, and other values. Each branch gets those that its `call` names.
            Tensors have their gradient. A tensor that a branch finds in another way
            has no gradient.

    Output shape:
        The shape of the input.

    Raises:
        ValueError: the input cannot be split, or is complex. Or a branch changes the
            shape of its stream, also by broadcasting. Or a branch has an effect that
            cannot be repeated; the message names it.
        TypeError: the call has a keyword argument that no branch names.
        NotImplementedError: a second or a forward-mode derivative is taken through a
            reconstruction.

    Example:

    >>> branch = lambda: keras.layers.Conv2D(8, 3, padding="same")
    >>> block = revnet_tf.RevBlock(branch(), branch())
    >>> y = block(images)  # (batch, height, width, 16)
    >>> x = block.inverse(y)  # images again

    Reference:
        Gomez et al., 2017, section 3.1, https://arxiv.org/abs/1707.04585
    """

    LAYERS = ("f", "g")

    def __init__(
        self,
        f: keras.layers.Layer,
        g: keras.layers.Layer,
        *,
        axis: int = -1,
        recompute: bool = True,
        fraction_bits: int | None = None,
        anchor: bool = False,
        **kwargs,
    ):
        super().__init__(
            axis=axis, recompute=recompute, fraction_bits=fraction_bits, **kwargs
        )
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, keras.layers.Layer):
                raise ValueError(
                    f"{name} must be a Keras layer or model; got {branch!r}."
                )
        self.f = f
        self.g = g
        self.anchor = anchor
        self.supports_masking = f.supports_masking and g.supports_masking

    def build_streams(self, shape1: Shape, shape2: Shape) -> None:
        self._build_branch("f", shape2, shape1)
        self._build_branch("g", shape1, shape2)

    def _build_branch(self, name, shape, expected):
        got = self.shape_after(getattr(self, name), shape)
        # The sum would broadcast a size of 1 on one side without an error.
        if len(got) != len(expected) or not all(
            a == b or (None in (a, b) and 1 not in (a, b))
            for a, b in zip(got, expected, strict=True)
        ):
            raise ValueError(
                f"Expected {name} to map a stream of shape {shape} to the shape "
                f"{expected} of the other stream; got {got}. Change {name} so that "
                "the shapes agree."
            )

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        # `stream_shapes` takes the shape of one tensor, or a pair of shapes.
        return list(self.stream_shapes(shapes if len(shapes) == 2 else shapes[0]))

    def block(
        self, arguments: CallArguments, owner: Variables | None = None
    ) -> _coupling.Coupling:
        return _coupling.Coupling(
            arguments.function(self.f, 1, owner),
            arguments.function(self.g, 0, owner),
            arguments.fraction_bits,
            self.anchor,
            elementary=not arguments.training,
        )

    def get_config(self) -> dict:
        return {**super().get_config(), "anchor": self.anchor}


@keras.saving.register_keras_serializable("revnet_tf")
class RevSequence(RearrangingLayer):
    """Applies reversible blocks in order, and stores only the last outputs.

    Reversible means that the inputs can be computed from the outputs. The activation
    memory does not depend on the number of blocks, in eager mode, in a graph and with
    XLA.

    The sequence splits one tensor at its first `RevBlock`. Each `SpaceToDepth` and
    `ChannelPadding` before it acts on the whole tensor. Only the width at the first
    `RevBlock` must be even. Later each `SpaceToDepth` acts on each stream. The order is
    that of the blocks, through all nested sequences.

    Args:
        blocks: list of reversible layers, with the same `axis` and dtype: `RevBlock`,
            `RevSequence`, `SpaceToDepth` and `ChannelPadding`. Blocks with
            `recompute=False` use ordinary backpropagation and split the run. Each run
            between them stores its own last outputs.
        recompute: bool; `False`: use ordinary backpropagation for all blocks (same
            values, more memory). Defaults to `True`.
        fraction_bits: int or `None`, the argument of `RevBlock`, for all blocks. The
            sequence does not change the blocks. Defaults to the value of the blocks.
        **kwargs: arguments of `keras.layers.Layer`.

    Attributes:
        blocks: tuple of the blocks.

    Call arguments and errors are those of `RevBlock`. The output has the structure of
    the input. Its shape is that of the input unless a `SpaceToDepth` or a
    `ChannelPadding` changes it.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    LAYERS = ("blocks",)

    def __init__(
        self,
        blocks: Sequence[ReversibleLayer],
        *,
        recompute: bool = True,
        fraction_bits: int | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        blocks = tuple(blocks)
        for block in blocks:
            if not isinstance(block, ReversibleLayer):
                raise ValueError(
                    "Every entry of blocks must be a RevBlock, a RevSequence, a "
                    f"SpaceToDepth or a ChannelPadding; got {block!r}."
                )
        if not blocks:
            raise ValueError(
                "Expected at least one block; blocks is empty. Give it a RevBlock."
            )
        axis = _common(blocks, "axis")
        stream_dtype = _common(blocks, "compute_dtype")
        if dtype is not None:
            dtype = keras.dtype_policies.get(dtype).variable_dtype
            if dtype != stream_dtype:
                raise ValueError(
                    f"Expected the dtype of the blocks, {stream_dtype}; got "
                    f"dtype={dtype}. Give the dtype to the blocks only."
                )
        if any(block.activity_regularizer is not None for block in blocks):
            raise ValueError(
                "Expected blocks without an activity_regularizer, because a sequence "
                "does not store the outputs of its blocks. Give the regularizer to f "
                "or g."
            )
        if fraction_bits is None:
            fraction_bits = _common(blocks, "fraction_bits")
        elif others := {b.fraction_bits for b in blocks} - {None, fraction_bits}:
            raise ValueError(
                f"Expected blocks with fraction_bits={fraction_bits} or None; got "
                f"{sorted(others)}, too. Give fraction_bits to the sequence only."
            )
        super().__init__(
            axis=axis,
            recompute=recompute,
            fraction_bits=fraction_bits,
            dtype=stream_dtype,
            **kwargs,
        )
        self.supports_masking = all(block.supports_masking for block in blocks)
        self.blocks = blocks
        for i, block in enumerate(blocks):
            # `tf.train.Checkpoint` finds layers in attributes, but not in tuples.
            setattr(self, f"block{i + 1}", block)

    def branches(self) -> list[keras.layers.Layer]:
        return [branch for block in self.blocks for branch in block.branches()]

    def build(self, input_shape: Shapes) -> None:
        shapes = listed(self.name, input_shape)
        for block in self.blocks:
            if not block.built:
                block._extra_specs = self._extra_specs
                block.build(shapes[0] if len(shapes) == 1 else tuple(shapes))
            shapes = block.shapes_after(shapes)
        self._output_shapes = shapes

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        for block in self.blocks:
            shapes = block.shapes_after(shapes)
        return shapes

    def pairs(self, tensors: Tensors) -> tuple[Pair, Pair]:
        pair_in, pair_out = super().pairs(tensors)
        layers = [layer for layer, _ in self.blocks_in_order()]
        leading = [*itertools.takewhile(lambda layer: layer.takes_whole, layers)]
        if pair_in.axis is None or len(leading) == len(layers):
            return Pair(), Pair()
        blocks = (layer.block() for layer in leading)
        return pair_in._replace(leading=tuple(blocks)), pair_out

    def blocks_in_order(self) -> Iterator[tuple[ReversibleLayer, bool]]:
        for block in self.blocks:
            for inner, recompute in block.blocks_in_order():
                yield inner, recompute and self.recompute

    def get_config(self) -> dict:
        config = super().get_config()
        del config["axis"]  # The blocks have it.
        return {**config, "blocks": list(self.blocks)}


def _common(blocks, name):
    """Returns the value of the attribute `name`, which must be equal for all blocks."""
    values = {getattr(block, name) for block in blocks}
    if len(values) > 1:
        raise ValueError(
            f"Expected blocks with one {name}; the blocks differ in {name}, "
            f"{sorted(values, key=str)}. Give all blocks the same."
        )
    return values.pop()


@keras.saving.register_keras_serializable("revnet_tf")
class PoolingShortcut(keras.layers.Layer):
    """Shortcut without weights: average pooling, and zeros for the new channels.

    Args:
        filters: int, the channels of the output, at least those of the input. The
            layer adds zeros before and after the input's channels, in equal numbers.
        strides: int, the size and the stride of the pooling window. A window that
            exceeds the image averages the existing pixels. The output therefore has
            the size of a "same"-padded convolution's output. Defaults to `1`.

    Input shape:
        `(batch, *sizes, channels)` with one, two or three sizes, such as
        `(batch, height, width, channels)`.
    """

    def __init__(self, filters: int, strides: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides

    def build(self, input_shape: Shape) -> None:
        if not 3 <= len(input_shape) <= 5:
            raise ValueError(
                "Expected an input of shape (batch, *sizes, channels) with one, two or "
                f"three sizes; got the shape {input_shape}. Use another layer as the "
                "shortcut."
            )
        if self.filters < input_shape[-1]:
            raise ValueError(
                f"Expected at least {input_shape[-1]} filters, the channels of the "
                f"input; got filters={self.filters}. A pooling shortcut can only add "
                "channels."
            )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        x = inputs
        if self.strides > 1:
            size = self.strides
            x = keras.ops.average_pool(x, size, size, "same", "channels_last")
        extra = self.filters - x.shape[-1]
        if extra:
            before = [[0, 0]] * (len(x.shape) - 1)
            x = tf.pad(x, [*before, [extra // 2, extra - extra // 2]])
        return x

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch_size, *sizes, _ = input_shape
        sizes = (size and -(-size // self.strides) for size in sizes)
        return batch_size, *sizes, self.filters

    def get_config(self) -> dict:
        config = {"filters": self.filters, "strides": self.strides}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("revnet_tf")
class DownsamplingBlock(PairLayer):
    """First block of a stage: `y1 = s1(x1) + f(x2)`, `y2 = s2(x2) + g(y1)`.

    The strided block between stages is not invertible. In training the layer stores its
    input and recomputes its activations in the backward pass.

    Args:
        f, g: Keras layers, the branches. `f` has the strides.
        shortcut1: Keras layer, maps `x1` to the shape of the output of `f`.
        shortcut2: Keras layer, maps `x2` to the shape of the output of `g`.
        **kwargs: the arguments `axis` and `recompute` of `RevBlock`, and those of
            `keras.layers.Layer`.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    LAYERS = ("f", "g", "shortcut1", "shortcut2")

    def __init__(
        self,
        f: keras.layers.Layer,
        g: keras.layers.Layer,
        shortcut1: keras.layers.Layer,
        shortcut2: keras.layers.Layer,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.f = f
        self.g = g
        self.shortcut1 = shortcut1
        self.shortcut2 = shortcut2

    def build_streams(self, shape1: Shape, shape2: Shape) -> None:
        f = self.shape_after(self.f, shape2)
        g = self.shape_after(self.g, f)
        s1 = self.shape_after(self.shortcut1, shape1)
        s2 = self.shape_after(self.shortcut2, shape2)
        if f != s1 or g != s2:
            raise ValueError(
                f"Expected branches and shortcuts of {self.name} with equal output "
                f"shapes; got {f} and {g} from the branches, {s1} and {s2} from the "
                "shortcuts. Change them: each pair must agree."
            )

    def block(
        self, arguments: CallArguments, owner: Variables | None = None
    ) -> _coupling.Transition:
        return _coupling.Transition(
            f=arguments.function(self.f, 1, owner),
            g=arguments.function(self.g, 0, owner),
            shortcut1=arguments.function(self.shortcut1, 0, owner),
            shortcut2=arguments.function(self.shortcut2, 1, owner),
        )

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        shape1, shape2 = self.stream_shapes(input_shape)
        shape1 = self.shape_after(self.shortcut1, shape1)
        shape2 = self.shape_after(self.shortcut2, shape2)
        return self.joined_shape(shape1, shape2, input_shape)
