"""Keras layers as pure functions of their variables, for `coupling.run`.

A layer is called under a `keras.StatelessScope` that gives it the values of its
variables and collects their new values: it can then be called again, with the values
from before, and does the same. What a layer does beside that cannot be repeated, and is
refused rather than silently done twice or not differentiated.
"""

import contextlib
import functools
import inspect
import re

import keras
import tensorflow as tf

from revnet_tf.normalization import BatchNormalization
from revnet_tf.steps import Branch

# Operations that give another result, or change more, when they are done again.
_STATEFUL = re.compile(
    "(?!Stateless|RandomIndexShuffle)"
    ".*(Random|Multinomial|TruncatedNormal|Rng|Assign|ResourceScatter|"
    "Stateful(?!PartitionedCall))"
)


class Variables:
    """The variables of all branches of a run, each once; `weights` have gradients.

    Among the weights are also floating-point tensors that branches are called with.

    Args:
        share_traces: whether branches of the same structure are traced once.
    """

    def __init__(self, share_traces=False):
        self.weights = []
        self.state = []
        self._share_traces = share_traces
        self._traced = []

    def branch(self, owner, calls, arguments=None):
        """Returns functions that use the variables of a layer as a pure branch.

        Args:
            owner: the layer.
            calls: list of what is applied one after the other:
                `call(*inputs, **arguments)` returns a list of tensors.
            arguments: nested structure of further arguments, as all calls take them.
        """
        # Not `owner.trainable_variables`: a layer that was frozen has none, and one of
        # its own layers may have been set free again.
        weights = [v for v in owner.variables if v.trainable]
        state = [v for v in owner.variables if not v.trainable]
        own = [id(v) for v in (*weights, *state)]
        flat = tf.nest.flatten(arguments or {})
        where = [i for i, value in enumerate(flat) if _is_differentiable(value)]

        def function(call, values, state_values, *inputs):
            given = dict(
                zip(own, (*values[: len(weights)], *state_values), strict=True)
            )
            filled = list(flat)
            for i, value in zip(where, values[len(weights) :], strict=True):
                filled[i] = value
            packed = tf.nest.pack_sequence_as(arguments or {}, filled)
            scope = _Scope(owner, given, weights)
            with scope:
                outputs = _InACall(name="branch", autocast=False)(
                    function=lambda: call(*inputs, **packed)
                )
            read = [scope.was_read(v) for v in weights] + [False] * len(where)
            return outputs, [scope.new_value(v) for v in state], scope.losses, read

        return Branch(
            [functools.partial(function, call) for call in calls],
            _positions([*weights, *(flat[i] for i in where)], self.weights),
            _positions(state, self.state),
            owner.name,
            self._traced_like(owner) if not flat else None,
        )

    def _traced_like(self, owner):
        """Returns what branches of the structure of `owner` have in common."""
        found = structure(owner) if self._share_traces else None
        if found is None:
            return None
        for known, traced in self._traced:
            if known == found:
                return traced
        self._traced.append((found, {}))
        return self._traced[-1][1]

    def values(self):
        """Returns the present values of the weights and of the state, as tensors."""
        return [
            [
                tf.convert_to_tensor(v.value if isinstance(v, keras.Variable) else v)
                for v in variables
            ]
            for variables in (self.weights, self.state)
        ]


@contextlib.contextmanager
def repeatable_operations():
    """Refuses what is added to a graph meanwhile and would be done twice.

    Raises:
        ValueError: naming the operations.
    """
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    # The replicas of a strategy take turns at one graph, in name scopes of their own.
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
            f"A branch uses {', '.join(found)}, which the recomputation would do a "
            "second time, with another result: draw random numbers with "
            "`keras.random` and a `keras.random.SeedGenerator` of the layer, keep "
            "state in the layer's own variables (`add_weight`), or set "
            "`recompute=False` on the block."
        )


def _functions(node):
    """Yields the names of the functions that an operation of a graph calls."""
    for value in node.attr.values():
        yield from (f.name for f in (value.func, *value.list.func) if f.name)


def trace(steps, variables, x1, x2):
    """Traces the steps, which have run in eager mode, under `repeatable_operations`."""

    @tf.function(autograph=False)
    def forward(h1, h2, weights, state):
        with repeatable_operations():
            for step in steps:
                h1, h2, state, _, _ = step.forward(h1, h2, weights, state)
        return h1, h2

    specs = tf.nest.map_structure(
        lambda t: tf.TensorSpec(t.shape, t.dtype), (x1, x2, *variables.values())
    )
    forward.get_concrete_function(*specs)


def structure(layer):
    """Returns what is equal for layers that differ in names and in values only.

    `None` where that cannot be told: for all but `keras.Sequential` of the layers in
    `_READ_BY_CALL`. (Equal configurations do not make equal layers: they leave out
    attributes, as what `Normalization.adapt` has found, and know functions by name.)
    """
    known = {}

    def described(layer):
        if id(layer) in known:  # in two places: one weight has two parts
            return known[id(layer)]
        known[id(layer)] = len(known)
        if (
            layer.activity_regularizer is not None
            or type(layer.dtype_policy) is not keras.DTypePolicy
            or any(
                callable(getattr(type(layer), name, None))
                for name in vars(layer).keys() - _OVERRIDDEN
            )
        ):
            raise _Unknown
        if type(layer) is keras.Sequential:
            if any(x.dtype != layer.compute_dtype for x in layer.inputs):
                raise _Unknown  # it casts to that
            of_type = [described(inner) for inner in layer.layers]
        elif type(layer) in _READ_BY_CALL:
            of_type = [getattr(layer, k, None) for k in _READ_BY_CALL[type(layer)]]
            of_type += [(v.shape, v.dtype, v.trainable) for v in layer.variables]
            of_type.append(getattr(layer, "bias", None) is None)
        else:
            raise _Unknown
        policy = layer.dtype_policy.name, layer.autocast, layer.trainable
        return type(layer), policy, of_type

    try:
        return described(layer)
    except _Unknown:
        return None


def parts(layer):
    """Returns the layers that a layer applies one after the other, else itself.

    As for `structure`, only those of known kinds are told apart, and only where it is
    the same to call them: each once, and in the precision of the whole.
    """
    found, ahead = [], [layer] if structure(layer) is not None else []
    while ahead:
        first = ahead.pop(0)
        if type(first) is keras.Sequential:
            ahead = [*first.layers, *ahead]
        else:
            found.append(first)
    policies = {(part.dtype_policy.name, part.autocast) for part in [layer, *found]}
    if not found or len(policies) > 1 or len({*map(id, found)}) < len(found):
        return [layer]
    return found


class _Unknown(Exception):
    pass


# The layers of the paper's branches, and the attributes on which their calls depend.
_BATCH_NORMALIZATION = (
    "axis",
    "momentum",
    "epsilon",
    "center",
    "scale",
    "synchronized",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
)
_READ_BY_CALL = {
    BatchNormalization: _BATCH_NORMALIZATION,
    keras.layers.BatchNormalization: _BATCH_NORMALIZATION,
    keras.layers.Conv2D: (
        "filters",
        "kernel_size",
        "strides",
        "padding",
        "data_format",
        "dilation_rate",
        "groups",
        "activation",
        "use_bias",
        "lora_rank",
        "lora_alpha",
    ),
    keras.layers.ReLU: ("max_value", "negative_slope", "threshold"),
}
# Methods that Keras itself overrides in its layers and models.
_OVERRIDDEN = {"build", "quantize", "loss"}


def accepts(layer, name):
    """Whether the `call` of a layer takes an argument of that name."""
    parameters = inspect.signature(layer.call).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


class _Scope(keras.StatelessScope):
    """Gives a layer its values, collects new ones, and refuses what is not pure."""

    def __init__(self, owner, given, weights):
        super().__init__(collect_losses=True)
        self.state_mapping.update(given)
        self._owner = owner
        self._weights = {id(v) for v in weights}
        self._read = set()
        self._graph = _current_graph()

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is not None:
            self._read.add(id(variable))
        return value

    def add_update(self, update):
        variable, value = update
        if id(variable) not in self.state_mapping:
            raise ValueError(
                f"{self._owner.name} changes {variable.path}, a variable that does not "
                "belong to it (what draws random numbers without a seed generator of "
                "its own changes Keras's global one). Create it in the layer, as "
                "`keras.random.SeedGenerator` or with `add_weight`, or set "
                "`recompute=False` on the block."
            )
        if id(variable) in self._weights:
            raise ValueError(
                f"{self._owner.name} assigns its own trainable weight {variable.path} "
                "when it is called, which the recomputation cannot follow; set "
                "`recompute=False` on the block."
            )
        if _current_graph() is not self._graph:
            raise ValueError(
                f"{self._owner.name} changes its variable {variable.path} inside "
                "`tf.cond`, `tf.while_loop` or `tf.function`, from where the new value "
                "cannot leave; set `recompute=False` on the block."
            )
        super().add_update(update)

    def was_read(self, variable):
        return id(variable) in self._read

    def new_value(self, variable):
        return self.state_mapping[id(variable)]


class _InACall(keras.layers.Layer):
    """Calls a function as part of a layer's call.

    Keras forgets the losses that a layer has at the start of an outermost call; the
    branch's are those of the forward pass, which a second call must leave alone.
    """

    def call(self, function):
        return function()


def _current_graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _is_differentiable(value):
    return tf.is_tensor(value) and value.dtype.is_floating


def _positions(values, among):
    """Returns where `values` stand in the list `among`; appends missing ones."""
    known = {id(v): i for i, v in enumerate(among)}
    for v in values:
        if id(v) not in known:
            known[id(v)] = len(among)
            among.append(v)
    return [known[id(v)] for v in values]
