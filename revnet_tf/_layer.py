"""The Keras side of a run: what all layers that recompute have in common."""

import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import keras
import tensorflow as tf

from revnet_tf import _coupling, _fixed_point, _functional
from revnet_tf._functional import CallArguments, Variables
from revnet_tf._pair import (
    Pair,
    Shape,
    Shapes,
    Tensors,
    joined_shape,
    pair_of,
    stream_shapes,
)

# Attribute of a symbolic output tensor: its `_Origin`.
_ORIGIN = "_revnet_tf_origin"

_observer = contextvars.ContextVar("observer", default=None)


class Observer:
    """Follows the layers that are called in its context, `with Observer(): ...`.

    A subclass overrides what it needs.

    Args:
        store: bool, whether the layers store their activations, whatever their
            `recompute` says.
    """

    # Or `reconstructed(layer, inputs, reconstructed)`, called in the backward pass of
    # each block: two lists of tensors, the true inputs and the reconstructed ones.
    reconstructed = None

    def __init__(self, store: bool = False):
        self.store = store

    def called(self, layer: "RunLayer") -> None:
        """Is called in each call of a layer, in the name scope of the call."""

    def __enter__(self):
        self._token = _observer.set(self)
        return self

    def __exit__(self, *_):
        _observer.reset(self._token)


class _Origin(NamedTuple):
    """Where a tensor comes from.

    Attributes:
        handoff: the `Handoff` of the run.
        index: int, the position among the outputs of the run.
        fraction_bits: int or `None`, of the streams.
    """

    handoff: _coupling.Handoff
    index: int
    fraction_bits: int | None


class RunLayer(keras.layers.Layer):
    """A layer whose call is a run of blocks.

    A subclass defines `block`, and names in `LAYERS` the constructor arguments that are
    layers or lists of them.

    The outputs have the variable dtype of the policy, under a mixed policy, too. Only
    the branches compute in the lower precision.

    Args:
        recompute: bool; `False`: use ordinary backpropagation.
    """

    LAYERS = ()
    # Whether the backward pass of the first block uses stored inputs.
    stores_inputs = True
    fraction_bits = None
    # The token that `promise_alike` gives to layers of one kind.
    _promise = None

    def __init__(
        self,
        *,
        recompute: bool = True,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        policy = keras.dtype_policies.get(dtype)
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        self.recompute = recompute
        self._extra_specs = {}
        self._traced = set()

    def block(self, arguments: CallArguments, owner: Variables | None = None) -> tuple:
        """Returns the block of `_coupling` that the layer is.

        Args:
            arguments: `CallArguments`.
            owner: the `Variables` of its pure functions; `None` for ordinary ones.
        """
        raise NotImplementedError

    def blocks_in_order(self) -> Iterator[tuple["RunLayer", bool]]:
        """Yields the layers whose blocks are the run, and whether each recomputes."""
        yield self, self.recompute

    def branches(self) -> list[keras.layers.Layer]:
        return [getattr(self, name) for name in self.LAYERS]

    def __call__(self, *args, **kwargs):
        if not self.built:
            # Keras tells `build` the shape of the inputs only.
            self._extra_specs = _specs(kwargs)
        return super().__call__(*args, **kwargs)

    def get_build_config(self) -> dict | None:
        config = super().get_build_config()
        if config and self._extra_specs:
            config["extra"] = tf.nest.map_structure(
                lambda x: [x.shape, x.dtype, x.sparse, x.ragged], self._extra_specs
            )
        return config

    def build_from_config(self, config: dict) -> None:
        self._extra_specs = _restored_specs(config.get("extra", {}))
        super().build_from_config({"input_shape": config["input_shape"]})

    def apply_blocks(
        self,
        inputs: list[tf.Tensor],
        arguments: CallArguments,
        entry: Pair,
        exit: Pair,
    ) -> list[tf.Tensor]:
        """Returns what the blocks make of a list of tensors, as a list of tensors."""
        if observer := _observer.get():
            observer.called(self)
        store = not arguments.training or bool(observer and observer.store)
        received = None if store else self._received(inputs, entry)
        if self.fraction_bits is not None and received is None:
            inputs = [
                _fixed_point.convert(x, self.fraction_bits, not arguments.training)
                for x in inputs
            ]
        runs = [
            (recompute and not store, [layer for layer, _ in found])
            for recompute, found in itertools.groupby(
                self.blocks_in_order(), lambda found: found[1]
            )
        ]
        handoff = None
        for i, (recompute, layers) in enumerate(runs):
            ends = entry if i == 0 else Pair(), exit if i == len(runs) - 1 else Pair()
            if recompute:
                inputs, handoff = self._run(layers, inputs, arguments, ends, received)
            else:
                streams, handoff = ends[0].split(inputs), None
                for layer in layers:
                    streams, _ = layer.block(arguments).forward(_ordinary, *streams)
                inputs = ends[1].join(streams)
            received = None
        if handoff is not None and not tf.executing_eagerly():
            for i, y in enumerate(inputs):
                setattr(y, _ORIGIN, _Origin(handoff, i, self.fraction_bits))
        return inputs

    def _received(self, inputs, entry):
        """Returns the handoff of the run that returned `inputs`, or `None`."""
        origins = [getattr(x, _ORIGIN, None) for x in inputs]
        if origins[0] is None or tf.executing_eagerly():
            return None
        handoff, _, fraction_bits = origins[0]
        same = [_Origin(handoff, i, fraction_bits) for i in range(handoff.num_outputs)]
        if origins != same or handoff.pair != entry:
            return None
        # A run in another format would give back other values.
        if fraction_bits != self.fraction_bits and not self.stores_inputs:
            return None
        return handoff

    def _run(self, layers, inputs, arguments, ends, received):
        tell = getattr(_observer.get(), "reconstructed", None)
        blocks = []
        for layer, traces in zip(layers, _shared_traces(layers), strict=True):
            owner = Variables(layer)
            block = layer.block(arguments, owner)
            blocks.append(
                (block, owner, traces, tell and functools.partial(tell, layer))
            )
        steps, weights, state = _functional.steps(blocks)
        values, old_state = _functional.values(weights), _functional.values(state)
        with _functional.repeatable_operations():
            result = _coupling.run(steps, inputs, *ends, values, old_state, received)
        self._trace_once(layers, steps, inputs, ends[0], values, old_state)
        for variable, old, new in zip(state, old_state, result.state, strict=True):
            if new is not old:
                variable.assign(new)
        for loss in result.losses:
            self.add_loss(loss)
        return result.outputs, result.handoff

    def _trace_once(self, layers, steps, inputs, entry, *tensors):
        # Only a graph shows the operations of a branch.
        if not tf.executing_eagerly() or _num_replicas() > 1:
            return
        if not self._traced >= {id(layer) for layer in layers}:
            _functional.trace(steps, entry.split(inputs), *tensors)
            self._traced.update(id(layer) for layer in layers)

    def rematerialized_call(self, layer_call: Callable, *args, **kwargs) -> Callable:
        # In a `keras.RematScope`: the layer recomputes already.
        return layer_call

    def get_config(self) -> dict:
        # The layers themselves: Keras serializes them, and notices shared ones.
        layers = {name: getattr(self, name) for name in self.LAYERS}
        return {**super().get_config(), "recompute": self.recompute, **layers}

    @classmethod
    def from_config(cls, config: dict) -> Self:
        return cls(**restore_layers(config, cls.LAYERS))

    def call_arguments(
        self, training: bool | None, masks: tuple, extra: dict
    ) -> CallArguments:
        """Returns the `CallArguments` of a call."""
        for name in extra:
            if not any(_functional.accepts(layer, name) for layer in self.branches()):
                raise TypeError(
                    f"{self.name} got an unexpected argument {name!r}: the call of "
                    "none of its branches names it."
                )
        return CallArguments(_static_bool(training), masks, extra, self.fraction_bits)

    def cast(self, inputs: Tensors) -> Tensors:
        """Returns nested tensors in the dtype of the layer."""
        if any(tf.as_dtype(x.dtype).is_complex for x in tf.nest.flatten(inputs)):
            raise ValueError(
                f"{self.name} takes real numbers, and got complex ones; give it real "
                "and imaginary parts as channels, for example."
            )
        # Keras casts floating-point inputs only; integers would truncate the sums.
        return tf.nest.map_structure(lambda x: tf.cast(x, self.compute_dtype), inputs)

    def shape_after(self, layer: keras.layers.Layer, shape: Shape) -> Shape:
        """Returns the shape to which `layer` maps a tensor, and builds the layer."""
        extra = {
            k: v for k, v in self._extra_specs.items() if _functional.accepts(layer, k)
        }
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


class PairLayer(RunLayer):
    """A layer that maps two streams, or one tensor split in two, to the same.

    A subclass defines `build_streams(shape1, shape2)`, too.

    Args:
        axis: int, the axis on which one tensor is split into two streams.
    """

    def __init__(self, *, axis: int = -1, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis={axis!r} must be an integer, as -1 or 3.")
        self.axis = axis

    def build(self, input_shape: Shapes) -> None:
        self.build_streams(*self.stream_shapes(input_shape))

    def call(
        self,
        inputs: Tensors,
        training: bool | None = None,
        mask: Tensors | None = None,
        **kwargs,
    ) -> Tensors:
        inputs = self.cast(inputs)
        pair = pair_of(inputs, self.axis)
        arguments = self.call_arguments(training, pair.split_mask(mask), kwargs)
        outputs = self.apply_blocks(tf.nest.flatten(inputs), arguments, pair, pair)
        return tf.nest.pack_sequence_as(inputs, outputs)

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "axis": self.axis}

    def stream_shapes(self, input_shape: Shapes) -> tuple[Shape, Shape]:
        """Returns the shapes of both streams; refuses an input that cannot be split."""
        return stream_shapes(self.name, input_shape, self.axis)

    def joined_shape(self, shape1: Shape, shape2: Shape, input_shape: Shapes) -> Shapes:
        return joined_shape(shape1, shape2, input_shape, self.axis)


def promise_alike(layers: Sequence[RunLayer]) -> None:
    """Promises that layers compute one function of their variables: traced once."""
    promise = object()
    for layer in layers:
        layer._promise = promise


def _shared_traces(layers):
    """Returns for each layer the dict of traces that it shares, or `None`.

    Raises:
        ValueError: layers with one promise differ in configuration or in shapes.
    """
    # A `tf.function` hides collectives from the replicas of a strategy, and tensors and
    # name scopes from an observer.
    if tf.executing_eagerly() or _num_replicas() > 1 or _observer.get():
        return [None] * len(layers)
    kinds, traces, found = {}, {}, []
    for layer in layers:
        if layer._promise is None:
            found.append(None)
            continue
        kind = _functional.likeness(layer, layer.branches())
        if kinds.setdefault(layer._promise, kind) != kind:
            raise ValueError(
                f"{layer.name} was made like its neighbours, and has another "
                "configuration or other shapes now. Save and load the model after such "
                "a change: its layers are then traced one by one."
            )
        trainable = _functional.trainability(layer)
        key = layer._promise, trainable, getattr(layer, "anchor", False)
        found.append(traces.setdefault(key, {}))
    return found


def restore_layers(config, names, memo=None):
    """Returns `config` with the layers under `names` made anew.

    They come serialized from a file, and as live layers from `get_config`. A layer that
    is used twice is made once.
    """
    memo = {} if memo is None else memo

    def restore(value):
        if isinstance(value, (list, tuple)):
            return [restore(v) for v in value]
        if not isinstance(value, keras.layers.Layer):
            if "module" in value:
                return keras.saving.deserialize_keras_object(value)
            # An HDF5 file names no modules. Only models read such configurations.
            return keras.Sequential.from_config(
                {"name": None, "layers": [value]}
            ).layers[0]
        if id(value) not in memo:
            inner = value.get_config()
            if isinstance(value, RunLayer):
                inner = restore_layers(inner, value.LAYERS, memo)
                memo[id(value)] = type(value)(**inner)
            else:
                memo[id(value)] = type(value).from_config(inner)
        return memo[id(value)]

    return {**config, **{name: restore(config[name]) for name in names}}


def _ordinary(function, inputs):
    return function(inputs)


def _num_replicas():
    return tf.distribute.get_strategy().num_replicas_in_sync


def _specs(arguments):
    """Returns the tensors among nested arguments as symbolic tensors."""

    def spec(value):
        return keras.KerasTensor(
            value.shape,
            keras.backend.standardize_dtype(value.dtype),
            sparse=isinstance(value, tf.SparseTensor)
            or getattr(value, "sparse", False),
            ragged=isinstance(value, tf.RaggedTensor)
            or getattr(value, "ragged", False),
        )

    return {
        name: tf.nest.map_structure(spec, value)
        for name, value in arguments.items()
        if name not in ("inputs", "training", "mask")
        # Keras refuses a nested argument of tensors and other values.
        and all(
            hasattr(x, "shape") and hasattr(x, "dtype") for x in tf.nest.flatten(value)
        )
    }


def _restored_specs(config):
    """Returns what `get_build_config` has written as nested symbolic tensors."""
    if isinstance(config, dict):
        return {name: _restored_specs(value) for name, value in config.items()}
    if len(config) > 1 and isinstance(config[1], str):
        return keras.KerasTensor(*config)
    return [_restored_specs(value) for value in config]


def _static_bool(training):
    """Returns `training` as a bool; `None` is inference, as for all layers of Keras."""
    if training is None:
        return False
    if tf.is_tensor(training):
        training = tf.get_static_value(training)
    if training is None or not hasattr(training, "__bool__"):
        raise ValueError(
            "training must be known when the model is traced; pass a Python bool."
        )
    return bool(training)
