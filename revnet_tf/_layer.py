"""The Keras side of a run: the base classes of all layers that recompute."""

import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import keras
import tensorflow as tf

from revnet_tf import _fixed_point, _functional, _run
from revnet_tf._functional import CallArguments, Variables
from revnet_tf._pair import (
    Pair,
    Pairs,
    Shape,
    Shapes,
    Tensors,
    joined_shape,
    stream_shapes,
)

# The attribute of a symbolic output tensor that holds its `_Origin`.
_ORIGIN = "_revnet_tf_origin"

_observer = contextvars.ContextVar("observer", default=None)


class Observer:
    """Observes the calls of layers in its context, `with Observer(): ...`.

    Subclasses override the attribute `reconstructed` or the method `called`.

    Args:
        store: bool; `True`: all layers store their activations, also those with
            `recompute=True`. Defaults to `False`.
    """

    # `None`, or a method `reconstructed(layer, inputs, reconstructed)`. The backward
    # pass of each block calls it with the true and with the reconstructed inputs, two
    # lists of tensors.
    reconstructed = None

    def __init__(self, store: bool = False):
        self.store = store

    def called(self, layer: "RunLayer") -> None:
        """Runs in each call of a layer, in the name scope of the call."""

    def __enter__(self):
        self._token = _observer.set(self)
        return self

    def __exit__(self, *_):
        _observer.reset(self._token)


class _Origin(NamedTuple):
    """The run that returned a tensor.

    Attributes:
        handoff: `Handoff` of the run.
        index: int, the position among the outputs of the run.
        fraction_bits: int or `None`, the fraction bits of the streams.
    """

    handoff: _run.Handoff
    index: int
    fraction_bits: int | None


class RunLayer(keras.layers.Layer):
    """A layer whose call is a run of blocks.

    Subclasses define `block`. In `LAYERS` they name the constructor arguments that are
    layers or lists of layers.

    Args:
        recompute: bool; `False`: use ordinary backpropagation. Defaults to `True`.
    """

    LAYERS = ()
    # Whether the backward pass of the first block uses stored inputs.
    stores_inputs = True
    fraction_bits = None
    # `promise_alike` gives one token to all layers that compute the same function.
    _promise = None

    def __init__(self, *, recompute: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.recompute = recompute
        self._extra_specs = {}
        self._traced = set()

    def block(self, arguments: CallArguments, owner: Variables | None = None) -> tuple:
        """Returns the layer as a block of `_coupling`.

        Args:
            arguments: `CallArguments` of the call.
            owner: `Variables` of the layer, for pure functions. `None`: the functions
                of the block are ordinary ones.
        """
        raise NotImplementedError

    def blocks_in_order(self) -> Iterator[tuple["RunLayer", bool]]:
        """Yields each layer of the run, and whether its block recomputes."""
        yield self, self.recompute

    def branches(self) -> list[keras.layers.Layer]:
        return [getattr(self, name) for name in self.LAYERS]

    def __call__(self, *args, **kwargs):
        if not self.built:
            # Keras passes only the shape of the inputs to `build`.
            self._extra_specs = self.specs(args, kwargs)
        return super().__call__(*args, **kwargs)

    def specs(self, args: tuple, kwargs: dict) -> dict:
        """Returns the arguments that `build` needs, as symbolic tensors."""
        return symbolic(kwargs, leave_out=("inputs", "training", "mask"))

    def get_build_config(self) -> dict | None:
        config = super().get_build_config()
        if config and self._extra_specs:
            config["extra"] = tf.nest.map_structure(
                lambda x: [x.shape, x.dtype, x.sparse, x.ragged], self._extra_specs
            )
        return config

    def build_from_config(self, config: dict) -> None:
        self._extra_specs = _restored_specs(config.get("extra", {}))
        super().build_from_config({"input_shape": config.get("input_shape")})

    def stores(self, training: bool) -> bool:
        """Tells the observer of a call. Returns whether all blocks store."""
        observer = _observer.get()
        if observer:
            observer.called(self)
        return not training or bool(observer and observer.store)

    def apply_blocks(
        self,
        inputs: list[tf.Tensor],
        arguments: CallArguments,
        pair_in: Pair,
        pair_out: Pair,
    ) -> list[tf.Tensor]:
        """Applies the blocks to a list of tensors, and returns a list of tensors."""
        store = self.stores(arguments.training)
        received, others = ([], []) if store else self.received(inputs, pair_in)
        if self.fraction_bits is not None and not received:
            inputs = [
                _fixed_point.convert(x, self.fraction_bits, not arguments.training)
                for x in inputs
            ]
        runs = [
            (recompute and not store, [layer for layer, _ in found])
            for recompute, found in itertools.groupby(
                # `pair_in` applies the leading blocks.
                itertools.islice(self.blocks_in_order(), len(pair_in.leading), None),
                key=lambda found: found[1],
            )
        ]
        for i, (recompute, layers) in enumerate(runs):
            first, last = i == 0, i == len(runs) - 1
            ends = pair_in if first else Pair(), pair_out if last else Pair()
            if recompute:
                inputs = self.run(layers, inputs, arguments, ends, received, others)
            else:
                streams = ends[0].split(inputs)
                for layer in layers:
                    streams, _ = layer.block(arguments).forward(_ordinary, *streams)
                inputs = ends[1].join(streams)
            received, others = [], []
        return inputs

    def received(
        self, inputs: list[tf.Tensor], pair_in: Pair
    ) -> tuple[list[_run.Handoff], list[_run.Handoff]]:
        """Returns the handoffs of the runs that returned `inputs`, one after the other.

        If there are other inputs, or the runs split them in another way, the first list
        is empty. The second list has the handoffs of other runs that returned some of
        the inputs.
        """
        if tf.executing_eagerly():
            return [], []
        origins = [getattr(x, _ORIGIN, None) for x in inputs]
        others = list({id(o.handoff): o.handoff for o in origins if o}.values())
        if isinstance(pair_in, Pairs):
            parts = [
                self.received([x], pair)[0]
                for x, pair in zip(inputs, pair_in.pairs, strict=True)
            ]
            return (sum(parts, []), []) if all(parts) else ([], others)
        if origins[0] is None:
            return [], others
        handoff, _, fraction_bits = origins[0]
        same = [_Origin(handoff, i, fraction_bits) for i in range(len(handoff.outputs))]
        if origins != same or handoff.pair != pair_in:
            return [], others
        # A run with other fraction bits would give back other values.
        if fraction_bits != self.fraction_bits and not self.stores_inputs:
            return [], others
        return [handoff], []

    def run(
        self,
        layers: list["RunLayer"],
        inputs: list[tf.Tensor],
        arguments: CallArguments,
        ends: tuple[Pair, Pair],
        received: list[_run.Handoff],
        others: list[_run.Handoff],
    ) -> list[tf.Tensor]:
        """Applies blocks that recompute, and returns a list of tensors."""
        observe = getattr(_observer.get(), "reconstructed", None)
        blocks = []
        for layer, traces in zip(layers, _shared_traces(layers), strict=True):
            owner = Variables(layer)
            block = layer.block(arguments, owner)
            blocks.append(
                (block, owner, traces, observe and functools.partial(observe, layer))
            )
        steps, weights, state = _functional.steps(blocks)
        values, old_state = _functional.values(weights), _functional.values(state)
        with _functional.repeatable_operations():
            result = _run.run(steps, inputs, *ends, values, old_state, received, others)
        self._trace_once(layers, steps, inputs, ends[0], values, old_state)
        for variable, old, new in zip(state, old_state, result.state, strict=True):
            if new is not old:
                variable.assign(new)
        for loss in result.losses:
            self.add_loss(loss)
        if not tf.executing_eagerly():
            # They connect the run to the layers that are called on its outputs.
            for i, y in enumerate(result.outputs):
                setattr(y, _ORIGIN, _Origin(result.handoff, i, self.fraction_bits))
        return result.outputs

    def _trace_once(self, layers, steps, inputs, pair_in, *tensors):
        # Eager mode does not show the operations of a branch; a graph does.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if not tf.executing_eagerly() or replicas > 1:
            return
        if not self._traced >= {id(layer) for layer in layers}:
            _functional.trace(steps, pair_in.split(inputs), *tensors)
            self._traced.update(id(layer) for layer in layers)

    def rematerialized_call(self, layer_call: Callable, *args, **kwargs) -> Callable:
        # Keras calls this method in a `keras.RematScope`. The layer recomputes already.
        return layer_call

    def get_config(self) -> dict:
        # Live layers, because Keras serializes them and recognizes shared ones.
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
                    f"Expected an argument that a branch of {self.name} names in its "
                    f"`call`; got {name!r}. Remove it, or add it to a branch."
                )
        return CallArguments(static_bool(training), masks, extra, self.fraction_bits)

    def cast(self, inputs: Tensors) -> Tensors:
        """Returns nested tensors in the dtype of the layer."""
        if any(tf.as_dtype(x.dtype).is_complex for x in tf.nest.flatten(inputs)):
            raise ValueError(
                f"Expected real numbers; {self.name} got complex ones. Give it real "
                "and imaginary parts as channels, for example."
            )
        # Keras casts only floating-point inputs. Integers would truncate the sums.
        return tf.nest.map_structure(lambda x: tf.cast(x, self.compute_dtype), inputs)

    def shape_after(self, layer: keras.layers.Layer, shape: Shape) -> Shape:
        """Builds `layer`, and returns the shape to which it maps a tensor."""
        extra = {
            k: v for k, v in self._extra_specs.items() if _functional.accepts(layer, k)
        }
        # A symbolic call also builds a subclassed layer that has no `build`.
        x = keras.KerasTensor(shape, self.compute_dtype)
        try:
            output = layer(x, training=False, **extra)
        except TypeError as error:
            raise TypeError(
                f"Expected a branch that takes one stream; {layer.name} cannot be "
                f"called on one stream of shape {shape}. Give its other arguments to "
                f"{self.name} by keyword. {error}"
            ) from error
        if isinstance(output, keras.KerasTensor):
            return output.shape
        raise ValueError(
            f"Expected a branch that returns one tensor; {layer.name} returns "
            f"{type(output).__name__}. Change its `call`."
        )


class StreamLayer(RunLayer):
    """A layer that maps streams to streams.

    The streams have the variable dtype of the policy, also under a mixed policy. Only
    the branches compute in the lower precision.
    """

    def __init__(self, *, dtype: str | keras.DTypePolicy | None = None, **kwargs):
        policy = keras.dtype_policies.get(dtype)
        super().__init__(dtype=policy.variable_dtype, **kwargs)


class PairLayer(StreamLayer):
    """A layer that maps two streams to two streams.

    The input is a pair of tensors, or one tensor that the layer splits. The output has
    the same structure. Subclasses also define `build_streams(shape1, shape2)`.

    Args:
        axis: int, the axis on which one tensor is split into two streams. Defaults to
            `-1`.
    """

    def __init__(self, *, axis: int = -1, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis must be an integer, such as -1; got axis={axis!r}.")
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
        pair_in, pair_out = self.pairs(inputs)
        arguments = self.call_arguments(training, pair_in.split_mask(mask), kwargs)
        flat = tf.nest.flatten(inputs)
        outputs = self.apply_blocks(flat, arguments, pair_in, pair_out)
        return tf.nest.pack_sequence_as(inputs, outputs)

    def pairs(self, tensors: Tensors) -> tuple[Pair, Pair]:
        """Returns the `Pair`s that split the input and join the output.

        Args:
            tensors: the input or the output, which have the same structure.
        """
        is_pair = isinstance(tensors, (list, tuple))
        pair = Pair() if is_pair else Pair(self.axis % len(tensors.shape))
        return pair, pair

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "axis": self.axis}

    def stream_shapes(self, input_shape: Shapes) -> tuple[Shape, Shape]:
        """Returns the shapes of both streams, or raises an error if there are none."""
        return stream_shapes(self.name, input_shape, self.axis)

    def joined_shape(self, shape1: Shape, shape2: Shape, input_shape: Shapes) -> Shapes:
        return joined_shape(shape1, shape2, input_shape, self.axis)


def promise_alike(layers: Sequence[RunLayer]) -> None:
    """Promises that layers compute one function. TensorFlow then traces it once."""
    promise = object()
    for layer in layers:
        layer._promise = promise


def _shared_traces(layers):
    """Returns for each layer the dict of traces that it shares, or `None`.

    Raises:
        ValueError: layers with one promise differ in configuration or in shapes.
    """
    # A `tf.function` hides collectives from the replicas of a strategy. It also hides
    # tensors and name scopes from an observer.
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if tf.executing_eagerly() or replicas > 1 or _observer.get():
        return [None] * len(layers)
    kinds, traces, found = {}, {}, []
    for layer in layers:
        if layer._promise is None:
            found.append(None)
            continue
        kind = _functional.likeness(layer, layer.branches())
        if kinds.setdefault(layer._promise, kind) != kind:
            raise ValueError(
                f"Expected blocks of a stage that are alike; {layer.name} has another "
                "configuration or other shapes now. Save and load the model after such "
                "a change: TensorFlow then traces its layers one by one."
            )
        trainable = _functional.trainability(layer)
        key = layer._promise, trainable, getattr(layer, "anchor", False)
        found.append(traces.setdefault(key, {}))
    return found


def restore_layers(config, names, memo=None):
    """Returns `config` with new layers under `names`.

    `config` holds serialized layers from a file, or live layers from `get_config`. The
    function makes one new layer for a layer that occurs twice.
    """
    memo = {} if memo is None else memo

    def restore(value):
        if isinstance(value, (list, tuple)):
            return [restore(v) for v in value]
        if not isinstance(value, keras.layers.Layer):
            if "module" in value:
                return keras.saving.deserialize_keras_object(value)
            # HDF5 files name no modules. Only models read such configurations.
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


def pair_of_origin(tensors: list[tf.Tensor]) -> Pair:
    """Returns the `Pair` of the run that returned one tensor, or an empty one."""
    origins = [getattr(x, _ORIGIN, None) for x in tensors]
    if len(origins) == 1 and origins[0] and len(origins[0].handoff.outputs) == 1:
        return origins[0].handoff.pair
    return Pair()


def symbolic(arguments: dict, leave_out: tuple[str, ...] = ()) -> dict:
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
        if name not in leave_out
        # Keras refuses a nested argument that mixes tensors and other values.
        and all(
            hasattr(x, "shape") and hasattr(x, "dtype") for x in tf.nest.flatten(value)
        )
    }


def _restored_specs(config):
    """Returns the output of `get_build_config` as nested symbolic tensors."""
    if isinstance(config, dict):
        return {name: _restored_specs(value) for name, value in config.items()}
    if len(config) > 1 and isinstance(config[1], str):
        return keras.KerasTensor(*config)
    return [_restored_specs(value) for value in config]


def static_bool(training):
    """Returns `training` as a bool. `None` is inference, as in all layers of Keras."""
    if training is None:
        return False
    if tf.is_tensor(training):
        training = tf.get_static_value(training)
    if training is None or not hasattr(training, "__bool__"):
        raise ValueError(
            "Expected a value of `training` that is known when the model is traced; "
            "got an unknown one. Pass a Python bool."
        )
    return bool(training)
