"""Algorithm 1 of the RevNet paper: a run of reversible blocks, and its gradient.

A reversible block maps two streams (x1, x2) to (y1, y2):

    forward    y1 = x1 + f(x2)        y2 = x2 + g(y1)
    inverse    x2 = y2 - g(y1)        x1 = y1 - f(x2)

`run` applies blocks in order and stores only the last outputs. Its backward pass goes
from the last block to the first. Each block reconstructs its inputs from its outputs.
The evaluations of f and g that this takes also give the gradients.

Three rules make this save memory:

- One custom gradient covers the whole run. One for each block would store the outputs
  of every block.
- The backward pass waits (`_ordering.wait`). Reconstruction depends on no gradient, so
  without waiting TensorFlow and XLA reconstruct all blocks first, and hold all of them.
- A run hands the streams that it reconstructed to the run before it (`Handoff`). Runs
  that are called one after the other then store as little as one.

Reference: Gomez et al., 2017, Algorithm 1, https://arxiv.org/abs/1707.04585
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from revnet_tf import _custom_gradient, _fixed_point, _xla
from revnet_tf._ordering import wait

# Blocks. Each is made of pure functions (see `FirstCalls`) and has two methods.
#
#   forward(call, *inputs) returns the outputs, and the tensors to store for `backward`.
#   backward(again, stored, outputs, gradients, reconstruct) returns the inputs, and the
#   gradients for them. If `reconstruct` is false, the inputs have no further use.
#
# `call(function, inputs)` returns outputs. `backward` calls the same functions in
# reverse order, by `again(function, inputs, after)`: see `SecondCalls`.


class Coupling(NamedTuple):
    """A reversible block.

    Attributes:
        f, g: functions (`_functional.Function`) of one tensor.
        fraction_bits: of streams in fixed point, or `None`.
        anchor: whether to store the inputs instead of reconstructing them.
        elementary: as for `_fixed_point.quantize`.
        restore: function that replaces rounding errors of `x2` by zeros, in the
            channels that are zeros; see `_with_exact_zeros`. `None`: there are none.
        inputs: function, `inputs(after)` returns the true inputs of the block once
            `after` is there. `None`: the backward pass reconstructs them.
    """

    f: Callable
    g: Callable
    fraction_bits: int | None = None
    anchor: bool = False
    elementary: bool = False
    restore: Callable | None = None
    inputs: Callable | None = None

    def forward(self, call, x1, x2):
        (fx,) = call(self.f, [x2])
        y1 = add(x1, fx, self.fraction_bits, self.elementary)
        (gy,) = call(self.g, [y1])
        y2 = add(x2, gy, self.fraction_bits, self.elementary)
        return [y1, y2], [x1, x2] if self.anchor else []

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        (y1, y2), (d1, d2) = outputs, gradients
        if self.inputs is not None:
            stored = self.inputs(after=[d1, d2, *again.last])
            y1 = add(stored[0], *again.evaluate(self.f, stored[1:]))
        x1, x2 = stored or (None, None)
        (y1,), (gy,), pull = again(self.g, [y1], after=[d1, d2])
        if not stored:
            x2 = subtract(y2, gy, self.fraction_bits)
            x2 = self.restore(x2) if self.restore else x2
            (d2,) = wait([x2], [d2])  # y2 and gy are free before `pull` needs memory
        d1 += pull([d2])[0]  # dz1 = dy1 + (dG/dz1)^T dy2, and dwG
        (x2,), (fx,), pull = again(self.f, [x2], after=[d1, d2])
        if not stored and reconstruct:
            x1 = subtract(y1, fx, self.fraction_bits)
            (d1,) = wait([x1], [d1])  # the same for y1 and fx
        d2 += pull([d1])[0]  # dx2 = dy2 + (dF/dx2)^T dz1, and dwF
        return [x1, x2], [d1, d2]  # dx1 = dz1

    def inverse(self, call, y1, y2):
        x2 = subtract(y2, *call(self.g, [y1]), self.fraction_bits)
        x2 = self.restore(x2) if self.restore else x2
        x1 = subtract(y1, *call(self.f, [x2]), self.fraction_bits)
        return [x1, x2]


class Rearrangement(NamedTuple):
    """A reversible block without weights, which moves values and adds zeros.

    Attributes:
        there: function from a list of streams to a list of streams.
        back: its inverse. It is also the transpose of `there`, so it maps gradients for
            the outputs to gradients for the inputs.
        adds_zeros: whether `there` adds zeros.
    """

    there: Callable
    back: Callable
    adds_zeros: bool = False

    def forward(self, call, *inputs):
        return self.there(inputs), []

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        inputs = self.back(outputs)
        # The outputs are free before the gradients need memory.
        return inputs, self.back(wait(inputs, gradients))

    def inverse(self, call, *outputs):
        return self.back(outputs)


class Transition(NamedTuple):
    """A block whose shortcuts change the shape of its streams. It stores its inputs.

        forward    y1 = shortcut1(x1) + f(x2)        y2 = shortcut2(x2) + g(y1)

    The backward pass recomputes one function at a time. A `Recompute` of the whole
    would hold the activations of all four.
    """

    f: Callable
    g: Callable
    shortcut1: Callable
    shortcut2: Callable

    def forward(self, call, x1, x2):
        y1 = add(*call(self.shortcut1, [x1]), *call(self.f, [x2]))
        y2 = add(*call(self.shortcut2, [x2]), *call(self.g, [y1]))
        return [y1, y2], [x1, x2]

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        (x1, x2), (y1, _), (d1, d2) = stored, outputs, gradients
        _, _, pull = again(self.g, [y1], after=[d1, d2])
        d1 += pull([d2])[0]
        (x2,), _, pull = again(self.shortcut2, [x2], after=[d1])
        (dx2,) = pull([d2])
        (x2,), _, pull = again(self.f, [x2], after=[dx2])
        dx2 += pull([d1])[0]
        (x1,), _, pull = again(self.shortcut1, [x1], after=[dx2])
        return [x1, x2], [*pull([d1]), dx2]


class Skip(NamedTuple):
    """The end of a skip connection. It stores `z`, and reconstructs `x1, x2`.

        forward    (y1, y2) = (x1, x2) + function(z)
        inverse    (x1, x2) = (y1, y2) - function(z)

    The run that computed `x1, x2` then holds nothing between its forward and its
    backward pass.
    """

    function: Callable
    fraction_bits: int | None = None
    elementary: bool = False

    def forward(self, call, x1, x2, *z):
        changes = call(self.function, z)
        outputs = [
            add(x, change, self.fraction_bits, self.elementary)
            for x, change in zip([x1, x2], changes, strict=True)
        ]
        return outputs, z

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        z, changes, pull = again(self.function, stored, after=gradients)
        x = [None, None]
        if reconstruct:
            x = [
                subtract(y, change, self.fraction_bits)
                for y, change in zip(outputs, changes, strict=True)
            ]
            gradients = wait(x, gradients)
        return [*x, *z], [*gradients, *pull(gradients)]


class Recompute(NamedTuple):
    """A block of any function: stores the inputs, and evaluates the function again."""

    function: Callable

    def forward(self, call, *inputs):
        return call(self.function, inputs), inputs

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        # An output without a gradient, such as a mask, may have `None` for it.
        after = [d for d in gradients if d is not None]
        inputs, _, pull = again(self.function, stored, after)
        return inputs, pull(gradients)


class FirstCalls:
    """Calls the functions of a block in the forward pass.

    A function has no side effects. It takes and returns lists of tensors:
    `outputs, new_state, losses = function(weights, state, inputs)`.

    Attributes:
        state: the state after the last call.
        states: the state before each call.
        losses: the losses of each call.
    """

    def __init__(self, weights, state):
        self.state = state
        self.states = []
        self.losses = []
        self._weights = weights

    def __call__(self, function, inputs):
        self.states.append(self.state)
        outputs, self.state, losses = function(self._weights, self.state, inputs)
        self.losses.append(losses)
        return outputs


class SecondCalls:
    """Calls the same functions in the backward pass, from the last to the first.

    Args:
        states, d_losses: for each call the state before it, and the gradients for its
            losses.
        last: the gradients for weights that were computed last.

    Attributes:
        gradients: the sums of the gradients for the weights, `None` for an unused one.
        last: as the argument, after the last call.
    """

    def __init__(self, weights, states, d_losses, last=()):
        self.gradients = [None] * len(weights)
        self.last = last
        self._weights = weights
        self._states = list(states)
        self._d_losses = list(d_losses)

    def __call__(self, function, inputs, after):
        """Evaluates `function` again once `after` and the gradients before are there.

        Returns:
            The inputs, which replace those that were given (see `wait`), the outputs,
            and `pull(d_outputs)`, which returns the gradients for the inputs.
        """
        inputs = wait([*after, *self.last], inputs)
        outputs, pullback = vjp(function, self._weights, self._states.pop(), inputs)

        def pull(d_outputs):
            d_inputs, found = pullback(d_outputs, self._d_losses.pop())
            self.gradients = list(map(_sum, self.gradients, found))
            # The activations are free once these exist. Layers before the run, which do
            # not know `last`, wait by the control dependency.
            self.last = [d for d in found if d is not None]
            with tf.control_dependencies(self.last):
                return [tf.identity(d) for d in d_inputs]

        return inputs, outputs, pull

    def evaluate(self, function, inputs):
        """Returns the outputs of the first function that the block calls."""
        return function(self._weights, self._states[0], inputs)[0]


def vjp(function, weights, state, inputs):
    """Evaluates a function for its vector-Jacobian product.

    Returns:
        The outputs, and `pullback(d_outputs, d_losses)`. This can be called once. It
        returns the gradients for the inputs, and those for the weights (`None` for an
        unused one).
    """
    sources = [*filter(_has_gradient, inputs), *weights]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        outputs, _, losses, read = function.trace(weights, state, inputs)

    def pullback(d_outputs, d_losses):
        pairs = zip([*outputs, *losses], [*d_outputs, *d_losses], strict=True)
        targets, d_targets = zip(
            *(p for p in pairs if _has_gradient(p[0])), strict=True
        )
        d_sources = tape.gradient(targets, sources, output_gradients=d_targets)
        # The gradient of a lookup is sparse.
        d_sources = [d if d is None else tf.convert_to_tensor(d) for d in d_sources]
        d_weights = d_sources[len(d_sources) - len(weights) :]
        function.check(d_weights, read)
        remaining = iter(d_sources)
        d_inputs = [next(remaining) if _has_gradient(x) else None for x in inputs]
        return [*map(_or_zeros, d_inputs, inputs)], d_weights

    return outputs, pullback


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

    block: Coupling | Rearrangement | Transition | Skip | Recompute
    weights: Sequence[int] = ()
    state: Sequence[int] = ()
    traces: dict | None = None
    observe: Callable | None = None

    def forward(self, weights, state, inputs):
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
    """Connects a run to the run that is called on its outputs.

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
        trailing: list of the rearrangements after the last other block.
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
        return self._given[0]

    def take(self, joined):
        """Returns the streams, the gradients with that join, and the last ones."""
        given, last = None, []
        if self._graph is tf.compat.v1.get_default_graph():
            given, last = self._given, self._last
        if given is None:
            return self._split_again(joined), self.pair.split(joined), last
        streams, gradients, given = given
        # Without another consumer a gradient arrives as the same tensor. Splitting the
        # join is right in any case; it only takes longer.
        if any(a is not b for a, b in zip(given, joined, strict=True)):
            gradients = self.pair.split(joined)
        return streams, gradients, last

    def _split_again(self, gradients):
        # Eager mode holds the streams in any case. XLA chooses what it holds itself.
        if tf.executing_eagerly() or _xla.is_traced():
            return self.streams
        after = [d for d in gradients if d is not None]
        return self.pair.split(wait(after, self.outputs))


class Handoffs(NamedTuple):
    """The handoffs of several runs, whose outputs are the inputs of one run."""

    parts: Sequence[Handoff]

    @property
    def streams(self):
        return [stream for part in self.parts for stream in part.streams]

    @property
    def needed(self):
        return any(part.needed for part in self.parts)

    def current(self):
        return [stream for part in self.parts for stream in part.current()]

    @property
    def trailing(self):
        return []

    def give_back(self, last, given):
        streams, gradients, joined = map(iter, given)
        for part in self.parts:
            count = len(part.streams)
            given = (
                [*itertools.islice(streams, count)],
                [*itertools.islice(gradients, count)],
                [*itertools.islice(joined, len(part.outputs))],
            )
            part.give_back(last, given)


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
    received=None,
    earlier=(),
):
    """Applies blocks in order, and stores only the last outputs for the gradient.

    Args:
        steps: list of `Step`.
        inputs: list of tensors. Those in floating point have gradients.
        pair_in: the `Pair` that splits the inputs into streams.
        pair_out: the `Pair` that joins the streams to outputs.
        weights: the tensors to which the blocks have gradients.
        state: the tensors that the blocks read and replace, without gradients.
        received: the `Handoff` of the run whose outputs are `inputs`, or `None`.
        earlier: the `Handoff`s of other runs of which some outputs are among `inputs`.

    Returns:
        A `Result`.

    Raises:
        ValueError: a block reads a trainable variable that is not among `weights`.
        NotImplementedError: a second or a forward-mode derivative is taken. It would
            lack the part that comes through the reconstruction.
    """
    result = tie = None
    if received:
        trailing = received.trailing
    else:
        trailing = [_as_rearrangement(pair_in)] if pair_in.leading else []
    rearranges = trailing or any(isinstance(s.block, Rearrangement) for s in steps)
    if rearranges:
        steps, trailing = _with_exact_zeros(steps, trailing)

    def forward(*arguments):
        nonlocal result
        if tf.executing_eagerly():
            # Otherwise an outer tape stores all tensors of the run.
            arguments = [tf.stop_gradient(t) for t in arguments]
        inputs_, weights = arguments[: len(inputs)], arguments[len(inputs) :]
        first = received.streams if received else pair_in.split(inputs_)
        with tf.GradientTape() as tape:  # shows which variables are read
            streams, new_state, losses, stored = _forward(steps, first, weights, state)
        _refuse_foreign_variables(tape.watched_variables())
        outputs, flat_losses = pair_out.join(streams), tf.nest.flatten(losses)
        needed = not isinstance(steps[-1].block, Recompute)
        handoff = Handoff(streams, pair_out, outputs, needed, trailing)
        result = Result(outputs, new_state, flat_losses, handoff)

        def backward(*gradients):
            if tie is None:  # `forward` has not returned: a forward-mode derivative
                raise NotImplementedError(_HIGHER_ORDER)
            given = iter(gradients)
            d_outputs = [next(given) if _has_gradient(y) else None for y in outputs]
            d_tie, *d_losses = given
            d_losses = tf.nest.pack_sequence_as(losses, d_losses)
            streams, d_streams, last = handoff.take(d_outputs)
            needed = bool(received and received.needed)
            padded, found = steps, stored
            if received:
                found = _with_current_inputs(stored, first, received)
            elif rearranges:
                padded = _with_true_inputs(steps, pair_in, inputs_)
            streams, d_streams, d_weights, last = _backward(
                padded, found, weights, d_losses, streams, d_streams, last, needed
            )
            # TensorFlow does not save a custom gradient inside of another one. It
            # differentiates a loaded gradient in the ordinary way, which is right.
            if not _custom_gradient.is_traced_for_saving(d_tie):
                _, *tied = _custom_gradient.call(
                    _first_order_only, tie, *d_streams, *d_weights
                )
                count = len(d_streams)
                d_streams, d_weights = tied[:count], tied[count:]
            d_inputs = pair_in.join(d_streams)
            for other in earlier:
                other.give_back(last)
            if received:
                received.give_back(last, (streams, d_streams, d_inputs))
            return [*d_inputs, *d_weights]

        # Eager mode cannot return a gradient for a mask, for example.
        differentiable = filter(_has_gradient, outputs)
        return (*differentiable, tf.zeros([0]), *flat_losses), backward

    # `tie` is empty. The results of `backward` depend on it, so a second derivative for
    # the arguments arrives at `_first_order_only`.
    tensors = _custom_gradient.call(forward, *inputs, *weights)
    made = iter(tensors)
    outputs = [next(made) if _has_gradient(y) else y for y in result.outputs]
    tie, *losses = made
    return result._replace(outputs=outputs, losses=losses)


def _forward(steps, streams, weights, state):
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


def _with_current_inputs(stored, inputs, received):
    """Returns what blocks stored. Inputs that were given back replace stored ones.

    A run that is called on the same inputs may have reconstructed them. The run before
    then need not hold them.
    """
    ((first, states), observed), *others = stored
    if list(map(id, first)) == list(map(id, inputs)):
        first = received.current()
    return [((first, states), observed), *others]


def _backward(
    steps, stored, weights, d_losses, streams, d_streams, last, inputs_needed
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
        reconstruct = bool(i > 0 or inputs_needed or step.observe)
        streams, d_streams, d_own, last = step.backward(
            own, step_stored, d_losses[i], last, streams, d_streams, reconstruct
        )
        if step.observe:
            step.observe(inputs, streams)
        for j, d in zip(step.weights, d_own, strict=True):
            d_weights[j] = _sum(d_weights[j], d)
    # Zeros for an unused weight: all replicas must have the same gradients.
    return streams, d_streams, [*map(_or_zeros, d_weights, weights)], last


def inverse(steps, outputs, pair_in, weights=(), state=()):
    """Returns the streams that reversible blocks map to `outputs`; drops new states."""
    steps, _ = _with_exact_zeros(steps, [_as_rearrangement(pair_in)])
    for step in reversed(steps):
        call = FirstCalls(
            [weights[i] for i in step.weights], [state[i] for i in step.state]
        )
        outputs = step.block.inverse(call, *outputs)
    return outputs


def _with_exact_zeros(steps, rearrangements):
    """Returns steps whose couplings restore the zeros that a padding has added.

    Rounding replaces these zeros by tiny values. A branch with normalization divides a
    channel of tiny values by its tiny deviation, and a ReLU has another gradient at a
    tiny value than at zero. The gradient would be another one.

    Args:
        steps: list of `Step`.
        rearrangements: list of `Rearrangement`, those directly before the steps.

    Returns:
        The steps, and the rearrangements directly after the last block.
    """
    found = []
    for step in steps:
        if isinstance(step.block, Rearrangement):
            rearrangements = [*rearrangements, step.block]
        else:
            if isinstance(step.block, Coupling):
                block = step.block._replace(restore=_restoring(rearrangements))
                step = step._replace(block=block)
                if block.restore is not None:  # another function than its twins
                    step = step._replace(traces=None)
            rearrangements = []
        found.append(step)
    return found, rearrangements


def _with_true_inputs(steps, pair_in, inputs):
    """Returns steps whose first coupling uses the inputs of the run after a padding.

    The inputs are smaller than the streams after the padding, and mostly exist anyway:
    an image is the input of the network. With a stream of zeros the first branch often
    returns zeros, and the second branch needs these exactly, too.
    """
    rearrangements = [pair_in.split]
    for i, step in enumerate(steps):
        if isinstance(step.block, Rearrangement):
            rearrangements.append(step.block.there)
            continue
        if getattr(step.block, "restore", None) and step.block.fraction_bits is None:

            def true_inputs(after):
                streams = wait(after, inputs)
                for there in rearrangements:
                    streams = there(streams)
                return streams

            block = step.block._replace(inputs=true_inputs)
            return [*steps[:i], step._replace(block=block), *steps[i + 1 :]]
        break
    return steps


def _restoring(rearrangements):
    """Returns a function of the second stream, the `restore` of a `Coupling`."""
    blocks = [*itertools.dropwhile(lambda b: not b.adds_zeros, rearrangements)]
    if not blocks:
        return None

    def restore(x2):
        # A padding acts on both streams. The first one is not known yet.
        streams = [tf.zeros_like(x2), x2]
        for block in reversed(blocks):
            streams = block.back(streams)
        for block in blocks:
            streams = block.there(streams)
        return streams[1]

    return restore


def _as_rearrangement(pair):
    adds_zeros = any(block.adds_zeros for block in pair.leading)
    return Rearrangement(pair.split, pair.join, adds_zeros)


def add(x, change, fraction_bits=None, elementary=False):
    """Returns `x + change` without broadcasting, which could not be undone.

    In fixed point the sum is exact, and has the gradient of the plain sum.
    """
    if fraction_bits is None:
        return tf.add_n([x, change])
    change = _fixed_point.quantize(change, fraction_bits, elementary)
    return _fixed_point.check(tf.add_n([x, change]), fraction_bits, elementary)


def subtract(y, change, fraction_bits=None):
    """Returns the `x` from which `add` computed `y`."""
    if fraction_bits is not None:
        # Elementary or not, `quantize` returns the same bits.
        change = _fixed_point.quantize(change, fraction_bits)
    return y - change


def _sum(a, b):
    """Returns the sum of two gradients; `None` stands for none."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _has_gradient(tensor):
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def _or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else gradient


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
