"""The blocks of reversible networks: Keras layers that reverse or recompute."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from revnet_tf import _coupling, _fixed_point, _functional
from revnet_tf._functional import CallArguments, Variables
from revnet_tf._layer import (
    PairLayer,
    RunLayer,
    pair_of_origin,
    static_bool,
    symbolic,
)
from revnet_tf._pair import Pair, Shape, Shapes, Tensors, listed
from revnet_tf._space_to_depth import depth_to_space, space_to_depth

__all__ = [
    "ChannelPadding",
    "DownsamplingBlock",
    "PoolingShortcut",
    "Recompute",
    "RevBlock",
    "RevSequence",
    "SpaceToDepth",
]


class _ReversibleLayer(PairLayer):
    """A layer whose blocks are all reversible. It therefore has an inverse.

    Subclasses define `shapes_after`.
    """

    stores_inputs = False
    # Whether the layer acts on one tensor as a whole, if that is not split yet.
    takes_whole = False
    # Whether the layer makes the masks of its input invalid.
    moves_positions = False

    def __init__(self, *, fraction_bits: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if fraction_bits is not None:
            _fixed_point.validate(fraction_bits, self.compute_dtype)
        self.fraction_bits = fraction_bits

    def build(self, input_shape: Shapes) -> None:
        super().build(input_shape)
        self._output_shapes = self.shapes_after(listed(self.name, input_shape))

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        shapes = self.shapes_after(listed(self.name, input_shape))
        if len(shapes) == 1:
            return shapes[0]
        return self.joined_shape(*shapes, input_shape)

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        """Returns the shapes of the outputs for one tensor, or for two streams.

        In a sequence, one tensor becomes two streams at the first `RevBlock`.
        """
        raise NotImplementedError

    def call_arguments(
        self, training: bool | None, masks: tuple, extra: dict
    ) -> CallArguments:
        self._refuse_mask(masks)
        return super().call_arguments(training, masks, extra)

    def compute_mask(self, inputs: Tensors, previous_mask: Tensors | None) -> Tensors:
        self._refuse_mask(tf.nest.flatten(previous_mask))
        return super().compute_mask(inputs, previous_mask)

    def _refuse_mask(self, masks):
        layers = [layer for layer, _ in self.blocks_in_order() if layer.moves_positions]
        if layers and any(mask is not None for mask in masks):
            raise ValueError(
                f"Expected an input without a mask, because {layers[0].name} moves "
                f"positions to channels; {self.name} got a mask. Remove the mask, or "
                "apply it before."
            )

    def inverse(
        self,
        outputs: Tensors,
        training: bool = False,
        mask: Tensors | None = None,
        **kwargs,
    ) -> Tensors:
        """Returns the input that the layer maps to `outputs`.

        The method does not update the state of the layer.

        Args:
            outputs: tensor or pair of tensors, the output of the layer.
            training: bool, passed to the branches. With `True`, batch statistics are
                those of the given batch. Dropout then draws another mask than in the
                forward pass, and the result is not the input. Defaults to `False`.
            mask: mask of `outputs`, or a pair of masks.
            **kwargs: the keyword arguments of the call of the layer.

        Returns:
            A tensor or pair like `outputs`, in the dtype of the streams.

        Raises:
            ValueError: the layer is not built, or `outputs` is symbolic or has a shape
                that no output of the layer has.
        """
        if not self.built:
            raise ValueError(
                f"Expected a layer with weights; {self.name} has none yet. Call or "
                "build it first."
            )
        if any(isinstance(y, keras.KerasTensor) for y in tf.nest.flatten(outputs)):
            raise ValueError(
                "Expected tensors with values; got a symbolic KerasTensor. Call "
                f"`{self.name}.inverse` in the `call` of a layer of your own, and use "
                "that layer in the model."
            )
        outputs = self.cast(tf.nest.map_structure(tf.convert_to_tensor, outputs))
        self._check_output(outputs)
        pair_in, pair_out = self.pairs(outputs)
        arguments = self.call_arguments(training, pair_out.split_mask(mask), kwargs)
        blocks = []
        after = itertools.islice(self.blocks_in_order(), len(pair_in.leading), None)
        for layer, _ in after:
            owner = _functional.Variables(layer)
            blocks.append((layer.block(arguments, owner), owner, None, None))
        steps, weights, state = _functional.steps(blocks)
        values = _functional.values(weights), _functional.values(state)
        streams = pair_out.split(tf.nest.flatten(outputs))
        streams = _coupling.inverse(steps, streams, pair_in, *values)
        return tf.nest.pack_sequence_as(outputs, pair_in.join(streams))

    def _check_output(self, outputs):
        """Raises `ValueError` if no output of the layer has the widths of `outputs`."""
        shapes = [tuple(y.shape) for y in tf.nest.flatten(outputs)]
        shapes = listed(self.name, shapes if len(shapes) > 1 else shapes[0])
        expected = self._output_shapes
        if len(shapes) < len(expected):
            shapes = self.stream_shapes(shapes[0])
        elif len(shapes) > len(expected):
            expected = self.stream_shapes(expected[0])
        for got, known in zip(shapes, expected, strict=True):
            if got[self.axis] != known[self.axis] and known[self.axis] is not None:
                raise ValueError(
                    f"Expected the output of {self.name}, which has streams of the "
                    f"shapes {expected}; got {shapes}. Give `inverse` a tensor, or a "
                    "pair, of this width."
                )

    def get_config(self) -> dict:
        return {**super().get_config(), "fraction_bits": self.fraction_bits}


@keras.saving.register_keras_serializable("revnet_tf")
class RevBlock(_ReversibleLayer):
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
class RevSequence(_ReversibleLayer):
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
        blocks: Sequence[_ReversibleLayer],
        *,
        recompute: bool = True,
        fraction_bits: int | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        blocks = tuple(blocks)
        for block in blocks:
            if not isinstance(block, _ReversibleLayer):
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

    def blocks_in_order(self) -> Iterator[tuple[_ReversibleLayer, bool]]:
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


class _Rearrangement(_ReversibleLayer):
    """A reversible layer without weights, on the last axis.

    Subclasses define `shapes_after`, `there` and `back`: functions of one tensor or of
    two streams, as in a `_coupling.Rearrangement`.
    """

    takes_whole = True
    adds_zeros = False

    def __init__(self, **kwargs):
        super().__init__(axis=-1, **kwargs)
        self.supports_masking = True

    def build(self, input_shape: Shapes) -> None:
        shapes = listed(self.name, input_shape)
        if any(len(shape) < 2 or not shape[-1] for shape in shapes):
            raise ValueError(
                f"Expected an input of {self.name} of shape (batch, ..., channels), "
                f"with a known number of channels; got {input_shape}. Give the size of "
                "the last axis."
            )
        self._widths = [shape[-1] for shape in shapes]
        self._output_shapes = self.shapes_after(shapes)

    def widths(self, num_streams: int) -> list[int]:
        """Returns the widths of the input as one tensor, or as two streams."""
        if len(self._widths) == num_streams:
            return self._widths
        return [sum(self._widths) // num_streams] * num_streams

    def pairs(self, tensors: Tensors) -> tuple[Pair, Pair]:
        before, after = sum(self._widths), sum(s[-1] for s in self._output_shapes)
        if before % 2 or after % 2:
            return Pair(), Pair()
        return super().pairs(tensors)

    def block(
        self, arguments: CallArguments | None = None, owner: Variables | None = None
    ) -> _coupling.Rearrangement:
        return _coupling.Rearrangement(self._checked_there, self.back, self.adds_zeros)

    def _checked_there(self, tensors):
        shapes = [tuple(x.shape) for x in tensors]
        widths = self.widths(len(shapes))
        if [shape[-1] for shape in shapes] != widths:
            raise ValueError(
                f"Expected {' and '.join(map(str, widths))} channels, for which "
                f"{self.name} was built; got inputs of the shapes {shapes}. Make a new "
                "layer for another width."
            )
        self.shapes_after(shapes)
        return self.there(tensors)

    def get_config(self) -> dict:
        config = super().get_config()
        del config["axis"]  # The constructor has none.
        return config


@keras.saving.register_keras_serializable("revnet_tf")
class SpaceToDepth(_Rearrangement):
    """Moves the positions in each block of space to the channels, without loss.

    The layer is reversible and has no weights. It takes the place of a stride: it
    divides height and width by `block_size` and loses no value.

    The layer acts on each stream by itself:

    - A pair: on each of the two tensors.
    - One tensor: on both halves of the channels, the streams of a `RevBlock`. If the
      number of channels is odd, on the whole tensor.
    - In a `RevSequence` that is called on one tensor: before the first `RevBlock` on
      the whole tensor, later on each stream.

    After the first `RevBlock`, layers that are called one by one therefore equal a
    sequence. Before it, the order of the channels differs if their number is even.

    Args:
        block_size: int, the size of a block in each spatial dimension, at least 2.
            Defaults to `2`.
        **kwargs: the arguments `recompute` and `fraction_bits` of `RevBlock`, and those
            of `keras.layers.Layer`.

    Input shape:
        `(batch, *sizes, channels)` with one, two or three sizes, such as
        `(batch, height, width, channels)`, or a pair of such tensors. `block_size`
        must divide the sizes.

    Output shape:
        The sizes are divided by `block_size`. With `n` sizes there are
        `block_size**n` times as many channels. The channels of a stream have the order
        (position in the block, channel). In two dimensions the values for a stream are
        those of `tf.nn.space_to_depth`.

    Raises:
        ValueError: `block_size` does not divide a size that is known when the layer is
            built or called, or the input has a mask.
        tf.errors.InvalidArgumentError: `block_size` does not divide a size that is not
            known before.

    Reference:
        Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088
    """

    moves_positions = True

    def __init__(self, block_size: int = 2, **kwargs):
        super().__init__(**kwargs)
        if type(block_size) is not int or block_size < 2:
            raise ValueError(
                "block_size must be an integer of at least 2; got "
                f"block_size={block_size!r}."
            )
        self.block_size = block_size

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        return [self._shape_after(shape) for shape in shapes]

    def _shape_after(self, shape):
        batch_size, *sizes, channels = shape
        if not 1 <= len(sizes) <= 3:
            raise ValueError(
                "Expected an input of shape (batch, *sizes, channels) with one, two or "
                f"three sizes; {self.name} got the shape {shape}."
            )
        if any(size and size % self.block_size for size in sizes):
            raise ValueError(
                f"Expected sizes that block_size={self.block_size} divides; "
                f"{self.name} got the shape {shape}. Resize, crop or pad the input."
            )
        inner = (size and size // self.block_size for size in sizes)
        return batch_size, *inner, channels * self.block_size ** len(sizes)

    def there(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [space_to_depth(self._divisible(x), self.block_size) for x in tensors]

    def back(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [depth_to_space(x, self.block_size) for x in tensors]

    def _divisible(self, x):
        """Returns `x`, and raises an error if an open size is not divisible."""
        if None not in x.shape[1:-1]:
            return x
        sizes = tf.shape(x)[1:-1]
        fits = tf.reduce_all(sizes % self.block_size == 0)
        text = (
            f"Expected sizes that block_size={self.block_size} divides. Resize, crop "
            f"or pad the input of {self.name}. The sizes:"
        )
        with tf.control_dependencies([tf.debugging.Assert(fits, [text, sizes])]):
            return tf.identity(x)

    def get_config(self) -> dict:
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("revnet_tf")
class ChannelPadding(_Rearrangement):
    """Adds zeros as the last channels. The inverse drops them.

    The layer is reversible and has no weights. It acts on one tensor, or on the join of
    a pair: it joins the streams, adds the channels, and splits the result into two
    equal streams.

    Args:
        channels: int, the channels of the output, both streams together.
        **kwargs: the arguments `recompute` and `fraction_bits` of `RevBlock`, and those
            of `keras.layers.Layer`.

    Input shape:
        `(batch, ..., channels)`, or a pair of such tensors.

    Output shape:
        The shape of the input with `channels` on the last axis. For a pair, each tensor
        has half of them.

    The backward pass of a `RevBlock` after the padding gets exact zeros: in a sequence
    in every mode, else in a graph. A sequence that is called on one tensor and begins
    with a padding also uses its own input in the backward pass.

    Raises:
        ValueError: the input has more than `channels` channels, or it is a pair and
            `channels` is odd.

    Reference:
        Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088
    """

    adds_zeros = True

    def __init__(self, channels: int, **kwargs):
        super().__init__(**kwargs)
        if type(channels) is not int or channels < 1:
            raise ValueError(
                f"channels must be an integer above 0; got channels={channels!r}."
            )
        self.channels = channels

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        width = sum(shape[-1] for shape in shapes)
        if width > self.channels:
            raise ValueError(
                f"Expected at most {self.channels} channels, because the padding of "
                f"{self.name} drops none; got {width}. Use channels={width} or more."
            )
        if self.channels % len(shapes):
            raise ValueError(
                f"Expected an even number of channels for two streams; {self.name} has "
                f"channels={self.channels}. Use {self.channels + 1}."
            )
        return [(*shape[:-1], self.channels // len(shapes)) for shape in shapes]

    def there(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        x = tf.concat(tensors, -1)
        extra = self.channels - x.shape[-1]
        x = tf.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[0, extra]])
        return tf.split(x, len(tensors), -1)

    def back(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        widths = self.widths(len(tensors))
        x = tf.concat(tensors, -1)[..., : sum(widths)]
        return tf.split(x, widths, -1)

    def get_config(self) -> dict:
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("revnet_tf")
class Split(_Rearrangement):
    """Makes a `RevSequence` split one tensor here, before its first `RevBlock`.

    The layer changes no value and no shape.

    Args:
        **kwargs: arguments of `keras.layers.Layer`.
    """

    takes_whole = False

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        return list(self.stream_shapes(shapes if len(shapes) == 2 else shapes[0]))

    def there(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return list(tensors)

    def back(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return list(tensors)


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


@keras.saving.register_keras_serializable("revnet_tf")
class Recompute(RunLayer):
    """Stores the inputs of a layer only, and recomputes the layer in the backward pass.

    In training, the activations inside the layer are not stored. The backward pass
    evaluates the layer once more, for the computation of one more forward pass. The
    second evaluation has the weights, the moving statistics and the dropout masks of
    the first one. Moving statistics and seeds advance once, and losses count once.

    `keras.remat` has this purpose, too. With TensorFlow it updates the moving
    statistics twice and draws new dropout masks.

    Args:
        layer: Keras layer or model, with any inputs and outputs.
        recompute: bool; `False`: use ordinary backpropagation (same values, more
            memory). The attribute can be set at any time. It takes effect in the next
            trace of the model. Defaults to `True`.
        **kwargs: arguments of `keras.layers.Layer`. The dtype is that of `layer`.

    Call arguments:
        *args, **kwargs: the call arguments of `layer`: tensors, also sparse, ragged and
            nested ones, and other values. Masks of tensors reach the layer. A tensor
            that the layer finds in another way has no gradient.
        training: bool. With `False` or `None` the layer is called as it is.

    Output shape:
        The output of `layer`, with its masks.

    Raises:
        ValueError: `layer` is no Keras layer, or `dtype` is not the dtype of the layer.
            Or the layer has an effect that cannot be repeated; the message names it.
        NotImplementedError: a second or a forward-mode derivative is taken.

    Example:

    >>> attention = keras.layers.MultiHeadAttention(8, 64, dropout=0.1)
    >>> y = revnet_tf.Recompute(attention)(query, value)
    """

    LAYERS = ("layer",)

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        recompute: bool = True,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"layer must be a Keras layer or model; got {layer!r}.")
        policy = layer.dtype_policy
        if dtype is not None and keras.dtype_policies.get(dtype).name != policy.name:
            raise ValueError(
                f"Expected the dtype of {layer.name}, {policy.name}; got "
                f"dtype={dtype}. Give the dtype to the layer only."
            )
        # The layer itself casts its inputs.
        super().__init__(recompute=recompute, dtype=policy, autocast=False, **kwargs)
        self.layer = layer
        self.supports_masking = True

    def specs(self, args: tuple, kwargs: dict) -> dict:
        return symbolic({"args": args, **kwargs}, leave_out=("training",))

    def build(self, input_shape: Shapes | None = None) -> None:
        if self.layer.built:
            return
        if input_shape is not None:
            self.layer.build(input_shape)
            return
        arguments = dict(self._extra_specs)
        self.layer(*arguments.pop("args", ()), **arguments)

    def call(self, *args, training: bool | None = None, **kwargs) -> Any:
        if self.stores(static_bool(training)) or not self.recompute:
            return self.layer(*args, training=training, **kwargs)
        given = args, kwargs
        inputs, pack_inputs = _tensors((given, _masks(given)))
        pair, pack_outputs = pair_of_origin(inputs), None

        def evaluate(*streams):
            nonlocal pack_outputs
            given = _with_masks(pack_inputs(pair.join(streams)))
            outputs = self.layer(*given[0], training=training, **given[1])
            outputs, pack_outputs = _tensors((outputs, _masks(outputs)))
            return outputs

        received = self.received(inputs, pair)
        ends = pair, Pair()
        outputs, handoff = self.run([self], inputs, evaluate, ends, received)
        self.tell_origin(outputs, handoff)
        return _with_masks(pack_outputs(outputs))

    def block(
        self, evaluate: Callable, owner: Variables | None = None
    ) -> _coupling.Recompute:
        return _coupling.Recompute(owner.function(self.layer.name, evaluate, {}))

    def compute_output_spec(self, *args, **kwargs) -> Any:
        return self.layer(*args, **kwargs)

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Returns `None`: the call of the layer has given masks to the outputs."""


@keras.saving.register_keras_serializable("revnet_tf")
class Stem(Recompute):
    """`Recompute` of the first layers of a network.

    A class of its own, because the name of the class is in the files of weights.
    """

    @classmethod
    def from_config(cls, config: dict) -> Self:
        # Version 0.1 wrote these two, and cast the output to the dtype.
        left_out = ("axis", "dtype")
        return super().from_config(
            {k: v for k, v in config.items() if k not in left_out}
        )


def _tensors(nested):
    """Returns the tensors in a nested structure, and a function that packs others."""
    flat = tf.nest.flatten(nested, expand_composites=True)
    where = [i for i, x in enumerate(flat) if tf.is_tensor(x)]

    def pack(tensors):
        filled = list(flat)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        return tf.nest.pack_sequence_as(nested, filled, expand_composites=True)

    return [flat[i] for i in where], pack


def _masks(nested):
    """Returns the mask of each leaf of a nested structure, or `None`."""
    return [getattr(x, "_keras_mask", None) for x in tf.nest.flatten(nested)]


def _with_masks(pair):
    """Returns the first of two nested structures, with the second one as its masks."""
    nested, masks = pair
    for x, mask in zip(tf.nest.flatten(nested), masks, strict=True):
        if mask is not None:
            x._keras_mask = mask
    return nested
