"""A run of blocks under one custom gradient, which stores the last streams only.

`run` applies blocks in order. Its backward pass goes from the last block to the first.
Each block reconstructs its inputs from its outputs, the inputs of the block after it
(see `_coupling`). Three rules make this save memory:

- One custom gradient covers the whole run. One for each block would store the outputs
  of every block.
- The backward pass waits (`_ordering.wait`). Reconstruction depends on no gradient, so
  without waiting TensorFlow and XLA reconstruct all blocks first, and hold all of them.
- A run hands the streams that it reconstructed to the run before it (`Handoff`). Runs
  that are called one after the other then store as little as one.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from revnet_tf import _custom_gradient
from revnet_tf._coupling import (
    FirstCalls,
    Rearrangement,
    Recompute,
    SecondCalls,
    has_gradient,
    or_zeros,
    sum_of,
)
from revnet_tf._exact_zeros import as_rearrangement, with_exact_zeros


class Step(NamedTuple):
    """A block in a run.

    Attributes:
        block: the block.
        weights, state: the positions of its tensors among those of the run.
        traces: a dict that blocks share which compute the same function of their
            tensors: TensorFlow then traces them once. `None`: the block has no twin.
        observe: `observe(inputs, reconstructed)` or `None`. The backward pass calls it
            with the true inputs, which the run then stores.
    """

    block: NamedTuple
    weights: Sequence[int] = ()
    state: Sequence[int] = ()
    traces: dict | None = None
    observe: Callable | None = None

    def forward(self, weights, state, inputs):
        """Returns the outputs, the new state, the losses, and what the block stores.

        An unchanged tensor of the state is `None`. The stored tensors include the state
        before each call of a function.
        """

        def evaluate(weights, state, inputs):
            call = FirstCalls(weights, state)
            outputs, stored = self.block.forward(call, *inputs)
            changes = [
                None if new is old else new
                for old, new in zip(state, call.state, strict=True)
            ]
            return outputs, changes, call.losses, (stored, call.states)

        return self._traced("forward", evaluate)(weights, state, inputs)

    def backward(
        self, weights, stored, d_losses, last, outputs, gradients, reconstruct
    ):
        """Returns the inputs, the gradients for them and for the weights, and `last`.

        `last`, also an argument, is that of `SecondCalls`.
        """

        def differentiate(weights, stored, d_losses, last, outputs, gradients):
            stored, states = stored
            again = SecondCalls(weights, states, d_losses, last)
            found = self.block.backward(again, stored, outputs, gradients, reconstruct)
            return *found, again.gradients, again.last

        traced = self._traced(("backward", reconstruct), differentiate)
        return traced(weights, stored, d_losses, last, outputs, gradients)

    def _traced(self, key, function):
        if self.traces is None:
            return function
        return self.traces.setdefault(key, tf.function(function, autograph=False))


class Handoff:
    """Connects a run to the runs that are called on its outputs.

    Forward: it holds the streams, so that the next run need not split their join.
    Backward, while the gradient is traced: the next run gives back the streams that it
    reconstructed, and the gradients for them. If it gives nothing (no such run on the
    gradient's path, eager mode, another graph), the first run splits its outputs again,
    which the layers after it often store anyway. A run that takes the outputs in
    another form, or only some of them, gives back the gradients that it computed last.
    The first run then waits for these.

    Attributes:
        streams: list of tensors, the last outputs.
        pair: the `Pair` that joined them.
        outputs: list of the joined tensors.
        needed: whether the first run uses the streams in its backward pass.
        trailing: list of the rearrangements after the last other block; see
            `_exact_zeros`.
    """

    def __init__(self, streams, pair, outputs, needed, trailing):
        self.streams = streams
        self.pair = pair
        self.outputs = outputs
        self.needed = needed
        self.trailing = trailing
        self._graph = None

    def give_back(self, last, given=None):
        """Gives back what the next run computed.

        Args:
            last: list of tensors, the gradients that the run computed last.
            given: `None`, or the streams, the gradients for them, and their join.
        """
        # In eager mode the tape holds all outputs anyway.
        if not tf.executing_eagerly():
            graph = tf.compat.v1.get_default_graph()
            if self._graph is not graph:
                self._graph, self._given = graph, None
            self._given, self._last = given or self._given, last

    def current(self):
        """Returns the streams: those that a run gave back, or else those it holds."""
        if self._graph is not tf.compat.v1.get_default_graph() or not self._given:
            return self.streams
        # A run reconstructs no streams that are not `needed`.
        given = zip(self._given[0], self.streams, strict=True)
        return [held if stream is None else stream for stream, held in given]

    def take(self, joined):
        """Returns the streams, the gradients with that join, and the last ones."""
        given, last = None, []
        if self._graph is tf.compat.v1.get_default_graph():
            given, last = self._given, self._last
        if given is None:
            streams = self.streams
            if not tf.executing_eagerly():
                # XLA ignores the dependencies, and takes the streams themselves.
                after = [tf.identity(d) for d in joined if d is not None]
                with tf.control_dependencies(after):
                    streams = self.pair.split([tf.identity(y) for y in self.outputs])
            return streams, self.pair.split(joined), last
        streams, gradients, given = given
        # Without another consumer a gradient arrives as the same tensor. Splitting the
        # join is right in any case; it only takes longer.
        if any(a is not b for a, b in zip(given, joined, strict=True)):
            gradients = self.pair.split(joined)
        return streams, gradients, last


class Result(NamedTuple):
    """`outputs`, `state` and `losses` are lists of tensors."""

    outputs: list
    state: list
    losses: list
    handoff: Handoff


def run(
    steps,
    inputs,
    pair_in,
    pair_out,
    weights=(),
    state=(),
    received=(),
    others=(),
):
    """Applies blocks in order, and stores only the last outputs for the gradient.

    Args:
        steps: list of `Step`.
        inputs: list of tensors. Those in floating point have gradients.
        pair_in: the `Pair` that splits the inputs into streams.
        pair_out: the `Pair` that joins the streams to outputs.
        weights: the tensors to which the blocks have gradients.
        state: the tensors that the blocks read and replace, without gradients.
        received: list of the `Handoff`s of the runs whose outputs, one run after the
            other, are `inputs`. Empty if there are other inputs.
        others: the `Handoff`s of other runs of which some outputs are among `inputs`.

    Returns:
        A `Result`.

    Raises:
        ValueError: a block reads a trainable variable that is not among `weights`.
        NotImplementedError: a second or a forward-mode derivative is taken. It would
            lack the part that comes through the reconstruction.
    """
    result = tie = have_gradients = None
    leading = received[0].trailing if received else pair_in.leading
    rearranges = leading or any(isinstance(s.block, Rearrangement) for s in steps)

    def differentiable(*arguments):
        nonlocal result, have_gradients
        if tf.executing_eagerly():
            # Otherwise an outer tape stores all tensors of the run.
            arguments = [tf.stop_gradient(t) for t in arguments]
        inputs_, weights = arguments[: len(inputs)], arguments[len(inputs) :]
        first = [stream for part in received for stream in part.streams]
        first = first or pair_in.split(inputs_)
        steps_, trailing = steps, []
        if rearranges and received:
            steps_, trailing = with_exact_zeros(steps, leading)
        elif rearranges:
            before = [as_rearrangement(pair_in)]
            steps_, trailing = with_exact_zeros(steps, before, inputs_)
        with tf.GradientTape() as tape:  # shows which variables are read
            streams, new_state, losses, stored = forward(steps_, first, weights, state)
        outputs, flat_losses = pair_out.join(streams), tf.nest.flatten(losses)
        # Eager mode cannot return a gradient for a mask, for example.
        have_gradients = [has_gradient(y) for y in outputs]
        _refuse_foreign_variables(tape.watched_variables())
        needed = not isinstance(steps[-1].block, Recompute)
        handoff = Handoff(streams, pair_out, outputs, needed, trailing)
        result = Result(outputs, new_state, flat_losses, handoff)

        def gradient(*gradients):
            if tie is None:  # `differentiable` has not returned: forward mode
                raise NotImplementedError(_HIGHER_ORDER)
            given = iter(gradients)
            d_outputs = [next(given) if has else None for has in have_gradients]
            d_tie, *d_losses = given
            d_losses = tf.nest.pack_sequence_as(losses, d_losses)
            stored_ = stored
            if received:
                stored_ = _with_current_inputs(stored, first, received)
            reconstruct = any(part.needed for part in received)
            streams, d_streams, d_weights, last = _backward(
                steps_,
                stored_,
                weights,
                d_losses,
                *handoff.take(d_outputs),
                reconstruct,
            )
            # TensorFlow does not save a custom gradient inside of another one. It
            # differentiates a loaded gradient in the ordinary way, which is right.
            found = [*d_streams, *d_weights]
            if not _custom_gradient.is_traced_for_saving(d_tie):
                _, *found = _custom_gradient.call(_first_order_only, tie, *found)
            d_streams, d_weights = found[: len(first)], found[len(first) :]
            d_inputs = pair_in.join(d_streams)
            if received:
                _give_back(received, last, streams, d_streams, d_inputs)
            for other in others:
                other.give_back(last)
            return [*d_inputs, *d_weights]

        returned = itertools.compress(outputs, have_gradients)
        return (*returned, tf.zeros([0]), *flat_losses), gradient

    # `tie` is empty. The results of `gradient` depend on it, so a second derivative for
    # the arguments arrives at `_first_order_only`.
    tensors = _custom_gradient.call(differentiable, *inputs, *weights)
    made = iter(tensors)
    outputs = [
        next(made) if has else y
        for y, has in zip(result.outputs, have_gradients, strict=True)
    ]
    tie, *losses = made
    return result._replace(outputs=outputs, losses=losses)


def forward(steps, streams, weights, state):
    """Applies the blocks from the first to the last.

    Returns:
        The streams, the state, and for each block its losses, and what it stores.
    """
    state, losses, stored = list(state), [], []
    for step in steps:
        inputs = streams if step.observe else None
        own = [weights[i] for i in step.weights], [state[i] for i in step.state]
        streams, changes, step_losses, step_stored = step.forward(*own, streams)
        for i, new in zip(step.state, changes, strict=True):
            state[i] = state[i] if new is None else new
        losses.append(step_losses)
        stored.append((step_stored, inputs))
    return streams, state, losses, stored


def _backward(
    steps, stored, weights, d_losses, streams, d_streams, last, reconstruct_inputs
):
    """Goes through the blocks from the last to the first.

    Returns:
        The inputs of the run as streams, the gradients for them and for the weights,
        and the gradients that were computed last.
    """
    d_weights = [None] * len(weights)
    for i in reversed(range(len(steps))):
        step, (step_stored, inputs) = steps[i], stored[i]
        own = [weights[j] for j in step.weights]
        reconstruct = bool(i > 0 or reconstruct_inputs or step.observe)
        streams, d_streams, d_own, last = step.backward(
            own, step_stored, d_losses[i], last, streams, d_streams, reconstruct
        )
        if step.observe:
            step.observe(inputs, streams)
        for j, d in zip(step.weights, d_own, strict=True):
            d_weights[j] = sum_of(d_weights[j], d)
    # Zeros for an unused weight: all replicas must have the same gradients.
    return streams, d_streams, [*map(or_zeros, d_weights, weights)], last


def _with_current_inputs(stored, inputs, received):
    """Returns what the blocks store, with the streams that were given back.

    The first block may store the inputs of the run. Another run that is called on the
    same tensors may have reconstructed them. The run before then need not hold them.
    """
    ((first, states), observed), *others = stored
    if list(map(id, first)) == list(map(id, inputs)):
        first = [stream for part in received for stream in part.current()]
    return [((first, states), observed), *others]


def _give_back(parts, last, streams, gradients, joined):
    """Gives each `Handoff` its streams, the gradients for them, and their join."""
    streams, gradients, joined = map(iter, (streams, gradients, joined))
    for part in parts:
        count = len(part.streams)
        given = (
            [*itertools.islice(streams, count)],
            [*itertools.islice(gradients, count)],
            [*itertools.islice(joined, len(part.outputs))],
        )
        part.give_back(last, given)


def inverse(steps, outputs, pair_in, weights=(), state=()):
    """Returns the streams that reversible blocks map to `outputs`; drops new states."""
    steps, _ = with_exact_zeros(steps, [as_rearrangement(pair_in)])
    for step in reversed(steps):
        call = FirstCalls(
            [weights[i] for i in step.weights], [state[i] for i in step.state]
        )
        outputs = step.block.inverse(call, *outputs)
    return outputs


_HIGHER_ORDER = (
    "Second derivatives and forward-mode derivatives cannot pass through activations "
    "that are reconstructed. Set `recompute=False` on the reversible layers for this "
    "computation: the values are the same."
)


def _first_order_only(tie, *gradients):
    def gradient(d_tie, *d_gradients):
        if not _custom_gradient.is_traced_for_saving(d_tie):
            raise NotImplementedError(_HIGHER_ORDER)
        # A loaded training function raises when it computes a second derivative.
        tf.debugging.Assert(False, [_HIGHER_ORDER])
        return d_tie, *d_gradients

    return (tf.identity(tie), *gradients), gradient


def _refuse_foreign_variables(variables):
    if variables:
        names = ", ".join(sorted(v.name for v in variables))
        raise ValueError(
            f"Expected a branch that uses its own trainable variables; it also uses "
            f"{names}, which would get no gradient. Assign the layer that owns them to "
            "an attribute of the branch, or set `recompute=False`."
        )
