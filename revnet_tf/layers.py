"""The blocks of reversible networks: Keras layers that reverse or recompute."""

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
from revnet_tf._pair import Pair, Shape, Shapes, Tensors, pair_of

__all__ = [
    "DownsamplingBlock",
    "PoolingShortcut",
    "Recompute",
    "RevBlock",
    "RevSequence",
]


class _ReversibleLayer(PairLayer):
    """A layer whose blocks are all reversible. It therefore has an inverse."""

    stores_inputs = False

    def __init__(self, *, fraction_bits: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if fraction_bits is not None:
            _fixed_point.validate(fraction_bits, self.compute_dtype)
        self.fraction_bits = fraction_bits

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
        self.stream_shapes(tf.nest.map_structure(lambda y: tuple(y.shape), outputs))
        pair = pair_of(outputs, self.axis)
        arguments = self.call_arguments(training, pair.split_mask(mask), kwargs)
        blocks = []
        for layer, _ in self.blocks_in_order():
            owner = _functional.Variables(layer)
            blocks.append((layer.block(arguments, owner), owner, None, None))
        steps, weights, state = _functional.steps(blocks)
        values = _functional.values(weights), _functional.values(state)
        streams = _coupling.inverse(
            steps, pair.split(tf.nest.flatten(outputs)), *values
        )
        return tf.nest.pack_sequence_as(outputs, pair.join(streams))

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

    Args:
        blocks: list of `RevBlock` and `RevSequence`, with the same `axis` and dtype.
            Blocks with `recompute=False` use ordinary backpropagation and split the
            run. Each run between them stores its own last outputs.
        recompute: bool; `False`: use ordinary backpropagation for all blocks (same
            values, more memory). Defaults to `True`.
        fraction_bits: int or `None`, the argument of `RevBlock`, for all blocks. The
            sequence does not change the blocks. Defaults to the value of the blocks.
        **kwargs: arguments of `keras.layers.Layer`.

    Attributes:
        blocks: tuple of the blocks.

    Call arguments, output shape and errors are those of `RevBlock`.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    LAYERS = ("blocks",)

    def __init__(
        self,
        blocks: "Sequence[RevBlock | RevSequence]",
        *,
        recompute: bool = True,
        fraction_bits: int | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        blocks = tuple(blocks)
        for block in blocks:
            if not isinstance(block, (RevBlock, RevSequence)):
                raise ValueError(
                    "Every entry of blocks must be a RevBlock or a RevSequence; got "
                    f"{block!r}."
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

    def build_streams(self, shape1: Shape, shape2: Shape) -> None:
        for block in self.blocks:
            if not block.built:
                block._extra_specs = self._extra_specs
                block.build((shape1, shape2))

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
            x = tf.nn.avg_pool(x, self.strides, self.strides, "SAME")
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
