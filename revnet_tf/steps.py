"""What a reversible run is made of: blocks on plain tensors, and the branches in them.

A step maps two streams to two streams. `forward` returns, beside them, the new state
and the losses, what it keeps for its gradient. `backward` goes from its outputs and the
gradients for them to its inputs and the gradients for these, and evaluates each of its
branches once more for that (`coupling.Gradients.through`). Unless `inputs_needed`,
because nobody goes on with the inputs, the last of them is not rebuilt.

A branch is a list of functions, differentiated one by one from the last to the first:
what one of them needs for that is let go before the next is differentiated.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from revnet_tf import fixed_point, reuse
from revnet_tf.order import wait


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
        outputs, changed, losses, kept, read = self.call(_evaluate, *own, inputs)
        after = list(state)
        for i, value in zip(self.state, changed, strict=True):
            if value is not None:
                after[i] = value
        evaluation = Evaluation(self, own[1], kept, read, len(losses))
        return outputs, after, losses, evaluation

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
        kept: for each function what it found and does not compute again (`reuse`).
        read: for each weight whether it was read.
        num_losses: how many losses there were.
    """

    branch: Branch
    state: Sequence
    kept: Sequence[list]
    read: Sequence[bool]
    num_losses: int


def _evaluate(functions, weights, state, outputs):
    """Returns outputs, new state (`None` where it is the old), losses, kept, read."""
    new_state, losses, kept, read = state, [], [], [False] * len(weights)
    for function in functions:
        with reuse.first() as found:
            outputs, new_state, more, has_read = function(weights, new_state, *outputs)
        kept.append(found)
        losses += more
        read = [a or b for a, b in zip(read, has_read, strict=True)]
    changed = [
        None if new is old else new for old, new in zip(state, new_state, strict=True)
    ]
    return outputs, changed, losses, kept, read


class Differentiate(NamedTuple):
    """Differentiates functions whose outputs were added to streams, and undoes that.

    With `fraction_bits` these streams are fixed-point numbers.
    """

    fraction_bits: int | None

    def __call__(
        self, functions, weights, state, kept, inputs, sums, d_outputs, d_losses
    ):
        """Returns the sums less the outputs, `d_outputs`, the gradients, `read`.

        The gradients are those for the inputs and those for the weights: two lists.
        Whoever goes on with `d_outputs` has to use those returned (`order.wait`).

        `sums` may be empty: of outputs that were not added to anything.
        """
        tapes, outputs, read = [], inputs, [False] * len(weights)
        for function, found in zip(functions, kept, strict=True):
            inputs = outputs
            tape = tf.GradientTape(watch_accessed_variables=False)
            with tape, reuse.second(found):
                tape.watch([*inputs, *weights])
                outputs, state, losses, has_read = function(weights, state, *inputs)
            tapes.append((tape, inputs, outputs, losses))
            read = [a or b for a, b in zip(read, has_read, strict=True)]
        rebuilt = [
            subtract(y, change, self.fraction_bits)
            for y, change in zip(sums, outputs, strict=False)
        ]
        # What is not needed any more is let go first: what follows needs its memory.
        d_outputs = gradients = wait(rebuilt or inputs, d_outputs)
        d_losses, d_weights = list(d_losses), [None] * len(weights)
        while tapes:
            tape, inputs, outputs, losses = tapes.pop()
            first = len(d_losses) - len(losses)
            found = tape.gradient(
                [*outputs, *losses],
                [*inputs, *weights],
                output_gradients=[*gradients, *d_losses[first:]],
            )
            del d_losses[first:]
            gradients = [
                tf.zeros_like(x) if d is None else tf.convert_to_tensor(d)
                for x, d in zip(inputs, found, strict=False)
            ]
            found = found[len(inputs) :]
            # XLA's order is like that by itself here.
            with tf.control_dependencies([d for d in found if d is not None]):
                gradients = [tf.identity(d) for d in gradients]
            d_weights = [_sum(a, b) for a, b in zip(d_weights, found, strict=True)]
        return rebuilt, d_outputs, gradients, d_weights, read


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

    def backward(self, y1, y2, d1, d2, kept, gradients, inputs_needed):
        f, g, inputs = kept
        bits = self.fraction_bits
        # In the paper's Algorithm 1: lines 3, 5 and 9, then 4, 6, 8 and 10.
        (dy1,), x2, (y1,), (d2,) = gradients.through(
            g, [y1], [d2], [d1], None if inputs else y2, bits
        )
        d1 = d1 + dy1
        (dx2,), x1, (x2,), (d1,) = gradients.through(
            f,
            [inputs[1] if inputs else x2],
            [d1],
            [d2],
            y1 if inputs_needed and not inputs else None,
            bits,
        )
        return inputs[0] if inputs else x1, x2, d1, d2 + dx2


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

    def backward(self, y1, y2, d1, d2, kept, gradients, inputs_needed):
        x1, x2, shortcut1, f, shortcut2, g = kept
        (dy1,), _, _, (d2,) = gradients.through(g, [y1], [d2], [d1])
        d1 = d1 + dy1
        (dx2,), _, (x2,), _ = gradients.through(shortcut2, [x2], [d2], [d1])
        (d_f,), _, (x2,), (d1,) = gradients.through(f, [x2], [d1], [dx2])
        (dx1,), _, (x1,), _ = gradients.through(shortcut1, [x1], [d1], [d_f])
        return x1, x2, dx1, dx2 + d_f


class Checkpoint(NamedTuple):
    """A block that cannot be undone: keeps its inputs and computes the rest anew."""

    block: Branch

    def forward(self, x1, x2, weights, state):
        (y1, y2), state, losses, block = self.block(weights, state, x1, x2)
        return y1, y2, state, losses, (x1, x2, block)

    def backward(self, y1, y2, d1, d2, kept, gradients, inputs_needed):
        x1, x2, block = kept
        (d1, d2), _, (x1, x2), _ = gradients.through(block, [x1, x2], [d1, d2])
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

    def backward(self, y1, y2, d1, d2, kept, gradients, inputs_needed):
        kept, *inputs = kept
        *rebuilt, d1, d2 = self.step.backward(y1, y2, d1, d2, kept, gradients, True)
        self.tell(inputs, rebuilt)
        return *rebuilt, d1, d2


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
