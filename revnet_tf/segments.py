"""Functional models whose segments are recomputed in the backward pass.

A segment is a part of the model's graph. It begins and ends at a cut, a place where a
single tensor carries everything that the later layers need. In training, the model
stores the tensors at the cuts, and each segment is a `Recompute`. The part after the
last cut stores its activations: the backward pass begins there.
"""

import functools
import itertools
import math
import numbers
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from revnet_tf._layer import RunLayer
from revnet_tf.layers import Recompute

__all__ = ["SegmentedModel", "recompute"]


def recompute(model: keras.Model, segments: int | None = None) -> keras.Model:
    """Returns a model with the same layers that recomputes segments of its graph.

    The model has the layers, the weights and the outputs of `model`, and shares them.
    It stores the tensors between the segments, and recomputes all others in the
    backward pass, for about the computation of one more forward pass. Moving statistics
    and seeds advance once. Predictions are those of `model`, bit for bit.

    A segment begins and ends where a single tensor carries everything, as between two
    residual blocks. The function looks into nested functional and sequential models.
    Reversible layers and `Recompute` layers stay outside of the segments.

    If `model` is compiled, so is the result, with the same optimizer, loss and metrics.

    Args:
        model: built functional or sequential `keras.Model`.
        segments: int, the number of segments, at most the number of such places. The
            function places them for a small sum of stored and recomputed bytes. `0`:
            return a plain `keras.Model`, whose files load without this library.
            Defaults to the square root of the number of places.

    Returns:
        A `SegmentedModel`.

    Raises:
        ValueError: the model is not functional or sequential, is not built, or is
            recomputed already. Or no place has a single tensor, or `segments` is
            negative or too large. Or `segments` is 0, and a nested model is recomputed.

    Example:

    >>> model = keras.applications.EfficientNetV2B0()
    >>> model = revnet_tf.recompute(model)
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    """
    _check(model, segments)
    common = {"name": model.name, "trainable": model.trainable}
    # The functional model that a sequential one holds has the structure of its ends.
    functional = getattr(model, "_functional", None) or model
    ends = functional.input, functional.output
    if segments == 0:
        # `_flatten_layers` finds layers in all attributes; no public method does.
        for inner in model._flatten_layers(include_self=False):
            if isinstance(inner, SegmentedModel):
                raise ValueError(
                    f"Expected nested models that are plain; {inner.name} in "
                    f"{model.name} is recomputed. Build {model.name} around its plain "
                    f"form, `recompute({inner.name}, 0)`, and recompute the whole: "
                    "`recompute` looks into nested models."
                )
        if not isinstance(model, SegmentedModel):
            return model
        return _compiled(keras.Model(*ends, **common), model)
    parts = _placed(_Graph(model), segments)
    return _compiled(SegmentedModel(*ends, segments=parts, **common), model)


@keras.saving.register_keras_serializable("revnet_tf")
class SegmentedModel(keras.Model):
    """The functional model that `recompute` returns.

    Files of the model load where `revnet_tf` is imported. `recompute(model, 0)` is the
    plain model.

    Attributes:
        segments: tuple of `Recompute` layers. Their attribute `recompute` can be set at
            any time, and survives saving. It takes effect in the next trace.
    """

    def __init__(self, *args, segments: list | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        graph = _Graph(self)
        ends = _placed(graph) if segments is None else segments
        first, parts, number = 0, [], itertools.count(1)
        for last, is_recomputed in ends:
            segment = is_recomputed is not None
            name = f"segment{next(number)}" if segment else None
            part = _Part(graph, first, last, name=name, dtype=self.dtype_policy)
            if segment:
                part = Recompute(part, recompute=is_recomputed, name=name)
                # The segment is no layer of the model, so its losses go to the model.
                part.add_loss = functools.partial(keras.layers.Layer.add_loss, self)
            parts.append((last, part))
            first = last
        # In functions, because Keras would track the segments as layers of the model.
        self._graph = lambda: graph
        self._parts = lambda: parts

    @property
    def segments(self) -> tuple[Recompute, ...]:
        return tuple(part for _, part in self._parts() if isinstance(part, Recompute))

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs
    ) -> Any:
        if not training:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        flat = self._standardize_inputs(inputs)
        for x, m in zip(flat, keras.tree.flatten(mask), strict=False):
            if m is not None:
                x._keras_mask = m
        graph = self._graph()
        values = dict(zip(graph.inputs, flat, strict=True))
        for _, part in self._parts():
            ends = part.layer if isinstance(part, Recompute) else part
            given = [values[key] for key in ends.inputs]
            outputs = part(*given, training=training, **kwargs)
            values.update(zip(ends.outputs, outputs, strict=True))
        outputs = [values[key] for key in graph.outputs]
        outputs = keras.tree.pack_sequence_as(self.output, outputs)
        single = isinstance(outputs, (list, tuple)) and len(outputs) == 1
        return outputs[0] if single else outputs

    def get_config(self) -> dict:
        segments = [
            [last, part.recompute if isinstance(part, Recompute) else None]
            for last, part in self._parts()
        ]
        return {**super().get_config(), "segments": segments}


def _check(model, segments):
    """Raises `ValueError` for arguments that `recompute` cannot use."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a functional or sequential model; got {model!r}. Wrap a layer "
            "in `revnet_tf.Recompute`."
        )
    if isinstance(model, keras.Sequential) and not model.built:
        raise ValueError(
            f"Expected a built model; {model.name} has no input shape yet. Begin it "
            "with a `keras.Input`, or call it first."
        )
    if not _has_graph(model) and not isinstance(model, SegmentedModel):
        raise ValueError(
            f"Expected a functional or sequential model; {model.name} is of the class "
            f"{type(model).__name__}, which can call its layers in any way. Wrap its "
            "parts in `revnet_tf.Recompute`."
        )
    is_whole = isinstance(segments, numbers.Integral) and not isinstance(segments, bool)
    if segments is not None and not (is_whole and segments >= 0):
        raise ValueError(
            f"segments must be a positive integer, 0 or None; got {segments!r}. Leave "
            "it out for the default number."
        )
    if segments != 0 and isinstance(model, SegmentedModel):
        raise ValueError(
            f"Expected a plain model; {model.name} is recomputed already. Set "
            "`recompute` on its `segments`, or begin with the plain model, "
            "`recompute(model, 0)`."
        )


def _has_graph(model):
    """Returns whether a model is its graph, not a subclass that may do more."""
    if isinstance(model, keras.Sequential):
        return type(model) is keras.Sequential and model.built
    return type(model) is _functional_class()


@functools.cache
def _functional_class():
    """Returns the class of functional models, which has no public name in Keras."""
    x = keras.Input((1,))
    return type(keras.Model(x, x))


def _compiled(model, like):
    """Compiles a model with the optimizer, the loss and the metrics of another one."""
    model.dtype_policy = like.dtype_policy
    if like.compiled:
        config = dict(like._compile_config.config)
        config |= {"optimizer": like.optimizer, "jit_compile": like.jit_compile}
        model.compile(**config)
    return model


class _Call(NamedTuple):
    """A call in the graph of a model.

    Attributes:
        node: the node of Keras's graph, or a dtype: the call casts to it.
        inputs, outputs: lists of keys, which stand for tensors.
    """

    node: object
    inputs: list
    outputs: list

    @property
    def layer(self):
        operation = getattr(self.node, "operation", None)
        return operation if isinstance(operation, keras.layers.Layer) else None

    def __call__(self, inputs, context):
        if isinstance(self.node, str):
            (x,) = inputs
            return [keras.ops.cast(x, self.node)]
        ids = map(id, self.node.input_tensors)
        args, kwargs = self.node.arguments.fill_in(dict(zip(ids, inputs, strict=True)))
        # As functional models do.
        names = getattr(self.node.operation, "_call_context_args", ())
        kwargs |= {k: v for k, v in context.items() if k in names and v is not None}
        return keras.tree.flatten(self.node.operation(*args, **kwargs))


class _Graph:
    """The calls of a functional model in order, with those of nested models.

    Attributes:
        calls: list of `_Call`.
        inputs, outputs: lists of the keys of the model's inputs and outputs.
        sizes: list, for each key the bytes of one sample.
    """

    def __init__(self, model):
        self.calls, self.sizes = [], []
        self.inputs = [self._key(x) for x in model.inputs]
        self.outputs = self._visit(model, self.inputs)
        self._last_use = {k: i for i, c in enumerate(self.calls) for k in c.inputs}

    def _key(self, tensor):
        # Sizes that are not known count as 1.
        size = math.prod(n or 1 for n in tensor.shape[1:])
        self.sizes.append(size * tf.as_dtype(tensor.dtype).size)
        return len(self.sizes) - 1

    def _visit(self, model, inputs):
        # A sequential model holds a functional one.
        model = getattr(model, "_functional", None) or model
        keys = dict(zip(map(id, model.inputs), inputs, strict=True))
        by_depth = sorted(model._nodes_by_depth.items(), reverse=True)
        for node in itertools.chain.from_iterable(nodes for _, nodes in by_depth):
            if node.is_input or any(id(x) not in keys for x in node.input_tensors):
                continue
            given = [keys[id(x)] for x in node.input_tensors]
            if _is_open(node):
                made = self._visit_nested(node, given)
            else:
                made = [self._key(x) for x in node.outputs]
                self.calls.append(_Call(node, given, made))
            keys.update(zip(map(id, node.outputs), made, strict=True))
        return [keys[id(x)] for x in model.outputs]

    def _visit_nested(self, node, given):
        (x,), (expected,) = node.input_tensors, node.operation.inputs
        if x.dtype != expected.dtype:
            made = [self._key(expected)]
            self.calls.append(_Call(expected.dtype, given, made))
            given = made
        return self._visit(node.operation, given)

    def cuts(self):
        """Returns positions between calls: one tensor alone passes, beside inputs."""
        alive, found = set(), []
        for i, call in enumerate(self.calls):
            alive = {k for k in (*alive, *call.outputs) if self._last_use.get(k, 0) > i}
            if len(alive) == 1:
                (key,) = alive
                found.append((i + 1, self.sizes[key]))
        return found

    def ends(self, first, last):
        """Returns the keys that the calls from `first` to `last` take and give."""
        calls = self.calls[first:last]
        made = {k for call in calls for k in call.outputs}
        taken = dict.fromkeys(k for call in calls for k in call.inputs if k not in made)
        used = {k for call in self.calls[last:] for k in call.inputs} | {*self.outputs}
        return list(taken), sorted(made & used)


def _is_open(node):
    """Returns whether the calls of a nested model can replace a call of the model."""
    model = node.operation
    if not isinstance(model, keras.Model) or not _has_graph(model):
        return False
    return (
        len(model.inputs) == len(node.input_tensors) == 1
        and len(model.inputs[0].shape) == len(node.input_tensors[0].shape)
        and getattr(node.input_tensors[0], "_keras_mask", None) is None
        and model.activity_regularizer is None
    )


class _Part(keras.layers.Layer):
    """The calls of a graph from one position to another.

    Attributes:
        inputs, outputs: lists of the keys of the tensors that the part takes and gives.
    """

    def __init__(self, graph, first, last, **kwargs):
        # The layers cast their inputs.
        super().__init__(autocast=False, **kwargs)
        calls = graph.calls[first:last]
        self.inputs, self.outputs = graph.ends(first, last)
        self.layers = list({id(c.layer): c.layer for c in calls if c.layer}.values())
        self._calls = lambda: calls
        self.built = True

    def call(self, *inputs, training=None, **context):
        context = {"training": training, **context}
        values = dict(zip(self.inputs, inputs, strict=True))
        for call in self._calls():
            outputs = call([values[key] for key in call.inputs], context)
            values.update(zip(call.outputs, outputs, strict=True))
        return [values[key] for key in self.outputs]


def _placed(graph, segments=None):
    """Chooses the cuts between the segments.

    The peak of the backward pass is about the tensors at the cuts, and the activations
    of the segment that is recomputed. For several bounds of the largest segment, the
    function finds the cuts with the fewest bytes. It returns the best of these choices.

    Returns:
        A list of pairs for the parts of the graph in order: the position of the end,
        and `True` for a segment, `None` for a part that stores its activations.

    Raises:
        ValueError: there are fewer segments than `segments`.
    """
    cuts = graph.cuts()
    positions = [0, *(i for i, _ in cuts), len(graph.calls)]
    at_cut = np.array([0, *(size for _, size in cuts), 0], float)
    made = [sum(graph.sizes[k] for k in call.outputs) for call in graph.calls]
    made = np.concatenate([[0], np.cumsum(made)])[positions]
    # A segment holds no layer that recomputes by itself.
    closed = [c.layer is not None and _recomputes(c.layer) for c in graph.calls]
    closed = np.concatenate([[0], np.cumsum(closed)])[positions]
    possible = int(np.sum(np.diff(closed)[:-1] == 0))
    if segments is None:
        segments = max(1, round(math.sqrt(possible)))
    if not possible:
        raise ValueError(
            "Expected a model with a place where a single tensor carries everything; "
            "found no place. Wrap parts of the model in `revnet_tf.Recompute`."
        )
    if segments > possible:
        raise ValueError(
            "Expected at most as many segments as the model has places where a single "
            f"tensor carries everything; it has {possible}, and segments={segments}. "
            f"Use segments={possible} or fewer."
        )
    # From the row's position to that of the column.
    inside = np.maximum(made[None] - made[:, None] - at_cut, 0)
    later = np.arange(len(positions))[None] > np.arange(len(positions))[:, None]
    may_recompute = later & (closed[None] == closed[:, None])
    # Of equally small choices, the fastest one leaves most to the last part.
    little = 1e-3 * inside
    best = math.inf, None
    for bound in np.geomspace(max(inside[may_recompute].min(), 1), made[-1], 40):
        fits = may_recompute & (inside <= bound)
        recomputed = np.where(fits, at_cut + little, math.inf)
        stored = np.where(later, inside + at_cut, math.inf)
        # The part after the last cut is free again before a segment is recomputed.
        stored[:, -1] = np.where(inside[:, -1] <= bound, 0, inside[:, -1])
        size, parts = _cheapest(recomputed, stored, segments)
        best = min(best, (size + bound, parts), key=lambda found: found[0])
    return [[positions[i], True if segment else None] for i, segment in best[1]]


def _cheapest(recomputed, stored, segments):
    """Returns the smallest sum of bytes over paths from the first to the last position.

    Args:
        recomputed, stored: matrices, the bytes of a part between two positions.
        segments: int, the number of recomputed parts.

    Returns:
        The sum, and the parts: pairs of the end, and whether the part is recomputed.
    """
    num_positions = len(stored)
    sums = np.full((segments + 1, num_positions), math.inf)
    sums[0, 0] = 0
    came = {}
    for end in range(1, num_positions):
        for count in range(segments + 1):
            ways = [(sums[count] + stored[:, end], count, False)]
            # The last part is never a segment.
            if count and end < num_positions - 1:
                ways.append((sums[count - 1] + recomputed[:, end], count - 1, True))
            for totals, before, is_segment in ways:
                start = int(np.argmin(totals[:end]))
                if totals[start] < sums[count, end]:
                    sums[count, end] = totals[start]
                    came[count, end] = before, start, is_segment
    total, count, end, parts = sums[segments, -1], segments, num_positions - 1, []
    if total == math.inf:
        return total, None
    while end:
        before, start, is_segment = came[count, end]
        parts.append((end, is_segment))
        count, end = before, start
    return total, parts[::-1]


def _recomputes(layer):
    """Returns whether a layer, or one in it, recomputes activations by itself."""
    # `_flatten_layers` finds layers in all attributes; no public method does.
    return any(
        isinstance(inner, (RunLayer, SegmentedModel))
        for inner in layer._flatten_layers()
    )
