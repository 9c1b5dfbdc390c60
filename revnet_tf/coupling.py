"""Additive coupling on plain tensors, and its gradient by reconstruction.

A reversible block maps two streams (x1, x2) to (y1, y2), and is undone by running it
backwards:

    forward    y1 = x1 + f(x2)        y2 = x2 + g(y1)
    inverse    x2 = y2 - g(y1)        x1 = y1 - f(x2)

`run` applies a sequence of blocks and keeps, for its gradient, the last pair of streams
only. The gradient rebuilds the streams block by block, from the last to the first, and
evaluates f and g once more each. Four things make that save memory, and not only look
as if it did:

- One `tf.custom_gradient` holds the whole run: one for each block would keep every
  block's output.
- In eager mode the forward pass sees its arguments through `tf.stop_gradient`. An outer
  tape would otherwise record, and so keep, whatever happens inside.
- A block is rebuilt only after the gradients of the block that follows are there.
  Nothing in the arithmetic asks for that order, and who is free to choose, as an
  executor or a compiler, rebuilds everything first and holds it all.
- What a run has rebuilt is handed to the run before it (`Handoff`), which then has no
  use for its own last pair: runs called one after the other keep as little as one.

Reference: Gomez et al., 2017, Algorithm 1, https://arxiv.org/abs/1707.04585
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from revnet_tf import fixed_point


class Branch(NamedTuple):
    """A function without side effects, and where its parameters stand in the run's.

    Attributes:
        function: `function(weights, state, *inputs)` returns
            `(outputs, new_state, losses, read)`: three sequences of tensors, `outputs`
            in the dtype of the streams and `losses` scalars, and for each weight
            whether the function has read it.
        weights: positions of its trainable tensors among the run's `weights`.
        state: positions of its other tensors (moving statistics, seeds, counters)
            among the run's `state`.
        name: for error messages.
        traced: in a graph, a dict that all branches have in common that compute the
            same of their parameters: they are traced once, as a `tf.function`. `None`
            for a branch that is traced by itself.
    """

    function: Callable
    weights: Sequence[int]
    state: Sequence[int]
    name: str = "branch"
    traced: dict | None = None

    def __call__(self, weights, state, *inputs):
        """Returns the outputs, the run's state after the call, the losses, `read`."""
        own = [weights[i] for i in self.weights], [state[i] for i in self.state]
        outputs, changed, losses, read = self.call(_evaluate, *own, inputs)
        state = list(state)
        for i, value in zip(self.state, changed, strict=True):
            if value is not None:
                state[i] = value
        return outputs, state, losses, read

    def call(self, what, *arguments):
        """Returns `what(self.function, *arguments)`: tensors, and a list, `read`."""
        if self.traced is None:
            return what(self.function, *arguments)
        if what not in self.traced:
            read = []

            @tf.function(autograph=False)
            def function(*arguments):
                *tensors, read[:] = what(self.function, *arguments)
                return tensors

            self.traced[what] = function, read
        function, read = self.traced[what]
        return *function(*arguments), list(read)


def _evaluate(function, weights, state, inputs):
    """Returns outputs, the new state or `None` where it is the old, losses, `read`."""
    outputs, new_state, losses, read = function(weights, state, *inputs)
    changed = [
        None if new is old else new for old, new in zip(state, new_state, strict=True)
    ]
    return outputs, changed, losses, read


def _differentiate(function, weights, state, inputs, d_outputs, d_losses):
    """Returns outputs, the gradients for inputs and weights, `read`."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([*inputs, *weights])
        outputs, _, losses, read = function(weights, state, *inputs)
    gradients = tape.gradient(
        [*outputs, *losses],
        [*inputs, *weights],
        output_gradients=[*d_outputs, *d_losses],
    )
    return outputs, gradients, read


class Coupling(NamedTuple):
    """A reversible block: keeps nothing between forward and backward but its states.

    With `fraction_bits` the streams are fixed-point numbers: `fixed_point`. An `anchor`
    keeps its inputs, too: its gradient goes on with them, not with rebuilt ones.
    """

    f: Branch
    g: Branch
    fraction_bits: int | None = None
    anchor: bool = False

    def forward(self, x1, x2, weights, state):
        (fx,), after_f, f_losses, f_read = self.f(weights, state, x2)
        y1 = add(x1, fx, self.fraction_bits)
        (gy,), after_g, g_losses, g_read = self.g(weights, after_f, y1)
        y2 = add(x2, gy, self.fraction_bits)
        inputs = (x1, x2) if self.anchor else None
        kept = (state, f_read), (after_f, g_read), len(f_losses), inputs
        return y1, y2, after_g, [*f_losses, *g_losses], kept

    def backward(self, y1, y2, d1, d2, d_losses, weights, kept, gradients):
        before_f, before_g, count, inputs = kept
        # In the paper's Algorithm 1: lines 3, 5 and 9, then 4, 6, 8 and 10.
        (gy,), (dy1,) = _vjp(
            self.g, weights, before_g, [y1], [d2], d_losses[count:], [d1], gradients
        )
        x2 = inputs[1] if inputs else subtract(y2, gy, self.fraction_bits)
        d1 = d1 + dy1
        (fx,), (dx2,) = _vjp(
            self.f, weights, before_f, [x2], [d1], d_losses[:count], [d2], gradients
        )
        x1 = inputs[0] if inputs else subtract(y1, fx, self.fraction_bits)
        return x1, x2, d1, d2 + dx2


class Checkpoint(NamedTuple):
    """A block that cannot be undone: keeps its inputs and computes the rest anew."""

    block: Branch

    def forward(self, x1, x2, weights, state):
        (y1, y2), after, losses, read = self.block(weights, state, x1, x2)
        return y1, y2, after, losses, (x1, x2, (state, read))

    def backward(self, y1, y2, d1, d2, d_losses, weights, kept, gradients):
        x1, x2, before = kept
        _, (d1, d2) = _vjp(
            self.block, weights, before, [x1, x2], [d1, d2], d_losses, [], gradients
        )
        return x1, x2, d1, d2


class Watched(NamedTuple):
    """A step that tells what it rebuilds: `tell(inputs, rebuilt)`, two pairs.

    It keeps its inputs for that, and goes on with what it has rebuilt.
    """

    step: Coupling | Checkpoint
    tell: Callable

    def forward(self, x1, x2, weights, state):
        *results, kept = self.step.forward(x1, x2, weights, state)
        return *results, (kept, x1, x2)

    def backward(self, y1, y2, d1, d2, d_losses, weights, kept, gradients):
        kept, *inputs = kept
        *rebuilt, d1, d2 = self.step.backward(
            y1, y2, d1, d2, d_losses, weights, kept, gradients
        )
        self.tell(inputs, rebuilt)
        return *rebuilt, d1, d2


class Gradients:
    """The gradients for a run's weights, added up.

    Attributes:
        of_weights: list with `None` for a weight that has none yet.
        last: those that were computed last; what is computed next waits for them.
    """

    def __init__(self, num_weights, last):
        self.of_weights = [None] * num_weights
        self.last = last

    def add(self, positions, gradients):
        for i, d in zip(positions, gradients, strict=True):
            known = self.of_weights[i]
            self.of_weights[i] = d if known is None else known + d


class Handoff:
    """Where a run finds its outputs again once the run that follows has rebuilt them.

    The run that makes the outputs returns the handoff, the run that consumes these very
    outputs is given it, and fills it while the gradient is traced. Where nothing was
    filled in (another consumer, no gradient path, another graph), the first run uses
    the outputs that it kept.
    """

    def __init__(self):
        self._rebuilt = None

    def fill(self, y1, y2, last):
        # In eager mode all outputs are alive anyway; there is nothing to gain.
        if not tf.executing_eagerly():
            self._rebuilt = y1, y2, last

    def take(self, y1, y2):
        """Returns a pair of streams and the gradients that were computed last.

        The pair is the rebuilt one if that is of the current graph, else `(y1, y2)`.
        """
        graph = tf.compat.v1.get_default_graph()
        if self._rebuilt and self._rebuilt[0].graph is graph:
            return self._rebuilt
        return y1, y2, []


class Result(NamedTuple):
    """What `run` returns; `state` and `losses` are lists in the order of evaluation."""

    y1: tf.Tensor
    y2: tf.Tensor
    state: list
    losses: list
    handoff: Handoff


def run(steps, x1, x2, weights=(), state=(), received=None):
    """Applies blocks in order and keeps only their last outputs for the gradient.

    Args:
        steps: list of `Coupling`, `Checkpoint` and `Watched`.
        x1, x2: the two streams, floating-point tensors of one dtype.
        weights: the tensors to which the branches have gradients. Each branch names
            its own by position, so several can share one.
        state: the tensors that the branches read and replace, without gradients.
        received: the `Handoff` of the run whose outputs are `x1` and `x2`, if any.

    Returns:
        A `Result`.

    Raises:
        ValueError: a branch reads a trainable variable that is not among `weights`.
        NotImplementedError: when a second derivative or a forward-mode derivative is
            taken: it would silently lack what the reconstruction contributes.
    """
    handoff = Handoff()
    last_state = None
    order = None

    def forward(x1, x2, *weights):
        nonlocal last_state
        h1, h2 = x1, x2
        if tf.executing_eagerly():
            h1, h2, *weights = [tf.stop_gradient(t) for t in (x1, x2, *weights)]
        current, losses, kept = list(state), [], []
        with tf.GradientTape() as tape:
            for step in steps:
                h1, h2, current, step_losses, step_kept = step.forward(
                    h1, h2, weights, current
                )
                kept.append((len(step_losses), step_kept))
                losses += step_losses
        _refuse_foreign_variables(tape.watched_variables())
        last_state = current

        def backward(d1, d2, _, *d_losses):
            if order is None:  # `forward` has not returned: a forward-mode derivative
                _refuse_higher_order()
            y1, y2, last = handoff.take(h1, h2)
            gradients = Gradients(len(weights), last)
            d_losses = list(d_losses)
            for step, (count, step_kept) in zip(
                reversed(steps), reversed(kept), strict=True
            ):
                first = len(d_losses) - count
                d_step, d_losses = d_losses[first:], d_losses[:first]
                y1, y2, d1, d2 = step.backward(
                    y1, y2, d1, d2, d_step, weights, step_kept, gradients
                )
            if received is not None:
                received.fill(y1, y2, gradients.last)
            return _custom_gradient(
                _first_order_only, order, d1, d2, *gradients.of_weights
            )

        return (h1, h2, tf.zeros([0], h1.dtype), *losses), backward

    # `order` is empty, costs nothing, and ties what `backward` returns to the arguments
    # of `forward`: whoever differentiates that once more gets to `_first_order_only`.
    y1, y2, order, *losses = _custom_gradient(forward, x1, x2, *weights)
    return Result(y1, y2, last_state, losses, handoff)


def inverse(steps, y1, y2, weights=(), state=()):
    """Returns the streams that `Coupling` steps map to `(y1, y2)`; drops new states."""
    for step in reversed(steps):
        (gy,), *_ = step.g(weights, state, y1)
        x2 = subtract(y2, gy, step.fraction_bits)
        (fx,), *_ = step.f(weights, state, x2)
        y1, y2 = subtract(y1, fx, step.fraction_bits), x2
    return y1, y2


def add(x, change, fraction_bits=None):
    """Returns `x + change` without broadcasting: such a sum could not be undone.

    Of fixed-point numbers it is exact, and its gradient that of the plain sum.
    """
    if fraction_bits is not None:
        quantized = fixed_point.quantize(change, fraction_bits)
        change = fixed_point.straight_through(change, quantized)
    y = tf.add_n([x, change])
    return y if fraction_bits is None else fixed_point.check(y, fraction_bits)


def subtract(y, change, fraction_bits=None):
    """Returns the `x` of which `add` has made `y`."""
    if fraction_bits is not None:
        change = fixed_point.quantize(change, fraction_bits)
    return y - change


def _custom_gradient(function, *arguments):
    """Returns `tf.custom_gradient(function)(*arguments)`, which can be let go.

    In a graph TensorFlow registers the gradient function and the outputs of a custom
    gradient by name, for ever: the graph, the layers and the weights of every model
    that was trained would stay. What is registered here holds none of them; the
    operation holds the gradient function, and goes with its graph.
    """
    if tf.executing_eagerly():
        return tf.custom_gradient(function)(*arguments)
    registered = []
    gradient = None

    @tf.custom_gradient
    def call(*arguments):
        nonlocal gradient
        outputs, gradient = function(*arguments)
        registered.extend(outputs)
        reference = weakref.ref(gradient)
        return registered, lambda *d_outputs: reference()(*d_outputs)

    outputs = call(*arguments)
    outputs[0].op._revnet_tf_gradient = gradient
    # TensorFlow asks only how many there are.
    registered[:] = [None] * len(registered)
    return outputs


def _vjp(branch, weights, before, inputs, d_outputs, d_losses, after, gradients):
    """Evaluates a branch once more and differentiates it.

    `before` is the state before the first evaluation, and what that has read. The
    evaluation waits for `after`, `d_outputs` and the last gradients. Gradients for the
    weights are added to `gradients`; the outputs and the gradients for the inputs are
    returned.
    """
    state, first_read = before
    own = [weights[i] for i in branch.weights]
    inputs, own = _wait([*after, *d_outputs, *gradients.last], inputs, own)
    outputs, found, read = branch.call(
        _differentiate,
        own,
        [state[i] for i in branch.state],
        inputs,
        d_outputs,
        d_losses,
    )
    if read != first_read:
        raise ValueError(
            f"{branch.name} reads its weights when it is called first, and not when it "
            "is called again, as a `tf.function` does, which goes on using the value "
            "that it saw first; remove the decorator (the training step is a graph as "
            "it is), or set `recompute=False` on the block."
        )
    if any(
        was_read and gradient is None
        for was_read, gradient in zip(read, found[len(inputs) :], strict=True)
    ):
        raise ValueError(
            f"{branch.name} reads a trainable weight, but no gradient reaches it. A "
            "custom gradient or rematerialization inside a branch finds its weights "
            "as variables, and these are tensors here: remove it (the block "
            "recomputes already), or set `recompute=False` on the block."
        )
    # Zeros for a weight that has no part in this call: a replica where it has none
    # must agree with one where it has. A lookup's gradient is sparse.
    gradients.last = [
        tf.zeros_like(x) if d is None else tf.convert_to_tensor(d)
        for x, d in zip([*inputs, *own], found, strict=True)
    ]
    gradients.add(branch.weights, gradients.last[len(inputs) :])
    # The gradients for the weights hold the branch's activations until they are there:
    # who uses those for the inputs waits for them, too.
    with tf.control_dependencies(gradients.last):
        return outputs, [tf.identity(d) for d in gradients.last[: len(inputs)]]


def _wait(done, inputs, weights):
    """Returns `inputs` and `weights` such that their use waits for `done`.

    A graph's executor keeps to control dependencies. XLA drops them and keeps to data:
    the weights, or the inputs where there are none, become the choice between them and
    zero, by a condition that never holds and that XLA cannot know before `done`.
    """
    if tf.executing_eagerly():
        return inputs, weights
    with tf.control_dependencies(done):
        inputs = [tf.identity(x) for x in inputs]
    # Constants that all share: else these would be most of what a model's graph holds.
    flat, first, second = (tf.constant([i]) for i in (-1, 0, 1))
    numbers = [
        tf.cast(
            tf.strided_slice(tf.reshape(t, flat), first, second, second), tf.float32
        )
        for t in done
    ]
    never = tf.reduce_any(tf.concat(numbers, 0) > math.inf)
    zero = functools.cache(functools.partial(tf.zeros, []))

    def choose(tensors):
        return [tf.where(never, zero(t.dtype), t) for t in tensors]

    return (inputs, choose(weights)) if weights else (choose(inputs), weights)


def _first_order_only(order, *gradients):
    return gradients, _refuse_higher_order


def _refuse_higher_order(*_):
    raise NotImplementedError(
        "Second derivatives and forward-mode derivatives cannot pass through "
        "activations that are reconstructed. Set `recompute=False` on the reversible "
        "layers for this computation: the values are the same."
    )


def _refuse_foreign_variables(variables):
    if variables:
        names = ", ".join(sorted(v.name for v in variables))
        raise ValueError(
            f"A branch uses trainable variables that do not belong to it: {names}. "
            "They would get no gradient. Assign the layer that owns them to an "
            "attribute of the branch, or set `recompute=False`."
        )
