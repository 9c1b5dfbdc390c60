"""
Title: A reversible network of your own on CIFAR-10
Description: Build a network of three stages, train it with `fit`, and invert a stage.

A residual network stores the activations of every block for the backward pass. A
reversible network stores the output of each stage, and reconstructs the activations
from it. This script builds such a network from three public layers:

- `RevBlock` maps two streams to two streams: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.
- `RevSequence` is a stage: blocks of one resolution.
- `DownsamplingBlock` halves the resolution between two stages.

Run it from a checkout with the extra `train`; TFDS downloads CIFAR-10 once:

    python examples/cifar10_own_network.py
"""

import argparse

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import revnet_tf

parser = argparse.ArgumentParser(description="Trains a reversible network on CIFAR-10.")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--steps", type=int, default=500, help="training steps of an epoch")
args = parser.parse_args()

"""
## Data

TFDS gives pairs of an image, `(32, 32, 3)` in `uint8`, and a label. Training images are
shuffled, and flipped at random.
"""

train, test = tfds.load("cifar10", split=["train", "test"], as_supervised=True)


def flip(image, label):
    return tf.image.random_flip_left_right(image), label


train_batches = train.shuffle(10_000).repeat().map(flip).batch(100)
train_batches = train_batches.prefetch(tf.data.AUTOTUNE)
test_batches = test.batch(100).take(args.steps)

"""
## Network

A branch, `f` or `g`, is any Keras layer that keeps the shape of its stream. The
library's `BatchNormalization` computes the values of Keras's, and its gradient stores
less.
"""


def branch(filters, strides=1):
    return keras.Sequential(
        [
            revnet_tf.normalization.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
        ]
    )


def stage(x, filters, num_blocks, name):
    """Applies a stage; halves the resolution first if the number of filters changes."""
    half = filters // 2  # the width of one stream
    if x.shape[-1] != filters:
        x = revnet_tf.DownsamplingBlock(
            branch(half, strides=2),
            branch(half),
            revnet_tf.PoolingShortcut(half, strides=2),
            revnet_tf.PoolingShortcut(half, strides=2),
        )(x)
    blocks = [revnet_tf.RevBlock(branch(half), branch(half)) for _ in range(num_blocks)]
    return revnet_tf.RevSequence(blocks, name=name)(x)


inputs = keras.Input((32, 32, 3))
x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
x = keras.layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
for i, filters in enumerate((32, 64, 128)):
    x = stage(x, filters, num_blocks=2, name=f"stage{i + 1}")
x = keras.layers.ReLU()(revnet_tf.normalization.BatchNormalization()(x))
x = keras.layers.GlobalAveragePooling2D()(x)
model = keras.Model(inputs, keras.layers.Dense(10)(x))

"""
## Training

`fit` trains the model as any other. The blocks reconstruct their activations in it.
"""

steps = args.epochs * args.steps
model.compile(
    keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, steps), 0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,  # on a CPU XLA takes longer
)
model.fit(train_batches, epochs=args.epochs, steps_per_epoch=args.steps, verbose=2)
_, accuracy = model.evaluate(test_batches, verbose=0)
print(f"test accuracy: {accuracy:.3f}")

"""
## Inverse

A stage can be run backwards: its output determines its input, up to rounding.
"""

stage2 = model.get_layer("stage2")
images, _ = next(iter(test_batches))
before, after = keras.Model(inputs, [stage2.input, stage2.output])(images)
error = np.abs(stage2.inverse(after) - before).max()
print(f"largest difference of the reconstructed input of stage2: {error:.1e}")
