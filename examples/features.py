"""
Title: Images from features
Description: Train an i-RevNet, and compute images from the features of its stages.

A classifier usually loses most of its input. An i-RevNet loses nothing before the last
pooling: space to depth takes the place of strides, and every step has an inverse. This
script trains a small one on CIFAR-10, then draws

- test images, computed back from the features of each stage;
- an interpolation between two images: the features of the last stage are mixed, and
  the mixture is computed back to an image.

Run it from a checkout with the extra `train`; TFDS downloads CIFAR-10 once:

    python examples/features.py
"""

import argparse

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

import revnet_tf

parser = argparse.ArgumentParser(description="Computes images from features.")
parser.add_argument("--steps", type=int, default=500, help="training steps")
parser.add_argument("--blocks", type=int, default=4, help="blocks of each stage")
parser.add_argument("--plot", default="features.png", help="path of the picture")
args = parser.parse_args()

"""
## Data and training

Pixels are scaled to [-1, 1].
"""

train, test = tfds.load("cifar10", split=["train", "test"], as_supervised=True)


def scale(image, label):
    return tf.cast(image, tf.float32) / 127.5 - 1, label


batches = train.shuffle(10_000).repeat().map(scale).batch(100)
model = revnet_tf.models.iRevNet(
    num_blocks=(args.blocks,) * 3,
    channels=(16, 64, 256),  # of one stream
    strides=(1, 2, 2),
    classifier_activation=None,
)
model.compile(
    keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, args.steps), 0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,  # on a CPU XLA takes longer
)
model.fit(batches.prefetch(tf.data.AUTOTUNE), steps_per_epoch=args.steps, verbose=2)
test = test.map(scale).batch(100)
print(f"test accuracy: {model.evaluate(test.take(20), verbose=0)[1]:.3f}")

"""
## Images from the features of each stage

`body` is a `RevSequence`. A sequence of its first blocks, which shares their weights,
returns the features of a stage. Its `inverse` returns the images.
"""

body = model.get_layer("body")
images, _ = next(iter(test))
images = images[:8]
rows = {"image": images}
for stage in ("stage1", "stage2", "stage3"):
    last = max(i for i, block in enumerate(body.blocks) if block.name.startswith(stage))
    part = revnet_tf.RevSequence(body.blocks[: last + 1])
    features = part(images)
    rows[f"{stage}\n{'x'.join(map(str, features.shape[1:]))}"] = part.inverse(features)
    error = np.abs(part.inverse(features) - images).max()
    print(f"largest difference of the images from {stage}: {error:.1e}")

"""
## Interpolation

The straight line between the features of two images leads back to a curve in the space
of images. The line between the pixels is drawn above it.
"""

start, end = images[:1], images[1:2]
share = tf.reshape(tf.linspace(0.0, 1.0, 8), (8, 1, 1, 1))
rows["mixed\npixels"] = (1 - share) * start + share * end
mixture = (1 - share) * body(start) + share * body(end)
rows["mixed\nfeatures"] = body.inverse(mixture)
straightness = np.abs(rows["mixed\nfeatures"] - rows["mixed\npixels"]).max()
print(f"largest difference of the two interpolations: {straightness:.1e}")

"""
## Picture
"""

figure = Figure(figsize=(9, 7), layout="constrained")
axes = figure.subplots(len(rows), 8)
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(np.clip((picture + 1) / 2, 0, 1))
        ax.set(xticks=[], yticks=[])
figure.savefig(args.plot, dpi=120)
