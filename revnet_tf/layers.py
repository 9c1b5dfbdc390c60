"""Reversible Keras layers: `RevBlock` and `RevSequence`, over any pair of branches."""

import inspect
from typing import NamedTuple

import keras
import tensorflow as tf

from revnet_tf import coupling, pure

# Attribute of a symbolic output tensor: how the layer that is called on it next finds
# the `coupling.Handoff` of the run that made it.
_MADE_BY = "_revnet_tf_made_by"


class Arguments(NamedTuple):
    """What the branches of a block are called with, beside a stream.

    Attributes:
        training: a Python `bool`.
        masks: of the first and of the second stream, or `None`.
        extra: keyword arguments of the block's call, for the branches that name them.
    """

    training: bool
    masks: tuple = (None, None)
    extra: dict = {}

    def of(self, layer, stream):
        """Returns the arguments for a branch of the stream with that index."""
        named = {k: v for k, v in self.extra.items() if pure.accepts(layer, k)}
        mask = self.masks[stream]
        if mask is not None and "mask" in inspect.signature(layer.call).parameters:
            named["mask"] = mask
        return named


class TwoStreamLayer(keras.layers.Layer):
    """What the layers that map two streams to two streams have in common.

    A subclass says how it maps the streams, in `forward` (an ordinary computation) and
    in `step` (the same as a step of `coupling.run`), which shapes it takes, in
    `build_streams`, and which of its layers are given further arguments, in
    `branches`. The streams have the variable dtype of the layer's policy, under a mixed
    policy too: only the branches compute in the lower precision.

    Args:
        axis: the axis on which a single tensor is split into the two streams.
        recompute: if `False`, use ordinary backpropagation (same values, more memory).
    """

    def __init__(self, *, axis=-1, recompute=True, dtype=None, **kwargs):
        policy = keras.dtype_policies.get(dtype)
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis={axis!r} must be an integer, as -1 or 3.")
        self.axis = axis
        self.recompute = recompute
        self._extra_specs = {}
        self._checked = set()

    def branches(self):
        return [self.f, self.g]

    def build_streams(self, shape1, shape2):
        raise NotImplementedError

    def forward(self, x1, x2, arguments):
        raise NotImplementedError

    def step(self, variables, arguments):
        raise NotImplementedError

    def runs(self):
        """Returns `(layers, recompute)` pairs, in the order in which they apply."""
        return [([self], self.recompute)]

    def __call__(self, *args, **kwargs):
        if not self.built:
            # Keras tells `build` the shape of the inputs only.
            self._extra_specs = _specs(kwargs)
        return super().__call__(*args, **kwargs)

    def build(self, input_shape):
        self.build_streams(*self.stream_shapes(input_shape))

    def get_build_config(self):
        config = super().get_build_config()
        if config and self._extra_specs:
            config["extra"] = {
                name: (spec.shape, spec.dtype)
                for name, spec in self._extra_specs.items()
            }
        return config

    def build_from_config(self, config):
        self._extra_specs = {
            name: keras.KerasTensor(shape, dtype)
            for name, (shape, dtype) in config.get("extra", {}).items()
        }
        super().build_from_config({"input_shape": config["input_shape"]})

    def call(self, inputs, training=False, mask=None, **kwargs):
        inputs = self._streams_dtype(inputs)
        arguments = self._arguments(inputs, training, mask, kwargs)
        x1, x2 = self._split(inputs)
        received = _handoff_of(inputs, self._axis_of(inputs))
        for layers, recompute in self.runs():
            if recompute and arguments.training:
                result = self._run(layers, x1, x2, arguments, received)
                x1, x2, received = result.y1, result.y2, result.handoff
            else:
                for layer in layers:
                    x1, x2 = layer.forward(x1, x2, arguments)
                received = None
        outputs = self._join(x1, x2, inputs)
        _record_handoff(outputs, self._axis_of(inputs), received)
        return outputs

    def _run(self, layers, x1, x2, arguments, received):
        variables = pure.Variables()
        steps = [layer.step(variables, arguments) for layer in layers]
        if not self._checked >= {id(layer) for layer in layers}:
            pure.refuse_stateful_operations(steps, variables, x1, x2)
            self._checked.update(id(layer) for layer in layers)
        weights, state = variables.values()
        result = coupling.run(steps, x1, x2, weights, state, received)
        for variable, old, new in zip(
            variables.state, state, result.state, strict=True
        ):
            if new is not old:
                variable.assign(new)
        for loss in result.losses:
            self.add_loss(loss)
        return result

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "axis": self.axis, "recompute": self.recompute}

    def _arguments(self, inputs, training, mask, extra):
        branches = self.branches()
        for name in extra:
            if not any(pure.accepts(branch, name) for branch in branches):
                raise TypeError(
                    f"{self.name} got an unexpected argument {name!r}: the call of "
                    "none of its branches names it."
                )
        masks = tuple(mask) if _is_pair(inputs) and mask is not None else (mask, mask)
        return Arguments(_static_bool(training), masks, extra)

    def _streams_dtype(self, inputs):
        # Keras casts floating-point inputs only; integers would truncate the sums.
        return tf.nest.map_structure(
            lambda x: (
                keras.ops.cast(x, self.compute_dtype)
                if x.dtype != self.compute_dtype
                else x
            ),
            inputs,
        )

    def _axis_of(self, inputs):
        """Returns the axis as a non-negative number, `None` for a pair."""
        return None if _is_pair(inputs) else self.axis % len(inputs.shape)

    def _split(self, inputs):
        if _is_pair(inputs):
            return inputs
        return tf.split(inputs, 2, self.axis)

    def _join(self, y1, y2, inputs):
        if _is_pair(inputs):
            return tf.nest.pack_sequence_as(inputs, [y1, y2])
        return tf.concat([y1, y2], self.axis)

    def shape_after(self, layer, shape):
        """Returns the shape to which `layer` maps a stream, and builds the layer."""
        extra = {k: v for k, v in self._extra_specs.items() if pure.accepts(layer, k)}
        # A symbolic call also builds a subclassed layer that has no `build`.
        x = keras.KerasTensor(shape, self.compute_dtype)
        try:
            output = layer(x, training=False, **extra)
        except TypeError as error:
            raise TypeError(
                f"{layer.name} cannot be called on one stream of shape {shape}, as a "
                f"branch has to be; give what else it needs to {self.name} by keyword. "
                f"{error}"
            ) from error
        if isinstance(output, keras.KerasTensor):
            return output.shape
        raise ValueError(
            f"{layer.name} returns {type(output).__name__}; a layer that works on a "
            "stream must return one tensor."
        )

    def joined_shape(self, shape1, shape2, input_shape):
        """Returns the shape of the output for an input of shape `input_shape`."""
        if _is_pair(input_shape[0]):
            return [shape1, shape2]
        shape = list(shape1)
        shape[self.axis] += shape2[self.axis]
        return tuple(shape)

    def stream_shapes(self, input_shape):
        """Returns the shapes of both streams; refuses what cannot be split."""
        shapes = input_shape
        if isinstance(shapes, tf.TensorShape):
            shapes = tuple(shapes.as_list())
        if not isinstance(shapes, (list, tuple)) or not shapes:
            raise ValueError(
                f"{self.name} takes one tensor or a pair (x1, x2); got {shapes!r}."
            )
        if any(isinstance(shape, (list, tuple)) for shape in shapes):
            if len(shapes) != 2 or not all(
                isinstance(shape, (list, tuple))
                and not any(isinstance(size, (list, tuple)) for size in shape)
                for shape in shapes
            ):
                raise ValueError(
                    f"{self.name} takes one tensor or a pair (x1, x2); got inputs of "
                    f"the shapes {shapes!r}."
                )
            return tuple(shapes[0]), tuple(shapes[1])
        rank = len(shapes)
        if not -rank <= self.axis < rank or self.axis % rank == 0:
            raise ValueError(
                f"axis={self.axis} is not an axis that an input of shape "
                f"{tuple(shapes)} can be split on; use one from 1 to {rank - 1}, "
                "or a negative one (axis 0 is the batch)."
            )
        size = shapes[self.axis]
        if not size or size % 2:
            entries = "an unknown number of" if size is None else size
            raise ValueError(
                f"An input of shape {tuple(shapes)} has {entries} entries on "
                f"axis={self.axis}, which cannot be split into two equal streams; use "
                "an even number, or call the layer on a pair (x1, x2)."
            )
        shape = list(shapes)
        shape[self.axis] = size // 2
        return tuple(shape), tuple(shape)


class _ReversibleLayer(TwoStreamLayer):
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
        **kwargs: arguments of `keras.layers.Layer`. The streams have the variable
            dtype of the policy, float32 under `mixed_float16` and `mixed_bfloat16`.

    Call arguments:
        inputs: tensor `(batch, ..., channels)` with an even size on `axis`, or a pair
            `(x1, x2)`.
        training: passed to `f` and `g`, in the forward pass and in the recomputation.
            With `False` nothing is recomputed.

    Output shape:
        That of the input.

    Raises:
        ValueError: the input cannot be split, or a branch changes the shape of its
            stream, also by broadcasting.
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

    def __init__(self, f, g, *, axis=-1, recompute=True, **kwargs):
        super().__init__(axis=axis, recompute=recompute, **kwargs)
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, keras.layers.Layer):
                raise ValueError(f"{name}={branch!r} must be a Keras layer or model.")
        self.f = f
        self.g = g
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
        fx = self.f(x2, training=arguments.training, **arguments.of(self.f, 1))
        y1 = coupling.add(x1, tf.cast(fx, x1.dtype))
        gy = self.g(y1, training=arguments.training, **arguments.of(self.g, 0))
        return y1, coupling.add(x2, tf.cast(gy, x2.dtype))

    def step(self, variables, arguments):
        def branch(layer, stream):
            def call(x, **named):
                return [
                    tf.cast(layer(x, training=arguments.training, **named), x.dtype)
                ]

            return variables.branch(layer, call, arguments.of(layer, stream))

        return coupling.Coupling(branch(self.f, 1), branch(self.g, 0))

    def get_config(self):
        # The layers themselves: Keras serializes them, and notices shared ones.
        return {**super().get_config(), "f": self.f, "g": self.g}

    @classmethod
    def from_config(cls, config):
        return cls(**restore_layers(config, ("f", "g")))


@keras.saving.register_keras_serializable("revnet_tf")
class RevSequence(_ReversibleLayer):
    """Reversible blocks applied in order, storing activations for the last one only.

    Memory for activations does not depend on the number of blocks, in graph mode, with
    XLA and in eager mode.

    Args:
        blocks: list of `RevBlock`, with the same `axis`; a `RevSequence` among them
            stands for its blocks. Blocks with `recompute=False` are differentiated in
            the ordinary way, and split the run.
        recompute: if `False`, use ordinary backpropagation for all blocks (same values,
            more memory). Defaults to `True`.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments, output shape, raises:
        As for `RevBlock`.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    def __init__(self, blocks, *, recompute=True, dtype=None, **kwargs):
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
        super().__init__(axis=axis, recompute=recompute, dtype=stream_dtype, **kwargs)
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

    @classmethod
    def from_config(cls, config):
        return cls(**restore_layers(config, ("blocks",)))


def _common(blocks, name):
    """Returns what all blocks have as attribute `name`."""
    values = {getattr(block, name) for block in blocks}
    if len(values) > 1:
        raise ValueError(
            f"blocks differ in {name}, {sorted(values)}; give all the same."
        )
    return values.pop()


def restore_layers(config, names, memo=None):
    """Returns `config` with the layers under `names` made anew.

    They come serialized from a file, and as live layers from `get_config`; one that is
    used twice is made once.
    """
    memo = {} if memo is None else memo

    def restore(value):
        if isinstance(value, (list, tuple)):
            return [restore(v) for v in value]
        if not isinstance(value, keras.layers.Layer):
            return keras.saving.deserialize_keras_object(value)
        if id(value) not in memo:
            inner = value.get_config()
            if isinstance(value, RevBlock):
                memo[id(value)] = type(value)(**restore_layers(inner, ("f", "g"), memo))
            else:
                memo[id(value)] = type(value).from_config(inner)
        return memo[id(value)]

    return {**config, **{name: restore(config[name]) for name in names}}


def _specs(arguments):
    """Returns the symbolic tensors that stand for the tensors among `arguments`."""
    return {
        name: keras.KerasTensor(
            value.shape, keras.backend.standardize_dtype(value.dtype)
        )
        for name, value in arguments.items()
        if name not in ("inputs", "training", "mask")
        and hasattr(value, "shape")
        and hasattr(value, "dtype")
    }


def _static_bool(training):
    if tf.is_tensor(training):
        training = tf.get_static_value(training)
    if training is None or not hasattr(training, "__bool__"):
        raise ValueError(
            "training must be known when the model is traced; pass a Python bool."
        )
    return bool(training)


def _is_pair(inputs):
    return isinstance(inputs, (list, tuple))


def _handoff_of(inputs, axis):
    """Returns the handoff of the run that made exactly these inputs, or `None`."""
    if tf.executing_eagerly():
        return None
    made_by = [getattr(x, _MADE_BY, None) for x in tf.nest.flatten(inputs)]
    if None in made_by:
        return None
    handoff = made_by[0][0]
    expected = [(handoff, axis, i) for i in range(len(made_by))]
    return handoff if made_by == expected else None


def _record_handoff(outputs, axis, handoff):
    if handoff is not None and not tf.executing_eagerly():
        for i, y in enumerate(tf.nest.flatten(outputs)):
            setattr(y, _MADE_BY, (handoff, axis, i))
