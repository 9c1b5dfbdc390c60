"""Layers that map two streams to two streams: what they have in common.

Splitting and joining, the dtype of the streams, the arguments that go on to the
branches, and the runs that are recomputed.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from typing import NamedTuple

import keras
import tensorflow as tf

from revnet_tf import coupling, fixed_point, normalization, pure
from revnet_tf.steps import Watched

# Attribute of a symbolic output tensor: its `Origin`, for the layer called on it next.
_ORIGIN = "_revnet_tf_origin"


# Set by the context managers below, for the layers that are called then.
_tell = contextvars.ContextVar("tell", default=None)
_calls = contextvars.ContextVar("calls", default=None)
_ordinary = contextvars.ContextVar("ordinary", default=False)


class Arguments(NamedTuple):
    """What the branches of a block are called with, beside a stream.

    Attributes:
        training: a Python `bool`.
        masks: of the first and of the second stream, `None` where there is none.
        extra: keyword arguments of the block's call, for the branches that name them.
    """

    training: bool
    masks: tuple
    extra: dict

    def of(self, layer, stream):
        """Returns the arguments for a branch of the stream with that index."""
        named = {k: v for k, v in self.extra.items() if pure.accepts(layer, k)}
        mask = self.masks[stream]
        if mask is not None and "mask" in inspect.signature(layer.call).parameters:
            named["mask"] = mask
        return named

    def call(self, layer, stream, x):
        """Returns what `layer` makes of the stream with that index, in its dtype."""
        y = layer(x, training=self.training, **self.of(layer, stream))
        return tf.cast(y, x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """What a layer has made its output of.

    Attributes:
        streams: the pair. Whoever has it need not split what was joined just before.
        handoff: the `coupling.Handoff` of the run that made it, `None` without one.
        fraction_bits: of the streams.
        axis: on which they were joined, `None` for a pair.
    """

    streams: tuple
    handoff: coupling.Handoff | None
    fraction_bits: int | None
    axis: int | None


class TwoStreamLayer(keras.layers.Layer):
    """What the layers that map two streams to two streams have in common.

    A subclass says how it maps the streams, in `forward` (an ordinary computation) and
    in `step` (the same as a step of `coupling.run`), which shapes it takes, in
    `build_streams`, which of its layers are given further arguments, in `branches`, and
    which constructor arguments are layers, in `LAYERS`.

    The streams have the variable dtype of the layer's policy, under a mixed policy too:
    only the branches compute in the lower precision.

    Args:
        axis: the axis on which a single tensor is split into the two streams.
        recompute: if `False`, use ordinary backpropagation (same values, more memory).
    """

    LAYERS = ("f", "g")
    # Of the streams as fixed-point numbers, `None` for floating-point ones.
    fraction_bits = None
    # Whether the gradient needs no more than the layer's inputs, which it keeps.
    keeps_inputs = False

    def __init__(self, *, axis=-1, recompute=True, dtype=None, **kwargs):
        policy = keras.dtype_policies.get(dtype)
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis={axis!r} must be an integer, as -1 or 3.")
        self.axis = axis
        self.recompute = recompute
        self._extra_specs = {}
        self._traced = set()

    def branches(self):
        return [getattr(self, name) for name in self.LAYERS]

    def build_streams(self, shape1, shape2):
        raise NotImplementedError

    def forward(self, x1, x2, arguments):
        raise NotImplementedError

    def step(self, variables, arguments):
        raise NotImplementedError

    def branch(self, layer, stream, arguments, variables):
        """Returns what `Arguments.call` does as a branch of `steps`."""
        named = arguments.of(layer, stream)

        def applied(part, dtype):
            def call(x, **named):
                y = part(x, training=arguments.training, **named)
                return [tf.cast(y, dtype or y.dtype)]

            return call

        parts = [layer] if named else pure.parts(layer)
        *first, last = map(normalization.reusing, parts)
        calls = [*(applied(part, None) for part in first)]
        calls.append(applied(last, self.compute_dtype))
        return variables.branch(layer, calls, named)

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
        if (calls := _calls.get()) is not None:
            calls[tf.get_current_name_scope() + "/"] = self
        # Keras casts floating-point inputs only; integers would truncate the sums.
        inputs = tf.nest.map_structure(lambda x: tf.cast(x, self.compute_dtype), inputs)
        axis = self._axis_of(inputs)
        arguments = self._arguments(inputs, training, mask, kwargs)
        x1, x2, received = self._streams_of(inputs, axis)
        if self.fraction_bits is not None and received is None:
            x1, x2 = (
                fixed_point.convert(x, self.fraction_bits, not arguments.training)
                for x in (x1, x2)
            )
        for layers, recompute in self.runs():
            if recompute and arguments.training and not _ordinary.get():
                result = self._run(layers, x1, x2, arguments, received)
                x1, x2, received = result.y1, result.y2, result.handoff
            else:
                for layer in layers:
                    x1, x2 = layer.forward(x1, x2, arguments)
                received = None
        outputs = self._join(x1, x2, inputs)
        if not tf.executing_eagerly():
            origin = Origin((x1, x2), received, self.fraction_bits, axis)
            for i, y in enumerate(tf.nest.flatten(outputs)):
                setattr(y, _ORIGIN, (origin, i))
        return outputs

    def _streams_of(self, inputs, axis):
        """Returns the streams, and the handoff of the run that made them or `None`."""
        flat = tf.nest.flatten(inputs)
        found = [getattr(x, _ORIGIN, (None, i)) for i, x in enumerate(flat)]
        origin, _ = found[0]
        if (
            origin is None
            or origin.axis != axis
            or found != [(origin, i) for i in range(len(flat))]
            or tf.executing_eagerly()
        ):
            return *self._split(inputs), None
        # Another format would give back other numbers than those it was given.
        same_format = origin.fraction_bits == self.fraction_bits or self.keeps_inputs
        return *origin.streams, origin.handoff if same_format else None

    def _run(self, layers, x1, x2, arguments, received):
        # A function has no part in what the replicas of a strategy do together, as
        # synchronized batch normalization, nor in the name scopes of `calls`.
        variables = pure.Variables(
            share_traces=not tf.executing_eagerly()
            and tf.distribute.get_strategy().num_replicas_in_sync == 1
            and _calls.get() is None
        )
        steps = [layer.step(variables, arguments) for layer in layers]
        if tell := _tell.get():
            steps = [
                Watched(step, functools.partial(tell, layer))
                for layer, step in zip(layers, steps, strict=True)
            ]
        weights, state = variables.values()
        with pure.repeatable_operations():
            result = coupling.run(steps, x1, x2, weights, state, received)
        self._trace_once(layers, steps, variables, x1, x2)
        for variable, old, new in zip(
            variables.state, state, result.state, strict=True
        ):
            if new is not old:
                variable.assign(new)
        for loss in result.losses:
            self.add_loss(loss)
        return result

    def _trace_once(self, layers, steps, variables, x1, x2):
        # Eager mode shows what operations a branch is made of in a graph only.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if tf.executing_eagerly() and replicas == 1:
            if not self._traced >= {id(layer) for layer in layers}:
                pure.trace(steps, variables, x1, x2)
                self._traced.update(id(layer) for layer in layers)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # In a `keras.RematScope`: the layer recomputes already.
        return layer_call

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = {"axis": self.axis, "recompute": self.recompute}
        # The layers themselves: Keras serializes them, and notices shared ones.
        layers = {name: getattr(self, name) for name in self.LAYERS}
        return {**super().get_config(), **config, **layers}

    @classmethod
    def from_config(cls, config):
        return cls(**restore_layers(config, cls.LAYERS))

    def _arguments(self, inputs, training, mask, extra):
        branches = self.branches()
        for name in extra:
            if not any(pure.accepts(branch, name) for branch in branches):
                raise TypeError(
                    f"{self.name} got an unexpected argument {name!r}: the call of "
                    "none of its branches names it."
                )
        axis = self._axis_of(inputs)
        if mask is None:
            masks = None, None
        elif axis is None:
            masks = tuple(mask)
        elif axis < len(mask.shape):
            masks = tuple(tf.split(mask, 2, axis))
        else:
            masks = mask, mask
        return Arguments(_static_bool(training), masks, extra)

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


def watch(tell):
    """Has layers that are called in the context tell what their gradient rebuilds.

    Args:
        tell: `tell(layer, inputs, rebuilt)`, called while the gradient is computed or
            traced, with the pair that the layer had and the pair that it was rebuilt
            as.
    """
    return _set(_tell, tell)


@contextlib.contextmanager
def calls():
    """Returns a dict that gets each layer called, by the name scope of its call."""
    found = {}
    with _set(_calls, found):
        yield found


def ordinary_backpropagation():
    """Has layers that are called in the context work as with `recompute=False`."""
    return _set(_ordinary, True)


@contextlib.contextmanager
def _set(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


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
            if isinstance(value, TwoStreamLayer):
                inner = restore_layers(inner, value.LAYERS, memo)
                memo[id(value)] = type(value)(**inner)
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
