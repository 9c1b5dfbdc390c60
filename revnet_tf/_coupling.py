"""Algorithm 1 of the RevNet paper: blocks, and their gradients by reconstruction.

A reversible block maps two streams (x1, x2) to (y1, y2):

    forward    y1 = x1 + f(x2)        y2 = x2 + g(y1)
    inverse    x2 = y2 - g(y1)        x1 = y1 - f(x2)

`Coupling` is this block. The other blocks are the steps between reversible blocks. A
block is made of pure functions (see `FirstCalls`) and has two methods:

- `forward(call, *inputs)` returns the outputs, and a list of tensors to store for
  `backward`. `call(function, inputs)` returns the outputs of a function.
- `backward(again, stored, outputs, gradients, reconstruct)` returns the inputs, and the
  gradients for them. `again(function, inputs, after)` evaluates a function once more,
  see `SecondCalls`. The order of the functions is the reverse of that in `forward`. If
  `reconstruct` is false, nothing uses the inputs, and they can be `None`.

`Coupling` and `Rearrangement` also have `inverse(call, *outputs)`.

Reference: Gomez et al., 2017, Algorithm 1, https://arxiv.org/abs/1707.04585
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from revnet_tf import _fixed_point
from revnet_tf._ordering import wait


class Coupling(NamedTuple):
    """A reversible block.

    Attributes:
        f, g: functions (`_functional.Function`) of one tensor.
        fraction_bits: of streams in fixed point, or `None`.
        anchor: whether to store the inputs instead of reconstructing them.
        elementary: as for `_fixed_point.quantize`.
        restore: function that replaces rounding errors of a reconstructed `x2` by
            zeros; see `_exact_zeros`. `None`: no channel of `x2` consists of zeros.
    """

    f: Callable
    g: Callable
    fraction_bits: int | None = None
    anchor: bool = False
    elementary: bool = False
    restore: Callable | None = None

    def forward(self, call, x1, x2):
        (fx,) = call(self.f, [x2])
        y1 = add(x1, fx, self.fraction_bits, self.elementary)
        (gy,) = call(self.g, [y1])
        y2 = add(x2, gy, self.fraction_bits, self.elementary)
        return [y1, y2], [x1, x2] if self.anchor else []

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        (y1, y2), (d1, d2) = outputs, gradients
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
            self.gradients = list(map(sum_of, self.gradients, found))
            # The activations are free once these exist. Layers before the run, which do
            # not know `last`, wait by the control dependency.
            self.last = [d for d in found if d is not None]
            with tf.control_dependencies(self.last):
                return [tf.identity(d) for d in d_inputs]

        return inputs, outputs, pull

    def first(self, function, inputs):
        """Returns the outputs of the function that the block calls first."""
        return function(self._weights, self._states[0], inputs)[0]


def vjp(function, weights, state, inputs):
    """Evaluates a function for its vector-Jacobian product.

    Returns:
        The outputs, and `pullback(d_outputs, d_losses)`. This can be called once. It
        returns the gradients for the inputs, and those for the weights (`None` for an
        unused one).
    """
    sources = [*filter(has_gradient, inputs), *weights]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        outputs, _, losses, read = function.trace(weights, state, inputs)

    def pullback(d_outputs, d_losses):
        pairs = zip([*outputs, *losses], [*d_outputs, *d_losses], strict=True)
        targets, d_targets = zip(*(p for p in pairs if has_gradient(p[0])), strict=True)
        d_sources = tape.gradient(targets, sources, output_gradients=d_targets)
        # The gradient of a lookup is sparse.
        d_sources = [d if d is None else tf.convert_to_tensor(d) for d in d_sources]
        found = iter(d_sources)
        d_inputs = [next(found) if has_gradient(x) else None for x in inputs]
        d_weights = [*found]
        function.check(d_weights, read)
        return [*map(or_zeros, d_inputs, inputs)], d_weights

    return outputs, pullback


def sum_of(a, b):
    """Returns the sum of two gradients; `None` stands for none."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def has_gradient(tensor):
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else gradient
