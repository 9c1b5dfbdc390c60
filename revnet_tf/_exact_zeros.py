"""Exact zeros in the backward pass of a coupling after a padding.

A `Rearrangement` can add channels of zeros. The backward pass reconstructs these zeros
with rounding errors, as tiny values. A branch with normalization divides a channel of
tiny values by its tiny deviation, and a ReLU has another gradient at a tiny value than
at zero. The gradient would be another one.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from revnet_tf._coupling import Coupling, Rearrangement, add
from revnet_tf._ordering import wait


def with_exact_zeros(steps, before, inputs=None):
    """Returns steps whose couplings restore the zeros that a padding has added.

    Args:
        steps: list of `_run.Step`.
        before: list of `Rearrangement`, those directly before the steps.
        inputs: list of tensors, or `None`. The list `before` maps them to the inputs of
            the steps. A coupling in floating point after a padding then uses them.

    Returns:
        The steps, and the rearrangements directly after the last other block.
    """
    found = []
    for step in steps:
        if isinstance(step.block, Rearrangement):
            before = [*before, step.block]
        else:
            restore = _restoring(before)
            if restore and isinstance(step.block, Coupling):
                block = step.block._replace(restore=restore)
                if inputs is not None and block.fraction_bits is None:
                    block = _FromInputs(block, before, inputs)
                # Another function than its twins.
                step = step._replace(block=block, traces=None)
            before, inputs = [], None
        found.append(step)
    return found, before


def as_rearrangement(pair):
    """Returns a `Pair`, which can begin with paddings, as a `Rearrangement`."""
    adds_zeros = any(block.adds_zeros for block in pair.leading)
    return Rearrangement(pair.split, pair.join, adds_zeros)


def _restoring(rearrangements):
    """Returns the `restore` of a `Coupling` after rearrangements."""
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


class _FromInputs(NamedTuple):
    """A coupling whose backward pass starts from the inputs of the run.

    The inputs are smaller than the streams after the padding, and mostly exist anyway:
    an image is the input of the network. With a stream of zeros `f` often returns
    zeros. `y1` then has channels of zeros, which `g` needs exactly, too.

    Attributes:
        coupling: the `Coupling`.
        before: list of `Rearrangement`, maps `inputs` to the inputs of the coupling.
        inputs: list of tensors, the inputs of the run.
    """

    coupling: Coupling
    before: Sequence[Rearrangement]
    inputs: Sequence[tf.Tensor]

    def forward(self, call, x1, x2):
        return self.coupling.forward(call, x1, x2)

    def backward(self, again, stored, outputs, gradients, reconstruct=True):
        streams = wait([*gradients, *again.last], self.inputs)
        for block in self.before:
            streams = block.there(streams)
        x1, x2 = streams
        y1 = add(x1, *again.first(self.coupling.f, [x2]))
        outputs = [y1, outputs[1]]
        return self.coupling.backward(again, streams, outputs, gradients)
