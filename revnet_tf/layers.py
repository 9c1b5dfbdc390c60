"""Reversible Keras layers: `RevBlock` and `RevSequence`, over any pair of branches."""

import keras
import tensorflow as tf

from revnet_tf import coupling, fixed_point, pure
from revnet_tf.steps import Coupling, add
from revnet_tf.streams import TwoStreamLayer


class _ReversibleLayer(TwoStreamLayer):
    """A layer whose steps are all a `steps.Coupling`, so that it has an inverse."""

    def __init__(self, *, fraction_bits=None, **kwargs):
        super().__init__(**kwargs)
        if fraction_bits is not None:
            fixed_point.validate(fraction_bits, self.compute_dtype)
        self.fraction_bits = fraction_bits

    def inverse(self, outputs, training=False, mask=None, **kwargs):
        """Returns the input that the layer maps to `outputs`; updates no state.

        Args:
            outputs: tensor or pair, as the layer returns it.
            training: passed to the branches. With `True`, batch statistics are those
                of the given batch, and what draws random numbers (dropout) draws other
                ones than the forward pass did: such a pass cannot be inverted.
            mask, **kwargs: as the layer was called with.

        Returns:
            A tensor or pair like `outputs`, in the dtype of the streams.
        """
        if not self.built:
            raise ValueError(f"{self.name} has no weights yet; call or build it first.")
        outputs = tf.nest.map_structure(
            lambda y: keras.ops.convert_to_tensor(y, self.compute_dtype), outputs
        )
        self.stream_shapes(tf.nest.map_structure(lambda y: tuple(y.shape), outputs))
        arguments = self._arguments(outputs, training, mask, kwargs)
        variables = pure.Variables()
        steps = [
            layer.step(variables, arguments) for run, _ in self.runs() for layer in run
        ]
        streams = coupling.inverse(steps, *self._split(outputs), *variables.values())
        return self._join(*streams, outputs)

    def get_config(self):
        return {**super().get_config(), "fraction_bits": self.fraction_bits}


@keras.saving.register_keras_serializable("revnet_tf")
class RevBlock(_ReversibleLayer):
    """Reversible residual block: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Reversible means that the inputs can be computed from the outputs. In training, the
    block's activations are therefore not stored: the backward pass rebuilds them, for
    about the computation of one more forward pass.

    Blocks called one after the other (in a functional, sequential or subclassed model)
    keep as little as one block if the training step is a graph, as in `model.fit`. In
    eager mode TensorFlow keeps every block's output; a `RevSequence` does not.

    Args:
        f: layer that maps the second stream to the shape of the first.
        g: layer that maps the first stream to the shape of the second.
        axis: the axis on which a single input is split. Defaults to `-1`.
        recompute: if `False`, use ordinary backpropagation (same values, more memory);
            can be set at any time, and takes effect when the model is traced next.
            Defaults to `True`.
        fraction_bits: integer `k`: the streams are fixed-point numbers, multiples of
            `2**-k` between `-2**(24 - k)` and `2**(24 - k)` (in float64, 53 for 24),
            and are rebuilt bit for bit. The input and what the branches return are
            rounded to them, which gradients pass as if it were not there; leaving the
            range is an error, under XLA NaN. (XLA may also compile a branch in two
            ways, whose results are rounded to neighbouring multiples.) 10 to 14 suit a
            network with normalization. Defaults to `None`, floating-point streams.
        anchor: if `True`, keep the block's inputs, so that what rounding has done to
            the blocks after it goes no further; can be set at any time, as
            `recompute`. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`. The streams have the variable
            dtype of the policy, float32 under `mixed_float16` and `mixed_bfloat16`.

    Call arguments:
        inputs: tensor `(batch, ..., channels)` with an even size on `axis`, or a pair
            `(x1, x2)`.
        training: passed to `f` and `g`, in the forward pass and in the recomputation.
            With `False` nothing is recomputed.
        mask: of the input, or a pair; found by Keras. Goes to the branch that takes
            one, and goes on if both branches support masking.
        **kwargs: for the branches whose `call` names them, with their gradient. (A
            tensor that a branch finds in another way gets none.)

    Output shape:
        That of the input.

    Raises:
        ValueError: the input cannot be split, or a branch changes the shape of its
            stream, also by broadcasting; a branch does what the recomputation cannot
            do again (the message says what).
        TypeError: a keyword argument that no branch names.
        NotImplementedError: for second derivatives and forward-mode derivatives
            through a reconstruction.

    Example:

    >>> branch = lambda: keras.layers.Conv2D(8, 3, padding="same")
    >>> block = revnet_tf.RevBlock(branch(), branch())
    >>> y = block(images)  # (batch, height, width, 16)
    >>> x = block.inverse(y)  # images again

    Reference:
        Gomez et al., 2017, section 3.1, https://arxiv.org/abs/1707.04585
    """

    def __init__(
        self,
        f,
        g,
        *,
        axis=-1,
        recompute=True,
        fraction_bits=None,
        anchor=False,
        **kwargs,
    ):
        super().__init__(
            axis=axis, recompute=recompute, fraction_bits=fraction_bits, **kwargs
        )
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, keras.layers.Layer):
                raise ValueError(f"{name}={branch!r} must be a Keras layer or model.")
        self.f = f
        self.g = g
        self.anchor = anchor
        self.supports_masking = f.supports_masking and g.supports_masking

    def build_streams(self, shape1, shape2):
        self._build_branch("f", shape2, shape1)
        self._build_branch("g", shape1, shape2)

    def _build_branch(self, name, shape, expected):
        got = self.shape_after(getattr(self, name), shape)
        # A size of 1 on one side only would be broadcast by the sum, without a word.
        if len(got) != len(expected) or not all(
            a == b or (None in (a, b) and 1 not in (a, b))
            for a, b in zip(got, expected, strict=True)
        ):
            raise ValueError(
                f"{name} maps a stream of shape {shape} to {got}, but its output is "
                f"added to a stream of shape {expected}; change {name} so that the "
                "shapes agree."
            )

    def forward(self, x1, x2, arguments):
        # A branch that uses its input several times has as many gradients for it. They
        # are added up before that of the other stream is, as the recomputation does it,
        # so that both get the same bits.
        number = self.fraction_bits, not arguments.training
        y1 = add(x1, arguments.call(self.f, 1, tf.identity(x2)), *number)
        y2 = add(x2, arguments.call(self.g, 0, tf.identity(y1)), *number)
        return y1, y2

    def step(self, variables, arguments):
        f = self.branch(self.f, 1, arguments, variables)
        g = self.branch(self.g, 0, arguments, variables)
        return Coupling(f, g, self.fraction_bits, self.anchor)

    def get_config(self):
        return {**super().get_config(), "anchor": self.anchor}


@keras.saving.register_keras_serializable("revnet_tf")
class RevSequence(_ReversibleLayer):
    """Reversible blocks applied in order, storing activations for the last one only.

    Memory for activations does not depend on the number of blocks, in graph mode, with
    XLA and in eager mode.

    Args:
        blocks: list of `RevBlock`, with the same `axis` and dtype. Those with
            `recompute=False` are differentiated in the ordinary way, and split the run.
            A `RevSequence` among them stands for its blocks, and hands them down what
            it says of `recompute` and `trainable`.
        recompute: if `False`, use ordinary backpropagation for all blocks (same values,
            more memory). Defaults to `True`.
        fraction_bits: as for `RevBlock`, for all blocks. Defaults to theirs.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments, output shape, raises:
        As for `RevBlock`.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    LAYERS = ("blocks",)

    def __init__(
        self, blocks, *, recompute=True, fraction_bits=None, dtype=None, **kwargs
    ):
        flat = []
        for block in blocks:
            if isinstance(block, RevSequence):
                for inner in block.blocks:
                    inner.recompute = inner.recompute and block.recompute
                    inner.trainable = inner.trainable and block.trainable
                flat += block.blocks
            elif isinstance(block, RevBlock):
                flat.append(block)
            else:
                raise ValueError(
                    f"blocks holds {block!r}; every block must be a RevBlock or a "
                    "RevSequence."
                )
        if not flat:
            raise ValueError("blocks is empty; give at least one RevBlock.")
        axis = _common(flat, "axis")
        stream_dtype = _common(flat, "compute_dtype")
        if dtype is not None:
            dtype = keras.dtype_policies.get(dtype).variable_dtype
            if dtype != stream_dtype:
                raise ValueError(
                    f"dtype={dtype} is not that of the blocks, {stream_dtype}; give it "
                    "to the blocks, a sequence takes it from them."
                )
        if any(block.activity_regularizer is not None for block in flat):
            raise ValueError(
                "A block of a sequence has no activity that is kept, so its "
                "activity_regularizer would do nothing; give it to f or g."
            )
        if fraction_bits is None:
            fraction_bits = _common(flat, "fraction_bits")
        elif others := {block.fraction_bits for block in flat} - {None, fraction_bits}:
            raise ValueError(
                f"fraction_bits={fraction_bits} is not that of all blocks, which have "
                f"{sorted(others)}, too; give it to the sequence only."
            )
        super().__init__(
            axis=axis,
            recompute=recompute,
            fraction_bits=fraction_bits,
            dtype=stream_dtype,
            **kwargs,
        )
        for block in flat:
            block.fraction_bits = fraction_bits
        self.supports_masking = all(block.supports_masking for block in flat)
        self.blocks = flat
        for i, block in enumerate(flat):
            # `tf.train.Checkpoint` looks for layers in attributes, but not in lists.
            setattr(self, f"block{i + 1}", block)

    def branches(self):
        return [branch for block in self.blocks for branch in (block.f, block.g)]

    def build_streams(self, shape1, shape2):
        for block in self.blocks:
            if not block.built:
                block._extra_specs = self._extra_specs
                block.build((shape1, shape2))

    def runs(self):
        runs = []
        for block in self.blocks:
            recompute = self.recompute and block.recompute
            if runs and runs[-1][1] == recompute:
                runs[-1][0].append(block)
            else:
                runs.append(([block], recompute))
        return runs

    def get_config(self):
        config = super().get_config()
        del config["axis"]  # that of the blocks
        return {**config, "blocks": list(self.blocks)}


def _common(blocks, name):
    """Returns what all blocks have as attribute `name`."""
    values = {getattr(block, name) for block in blocks}
    if len(values) > 1:
        raise ValueError(
            f"blocks differ in {name}, {sorted(values, key=str)}; give all the same."
        )
    return values.pop()
