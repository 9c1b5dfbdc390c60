"""Keras layers as pure functions of their variables, for `_run.run`.

The functions call a layer in a `keras.StatelessScope`. The scope gives it the values of
its variables and collects the new values. A second call with the same values then gives
the same result. The functions refuse layers with effects that cannot be repeated. Such
effects would happen twice, or get no gradient.
"""

import contextlib
import inspect
import json
import re
from typing import NamedTuple

import keras
import tensorflow as tf

from revnet_tf import _run
from revnet_tf._pair import Pair

# Operations whose second execution has another result, or a further effect.
_STATEFUL = re.compile(
    "(?!Stateless|RandomIndexShuffle)"
    ".*(Random|Multinomial|TruncatedNormal|Rng|Assign|ResourceScatter|"
    "Stateful(?!PartitionedCall))"
)


_WHOLE = Pair()


class CallArguments(NamedTuple):
    """The arguments of branches beside their inputs.

    Attributes:
        training: bool, whether the step is one of training.
        masks: tuple, for each stream its mask or `None`.
        extra: dict, the further keyword arguments of the block's call.
        fraction_bits: int, the fraction bits of fixed-point streams, or `None`.
    """

    training: bool
    masks: tuple
    extra: dict
    fraction_bits: int | None = None

    def of(self, layer, stream):
        """Returns the arguments that `layer` takes as a branch of a stream."""
        named = {k: v for k, v in self.extra.items() if accepts(layer, k)}
        mask = self.masks[stream]
        if mask is not None and "mask" in inspect.signature(layer.call).parameters:
            named["mask"] = mask
        return named

    def function(self, layer, stream, owner=None, pair=_WHOLE):
        """Returns a branch as a function from a list of tensors to a list.

        Args:
            layer: Keras layer, the branch.
            stream: int, the stream that the branch takes.
            owner: `Variables` of a pure function. `None`: the function is an ordinary
                one.
            pair: `Pair` that splits the output.
        """
        arguments = self.of(layer, stream)

        def call(*inputs, **arguments):
            x = inputs[0] if len(inputs) == 1 else list(inputs)
            y = layer(x, training=self.training, **arguments)
            return pair.split([tf.cast(t, inputs[0].dtype) for t in tf.nest.flatten(y)])

        if owner is None:
            # The identities give a sum the same order as in the recomputation. First
            # come the gradients of the branch for its input, then that of the other
            # stream.
            return lambda inputs: call(*map(tf.identity, inputs), **arguments)
        return owner.function(layer.name, call, arguments)


class Variables:
    """The variables of a layer.

    Attributes:
        weights: list of the variables with gradients, and of the floating-point
            tensors among the arguments of its functions.
        state: list of the other variables.
    """

    def __init__(self, layer):
        # Not `trainable_variables`: a frozen layer has none, even if one of its layers
        # is trainable again.
        self.weights = [v for v in layer.variables if v.trainable]
        self.state = [v for v in layer.variables if not v.trainable]

    def function(self, name, call, arguments):
        """Returns a `Function`.

        Args:
            name: str, the name of the layer, for messages.
            call: function, `call(*inputs, **arguments)` returns a list of tensors.
            arguments: dict of nested structures, which can contain sparse and ragged
                tensors.
        """
        given = tf.nest.flatten(arguments, expand_composites=True)
        where = [i for i, value in enumerate(given) if _is_differentiable(value)]
        # Branches that share a tensor get one position, and the tensor one gradient.
        positions = _positions([given[i] for i in where], self.weights)

        def apply(weights, state, inputs):
            filled = list(given)
            for i, position in zip(where, positions, strict=True):
                filled[i] = weights[position]
            packed = tf.nest.pack_sequence_as(arguments, filled, expand_composites=True)
            scope = _Scope(name, self, weights, state)
            with scope:
                outputs = _InACall(name="branch", autocast=False)(
                    function=lambda: call(*inputs, **packed)
                )
            read = [id(v) in scope.read for v in self.weights]
            return outputs, scope.new_values(self.state), scope.losses, read

        return Function(name, apply)


class Function:
    """A pure function of weights, state and inputs, as blocks call it."""

    def __init__(self, name, apply):
        self._name = name
        self._apply = apply
        self._first_read = None

    def __call__(self, weights, state, inputs):
        return self.trace(weights, state, inputs)[:3]

    def trace(self, weights, state, inputs):
        """Returns also a list of bools: whether the layer read each weight."""
        *results, read = self._apply(weights, state, inputs)
        self._first_read = self._first_read or read
        if self._first_read != read:
            raise ValueError(
                "Expected a branch that reads the same weights in each call; "
                f"{self._name} reads others in its second call. A `tf.function` does "
                "so, because it continues to use the values of its first call. Remove "
                "the decorator (the training step is a graph anyway), or set "
                "`recompute=False` on the block."
            )
        return *results, read

    def check(self, gradients, read):
        """Raises an error if the layer read a weight that gets no gradient."""
        if any(r and d is None for d, r in zip(gradients, read, strict=True)):
            raise ValueError(
                f"Expected a gradient for each trainable weight that {self._name} "
                "reads; for one of them, no gradient reaches it. A custom gradient or "
                "rematerialization inside a branch needs weights that are variables, "
                "but here they are tensors. Remove it (the block recomputes already), "
                "or set `recompute=False` on the block."
            )


def steps(blocks):
    """Returns blocks as steps of a run, and the variables of the run.

    Args:
        blocks: list of tuples `(block, variables, traces, observe)`; see
            `_run.Step`.

    Returns:
        The steps, the weights and the state. A variable of several blocks occurs once.
    """
    weights, state, found = [], [], []
    for block, variables, traces, observe in blocks:
        own_weights = _positions(variables.weights, weights)
        own_state = _positions(variables.state, state)
        found.append(_run.Step(block, own_weights, own_state, traces, observe))
    return found, weights, state


def values(variables):
    """Returns the current values of variables, or of tensors, as tensors."""
    return [
        tf.convert_to_tensor(v.value if isinstance(v, keras.Variable) else v)
        for v in variables
    ]


def likeness(layer, branches):
    """Returns a text that is equal for layers with equal configuration and shapes.

    Names of layers and values of variables do not change the text.

    Args:
        layer: Keras layer.
        branches: list of the layers in it that its call depends on.
    """
    # `_flatten_layers` finds layers in all attributes; no public method does.
    names = {
        inner.name: f"layer {i}" for i, inner in enumerate(layer._flatten_layers())
    }

    def nameless(config):
        if isinstance(config, dict):
            return {k: nameless(v) for k, v in config.items() if k != "trainable"}
        if isinstance(config, (list, tuple)):
            return [nameless(v) for v in config]
        return names.get(config, config) if isinstance(config, str) else config

    config = [keras.saving.serialize_keras_object(branch) for branch in branches]
    shapes = [(v.shape, v.dtype) for v in layer.variables]
    return json.dumps([nameless(config), shapes], sort_keys=True, default=str)


def trainability(layer):
    """Returns for each layer in a layer, and each variable, whether it is trainable."""
    inner = [x.trainable for x in layer._flatten_layers()]
    return *inner, *(v.trainable for v in layer.variables)


@contextlib.contextmanager
def repeatable_operations():
    """Refuses operations that cannot be repeated, if the context adds them to a graph.

    Raises:
        ValueError: the context added such operations. The message names them.
    """
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    # The replicas of a strategy add operations to one graph in turns. Each uses a name
    # scope of its own.
    scope = tf.get_current_name_scope()
    first = len(graph.get_operations())
    yield
    added = [op for op in graph.get_operations()[first:] if op.name.startswith(scope)]
    kinds = {op.type for op in added}
    called = {name for op in added for name in _functions(op.node_def)}
    if called:
        library = graph.as_graph_def().library.function
        nodes = {f.signature.name: f.node_def for f in library}
        ahead = list(called)
        while ahead:
            for node in nodes.get(ahead.pop(), ()):
                kinds.add(node.op)
                new = {*_functions(node)} - called
                ahead += new
                called |= new
    if found := sorted(kind for kind in kinds if _STATEFUL.match(kind)):
        raise ValueError(
            f"Expected a branch that can be repeated; it uses {', '.join(found)}, with "
            "another result in the recomputation. Draw random numbers with "
            "`keras.random` and a `keras.random.SeedGenerator` of the layer. Store "
            "state in the layer's own variables (`add_weight`). Or set "
            "`recompute=False` on the block."
        )


def _functions(node):
    """Yields the names of the functions that an operation of a graph calls."""
    for value in node.attr.values():
        yield from (f.name for f in (value.func, *value.list.func) if f.name)


def trace(steps, inputs, weights, state):
    """Traces steps that ran in eager mode, under `repeatable_operations`.

    Args:
        steps: list of `_run.Step`.
        inputs, weights, state: lists of the tensors of the run.
    """

    @tf.function(autograph=False)
    def forward(streams, weights, state):
        with repeatable_operations():
            return _run.forward(steps, streams, weights, state)[0]

    specs = tf.nest.map_structure(
        lambda t: tf.TensorSpec(t.shape, t.dtype), (list(inputs), weights, state)
    )
    forward.get_concrete_function(*specs)


def accepts(layer, name):
    """Returns whether the `call` of a layer takes an argument with a name."""
    parameters = inspect.signature(layer.call).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


class _Scope(keras.StatelessScope):
    """Gives a layer its values, collects the new values, and refuses side effects."""

    def __init__(self, name, variables, weights, state):
        super().__init__(collect_losses=True)
        self._weights = {id(v) for v in variables.weights}
        values = [*weights, *state]
        for v, value in zip(
            [*variables.weights, *variables.state], values, strict=True
        ):
            self.state_mapping[id(v)] = value
        self.read = set()
        self._name = name
        self._graph = _current_graph()

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is not None:
            self.read.add(id(variable))
        return value

    def add_update(self, update):
        variable, value = update
        if id(variable) not in self.state_mapping:
            raise ValueError(
                "Expected a branch that changes only its own `variables`; "
                f"{self._name} changes {variable.path}. The states of a stateful RNN "
                "are not among these variables, nor is Keras's global seed generator. "
                "Create the variable with `add_weight`, or as a "
                "`keras.random.SeedGenerator` of the layer. Or set `recompute=False` "
                "on the block."
            )
        if id(variable) in self._weights:
            raise ValueError(
                "Expected a branch that changes no trainable weight in its call; "
                f"{self._name} assigns its own trainable weight {variable.path}, which "
                "the recomputation cannot follow. Set `recompute=False` on the block."
            )
        if _current_graph() is not self._graph:
            raise ValueError(
                "Expected a branch that changes its variables outside of `tf.cond`, "
                f"`tf.while_loop` and `tf.function`; {self._name} changes "
                f"{variable.path} inside, from where the new value cannot leave. Move "
                "the change, or set `recompute=False` on the block."
            )
        super().add_update(update)

    def new_values(self, state):
        return [self.state_mapping[id(v)] for v in state]


class _InACall(keras.layers.Layer):
    """Calls a function as part of a layer's call.

    Keras clears the losses of a layer at the start of an outermost call. The second
    call of a branch must not clear the losses of the forward pass.
    """

    def call(self, function):
        return function()


def _current_graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _is_differentiable(value):
    return tf.is_tensor(value) and value.dtype.is_floating


def _positions(values, among):
    """Returns the positions of `values` in the list `among`; appends missing ones."""
    known = {id(v): i for i, v in enumerate(among)}
    for v in values:
        if id(v) not in known:
            known[id(v)] = len(among)
            among.append(v)
    return [known[id(v)] for v in values]
