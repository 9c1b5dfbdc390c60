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

from typing import NamedTuple

import tensorflow as tf

from revnet_tf import custom_gradient
from revnet_tf.order import wait
from revnet_tf.steps import Checkpoint, Differentiate, subtract


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
    """

    def __init__(self, weights, d_losses, last):
        self.of_weights = [None] * len(weights)
        self.last = last
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
            The gradients for the inputs, and `total` less the output, or `None`; and
            `inputs` and `d_outputs`, as whoever goes on with them has to use them.
        """
        branch, state, kept, first_read, num_losses = evaluation
        first = len(self._d_losses) - num_losses
        d_losses, self._d_losses = self._d_losses[first:], self._d_losses[:first]
        own = [self._weights[i] for i in branch.weights]
        inputs = wait([*after, *d_outputs, *self.last], inputs)
        totals = [] if total is None else [total]
        rebuilt, d_outputs, d_inputs, d_weights, read = branch.call(
            Differentiate(fraction_bits),
            own,
            state,
            kept,
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
            sum_before = self.of_weights[i]
            self.of_weights[i] = d if sum_before is None else sum_before + d
        # The gradients for the weights hold the branch's activations until they are
        # there: who uses those for the inputs waits for them, too.
        with tf.control_dependencies(self.last):
            d_inputs = [tf.identity(d) for d in d_inputs]
        return d_inputs, rebuilt[0] if rebuilt else None, inputs, d_outputs


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
        if self._graph is tf.compat.v1.get_default_graph():
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
                needed = i > 0 or bool(received and received.needed)
                y1, y2, d1, d2 = steps[i].backward(
                    y1, y2, d1, d2, kept[i], gradients, needed
                )
            if received is not None:
                received.fill(y1, y2, gradients.last)
            return custom_gradient.call(
                _first_order_only, order, d1, d2, *gradients.of_weights
            )

        return (h1, h2, tf.zeros([0], h1.dtype), *losses), backward

    # `order` is empty, costs nothing, and ties what `backward` returns to the arguments
    # of `forward`: whoever differentiates that once more gets to `_first_order_only`.
    y1, y2, order, *losses = custom_gradient.call(forward, x1, x2, *weights)
    return Result(y1, y2, last_state, losses, handoff)


def inverse(steps, y1, y2, weights=(), state=()):
    """Returns the streams that `Coupling` steps map to `(y1, y2)`; drops new states."""
    for step in reversed(steps):
        (gy,), *_ = step.g(weights, state, y1)
        x2 = subtract(y2, gy, step.fraction_bits)
        (fx,), *_ = step.f(weights, state, x2)
        y1, y2 = subtract(y1, fx, step.fraction_bits), x2
    return y1, y2


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
