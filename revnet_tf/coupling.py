"""Additive coupling on plain tensors, and its gradient by reconstruction.

A reversible block maps two streams (x1, x2) to (y1, y2), and is undone by running it
backwards:

    forward    y1 = x1 + f(x2)        y2 = x2 + g(y1)
    inverse    x2 = y2 - g(y1)        x1 = y1 - f(x2)

`run` applies a sequence of blocks and keeps, for its gradient, the last pair of streams
only. The gradient rebuilds the streams block by block, from the last to the first, and
evaluates f and g once more each. Five things make that save memory, and not only look
as if it did:

- One `tf.custom_gradient` holds the whole run: one for each block would keep every
  block's output.
- In eager mode the forward pass sees its arguments through `tf.stop_gradient`. An outer
  tape would otherwise record, and so keep, whatever happens inside.
- A block is rebuilt only after the gradients of the block that follows are there.
  Nothing in the arithmetic asks for that order, and who is free to choose, as an
  executor or a compiler, rebuilds everything first and holds it all.
- Within a block it is the same: a stream is rebuilt before the branch that was added to
  it is differentiated, and a branch of known layers is differentiated one by one.
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
    """Functions without side effects, and where their parameters stand in the run's.

    Attributes:
        functions: what is applied one after the other, and differentiated one by one.
            `function(weights, state, *inputs)` returns
            `(outputs, new_state, losses, read)`: three sequences of tensors, the last
            `outputs` in the dtype of the streams and `losses` scalars, and for each
            weight whether the function has read it.
        weights: positions of their trainable tensors among the run's `weights`.
        state: positions of their other tensors (moving statistics, seeds, counters)
            among the run's `state`.
        name: for error messages.
        traced: in a graph, a dict that all branches have in common that compute the
            same of their parameters: they are traced once, as a `tf.function`. `None`
            for a branch that is traced by itself.
    """

    functions: Sequence[Callable]
    weights: Sequence[int]
    state: Sequence[int]
    name: str = "branch"
    traced: dict | None = None

    def __call__(self, weights, state, *inputs):
        """Evaluates the functions.

        Returns:
            The outputs, the run's state after the call, the losses, and an `Evaluation`
            with which `Gradients` evaluates them once more.
        """
        own = [weights[i] for i in self.weights], [state[i] for i in self.state]
        outputs, changed, losses, read = self.call(_evaluate, *own, inputs)
        after = list(state)
        for i, value in zip(self.state, changed, strict=True):
            if value is not None:
                after[i] = value
        return outputs, after, losses, Evaluation(self, own[1], read, len(losses))

    def call(self, what, *arguments):
        """Returns `what(self.functions, *arguments)`: tensors, and a list, `read`."""
        if self.traced is None:
            return what(self.functions, *arguments)
        if what not in self.traced:
            read = []

            @tf.function(autograph=False)
            def function(*arguments):
                *tensors, read[:] = what(self.functions, *arguments)
                return tensors

            self.traced[what] = function, read
        function, read = self.traced[what]
        return *function(*arguments), list(read)


class Evaluation(NamedTuple):
    """What the gradient of a branch has to know of its first evaluation.

    Attributes:
        branch: the `Branch`.
        state: its state before.
        read: for each weight whether it was read.
        num_losses: how many losses there were.
    """

    branch: Branch
    state: Sequence
    read: Sequence[bool]
    num_losses: int


def _evaluate(functions, weights, state, outputs):
    """Returns outputs, the new state or `None` where it is the old, losses, `read`."""
    new_state, losses, read = state, [], [False] * len(weights)
    for function in functions:
        outputs, new_state, more, has_read = function(weights, new_state, *outputs)
        losses += more
        read = [a or b for a, b in zip(read, has_read, strict=True)]
    changed = [
        None if new is old else new for old, new in zip(state, new_state, strict=True)
    ]
    return outputs, changed, losses, read


class _Differentiate(NamedTuple):
    """Differentiates functions whose outputs were added to streams, and undoes that.

    With `fraction_bits` these streams are fixed-point numbers.
    """

    fraction_bits: int | None

    def __call__(self, functions, weights, state, inputs, sums, d_outputs, d_losses):
        """Returns the sums less the outputs, the gradients, `read`.

        The gradients are those for the inputs and those for the weights: two lists.

        `sums` may be empty: of outputs that were not added to anything.
        """
        tapes, outputs, read = [], inputs, [False] * len(weights)
        for function in functions:
            inputs = outputs
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([*inputs, *weights])
                outputs, state, losses, has_read = function(weights, state, *inputs)
            tapes.append((tape, inputs, outputs, losses))
            read = [a or b for a, b in zip(read, has_read, strict=True)]
        rebuilt = [
            subtract(y, change, self.fraction_bits)
            for y, change in zip(sums, outputs, strict=False)
        ]
        # What is not needed any more is let go first: what follows needs its memory.
        done, d_losses = rebuilt, list(d_losses)
        d_weights = [None] * len(weights)
        while tapes:
            tape, inputs, outputs, losses = tapes.pop()
            with tf.control_dependencies(done):
                d_outputs = [tf.identity(d) for d in d_outputs]
            first = len(d_losses) - len(losses)
            found = tape.gradient(
                [*outputs, *losses],
                [*inputs, *weights],
                output_gradients=[*d_outputs, *d_losses[first:]],
            )
            del d_losses[first:]
            d_outputs = [
                tf.zeros_like(x) if d is None else tf.convert_to_tensor(d)
                for x, d in zip(inputs, found, strict=False)
            ]
            found = found[len(inputs) :]
            done = [d for d in found if d is not None]
            d_weights = [_sum(a, b) for a, b in zip(d_weights, found, strict=True)]
        return rebuilt, d_outputs, d_weights, read


def _sum(a, b):
    """Returns the sum of two gradients; `None` stands for none."""
    if a is None or b is None:
        return b if a is None else a
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)


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
        (fx,), state, f_losses, f = self.f(weights, state, x2)
        y1 = add(x1, fx, self.fraction_bits)
        (gy,), state, g_losses, g = self.g(weights, state, y1)
        y2 = add(x2, gy, self.fraction_bits)
        inputs = (x1, x2) if self.anchor else None
        return y1, y2, state, [*f_losses, *g_losses], (f, g, inputs)

    def backward(self, y1, y2, d1, d2, kept, gradients):
        f, g, inputs = kept
        total1 = y1 if gradients.inputs_needed and not inputs else None
        total2 = None if inputs else y2
        # In the paper's Algorithm 1: lines 3, 5 and 9, then 4, 6, 8 and 10.
        (dy1,), x2 = gradients.through(g, [y1], [d2], [d1], total2, self.fraction_bits)
        x2 = inputs[1] if inputs else x2
        d1 = d1 + dy1
        (dx2,), x1 = gradients.through(f, [x2], [d1], [d2], total1, self.fraction_bits)
        x1 = inputs[0] if inputs else x1
        return x1, x2, d1, d2 + dx2


class Transition(NamedTuple):
    """A block whose shortcuts change its streams: it keeps its inputs.

        forward    y1 = shortcut1(x1) + f(x2)        y2 = shortcut2(x2) + g(y1)

    Its gradient takes `y1` from the block that follows, and everything else anew.
    """

    f: Branch
    g: Branch
    shortcut1: Branch
    shortcut2: Branch

    def forward(self, x1, x2, weights, state):
        (s1,), state, s1_losses, shortcut1 = self.shortcut1(weights, state, x1)
        (fx,), state, f_losses, f = self.f(weights, state, x2)
        y1 = add(s1, fx)
        (s2,), state, s2_losses, shortcut2 = self.shortcut2(weights, state, x2)
        (gy,), state, g_losses, g = self.g(weights, state, y1)
        y2 = add(s2, gy)
        losses = [*s1_losses, *f_losses, *s2_losses, *g_losses]
        return y1, y2, state, losses, (x1, x2, shortcut1, f, shortcut2, g)

    def backward(self, y1, y2, d1, d2, kept, gradients):
        x1, x2, shortcut1, f, shortcut2, g = kept
        (dy1,), _ = gradients.through(g, [y1], [d2], [d1])
        d1 = d1 + dy1
        (dx2,), _ = gradients.through(shortcut2, [x2], [d2], [d1])
        (d_f,), _ = gradients.through(f, [x2], [d1], [dx2])
        (dx1,), _ = gradients.through(shortcut1, [x1], [d1], [d_f])
        return x1, x2, dx1, dx2 + d_f


class Checkpoint(NamedTuple):
    """A block that cannot be undone: keeps its inputs and computes the rest anew."""

    block: Branch

    def forward(self, x1, x2, weights, state):
        (y1, y2), state, losses, block = self.block(weights, state, x1, x2)
        return y1, y2, state, losses, (x1, x2, block)

    def backward(self, y1, y2, d1, d2, kept, gradients):
        x1, x2, block = kept
        (d1, d2), _ = gradients.through(block, [x1, x2], [d1, d2])
        return x1, x2, d1, d2


class Watched(NamedTuple):
    """A step that tells what it rebuilds: `tell(inputs, rebuilt)`, two pairs.

    It keeps its inputs for that, and goes on with what it has rebuilt.
    """

    step: Coupling | Transition | Checkpoint
    tell: Callable

    def forward(self, x1, x2, weights, state):
        *results, kept = self.step.forward(x1, x2, weights, state)
        return *results, (kept, x1, x2)

    def backward(self, y1, y2, d1, d2, kept, gradients):
        gradients.inputs_needed = True
        kept, *inputs = kept
        *rebuilt, d1, d2 = self.step.backward(y1, y2, d1, d2, kept, gradients)
        self.tell(inputs, rebuilt)
        return *rebuilt, d1, d2


class Gradients:
    """The backward pass of a run: goes through its branches from the last to the first.

    Args:
        weights: the run's.
        d_losses: the gradients for the losses of all branches, in forward order.
        last: gradients for weights that were computed last; what is computed next
            waits for them.

    Attributes:
        of_weights: those found so far, added up; `None` for a weight without.
        last: as above.
        inputs_needed: whether someone goes on with the inputs of the present step: if
            not, the last of them is not rebuilt.
    """

    def __init__(self, weights, d_losses, last):
        self.of_weights = [None] * len(weights)
        self.last = last
        self.inputs_needed = True
        self._weights = weights
        self._d_losses = list(d_losses)

    def through(
        self, evaluation, inputs, d_outputs, after=(), total=None, fraction_bits=None
    ):
        """Evaluates a branch once more and differentiates it.

        Args:
            evaluation: its first `Evaluation`; all later ones have been gone through.
            inputs, d_outputs: lists of tensors.
            after: tensors that this waits for, beside `d_outputs`.
            total: the stream that the output was added to, after that.
            fraction_bits: of this stream.

        Returns:
            The gradients for the inputs, and `total` less the output, or `None`.
        """
        branch, state, first_read, num_losses = evaluation
        first = len(self._d_losses) - num_losses
        d_losses, self._d_losses = self._d_losses[first:], self._d_losses[:first]
        own = [self._weights[i] for i in branch.weights]
        inputs, own = _wait([*after, *d_outputs, *self.last], inputs, own)
        totals = [] if total is None else [total]
        rebuilt, d_inputs, d_weights, read = branch.call(
            _Differentiate(fraction_bits),
            own,
            state,
            inputs,
            totals,
            d_outputs,
            d_losses,
        )
        _check_gradients(branch, first_read, read, d_weights)
        # Zeros for a weight that has no part in this call: a replica where it has none
        # must agree with one where it has. A lookup's gradient is sparse.
        # (Those for the inputs need not be waited for: what follows is made of them.)
        self.last = [
            tf.zeros_like(w) if d is None else tf.convert_to_tensor(d)
            for w, d in zip(own, d_weights, strict=True)
        ]
        for i, d in zip(branch.weights, self.last, strict=True):
            self.of_weights[i] = _sum(self.of_weights[i], d)
        # The gradients for the weights hold the branch's activations until they are
        # there: who uses those for the inputs waits for them, too.
        with tf.control_dependencies(self.last):
            d_inputs = [tf.identity(d) for d in d_inputs]
        return d_inputs, rebuilt[0] if rebuilt else None


class Handoff:
    """Where a run finds its outputs again once the run that follows has rebuilt them.

    The run that makes the outputs returns the handoff, the run that consumes these very
    outputs is given it, and fills it while the gradient is traced. Where nothing was
    filled in (another consumer, no gradient path, another graph), the first run uses
    the outputs that it kept.

    Attributes:
        needed: whether the first run has a use for its outputs at all.
    """

    def __init__(self, needed):
        self.needed = needed
        self._rebuilt = self._graph = None

    def fill(self, y1, y2, last):
        # In eager mode all outputs are alive anyway; there is nothing to gain.
        if not tf.executing_eagerly():
            self._rebuilt = y1, y2, last
            self._graph = tf.compat.v1.get_default_graph()

    def take(self, y1, y2):
        """Returns a pair of streams and the gradients that were computed last.

        The pair is the rebuilt one if that is of the current graph, else `(y1, y2)`.
        """
        if self._rebuilt and self._graph is tf.compat.v1.get_default_graph():
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
        steps: list of `Coupling`, `Transition`, `Checkpoint` and `Watched`.
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
    handoff = Handoff(needed=not isinstance(steps[-1], Checkpoint))
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
                kept.append(step_kept)
                losses += step_losses
        _refuse_foreign_variables(tape.watched_variables())
        last_state = current

        def backward(d1, d2, _, *d_losses):
            if order is None:  # `forward` has not returned: a forward-mode derivative
                _refuse_higher_order()
            y1, y2, last = handoff.take(h1, h2)
            gradients = Gradients(weights, d_losses, last)
            for i in reversed(range(len(steps))):
                gradients.inputs_needed = i > 0 or received and received.needed
                y1, y2, d1, d2 = steps[i].backward(y1, y2, d1, d2, kept[i], gradients)
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


def add(x, change, fraction_bits=None, elementary=False):
    """Returns `x + change` without broadcasting: such a sum could not be undone.

    Of fixed-point numbers it is exact (in whatever order the sums are computed), and
    its gradient that of the plain sum; `elementary` as for `fixed_point.quantize`.
    """
    if fraction_bits is None:
        return tf.add_n([x, change])
    change = fixed_point.quantize(change, fraction_bits, elementary)
    return fixed_point.check(tf.add_n([x, change]), fraction_bits, elementary)


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


def _check_gradients(branch, first_read, read, gradients):
    """Refuses a branch that does not read its weights in such a way as to get these."""
    if read != first_read:
        raise ValueError(
            f"{branch.name} reads its weights when it is called first, and not when it "
            "is called again, as a `tf.function` does, which goes on using the value "
            "that it saw first; remove the decorator (the training step is a graph as "
            "it is), or set `recompute=False` on the block."
        )
    if any(
        was_read and gradient is None
        for was_read, gradient in zip(read, gradients, strict=True)
    ):
        raise ValueError(
            f"{branch.name} reads a trainable weight, but no gradient reaches it. A "
            "custom gradient or rematerialization inside a branch finds its weights "
            "as variables, and these are tensors here: remove it (the block "
            "recomputes already), or set `recompute=False` on the block."
        )


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
