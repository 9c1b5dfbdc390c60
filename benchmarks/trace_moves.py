"""Counts the functions of `revnet_tf` that one training step of a `RevBlock` enters.

    python -m benchmarks.trace_moves

The script traces the step as a graph once. The branches are Keras's batch
normalization, ReLU and a convolution. For the forward and for the backward pass the
script prints two numbers:

- functions: the entered functions of the library, each counted once;
- moves: the calls into another file than that of the call before.

A reader follows a step through as many functions and files.
"""

import itertools
import os
import sys

import keras
import tensorflow as tf

import revnet_tf

PACKAGE = os.path.dirname(revnet_tf.__file__)


class Count:
    """Records the calls within its context with a profile function."""

    def __enter__(self):
        self.calls = []
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, frame, event, _):
        code = frame.f_code
        # The code of lambdas and comprehensions stands in the calling function.
        named = not code.co_name.startswith("<")
        if event == "call" and named and code.co_filename.startswith(PACKAGE):
            self.calls.append(code)

    def __str__(self):
        files = [code.co_filename for code in self.calls]
        moves = sum(a != b for a, b in itertools.pairwise(files))
        return f"{len(set(self.calls)):3} functions  {moves:3} moves"


def branch():
    layers = [
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Conv2D(4, 3, padding="same", use_bias=False),
    ]
    return keras.Sequential(layers)


def count():
    """Returns the `Count` of the forward pass and that of the backward pass."""
    block = revnet_tf.RevBlock(branch(), branch())
    block.build((2, 8, 8, 8))
    forward, backward = Count(), Count()

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            with forward:
                y = block(x, training=True)
            loss = tf.reduce_sum(y)
        with backward:
            return tape.gradient(loss, block.trainable_variables)

    step.get_concrete_function(tf.TensorSpec((2, 8, 8, 8)))
    return forward, backward


def main():
    forward, backward = count()
    print(f"forward   {forward}\nbackward  {backward}")


if __name__ == "__main__":
    main()
