"""
Title: Watching and bounding drift
Description: Measure the rounding errors of reconstructed activations; bound them.

A reversible block reconstructs its input by subtraction, and rounding makes the result
differ from the original. The difference grows from block to block: it drifts. In most
networks drift is harmless in float32. In 16 bits it can ruin a gradient. This script

- measures the drift of one network in three number formats,
- bounds it with anchors, and rules it out with fixed-point streams,
- trains with a monitor that sets anchors when drift passes a bound.

The data are scikit-learn's handwritten digits.

    python examples/drift.py
"""

import argparse

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import revnet_tf
from revnet_tf import numerics

parser = argparse.ArgumentParser(description="Measures and bounds drift.")
parser.add_argument("--blocks", type=int, default=16)
parser.add_argument("--steps", type=int, default=200, help="training steps")
parser.add_argument("--plot", default="drift.png", help="image of the monitor")
args = parser.parse_args()

digits = load_digits()
images, labels = digits.images[..., None] / 16, digits.target
batches = tf.data.Dataset.from_tensor_slices((images, labels))
batches = batches.shuffle(2_000, seed=0).repeat().batch(32)
few = images[:16], labels[:16]  # one batch for all measurements

"""
## Network

`dtype="bfloat16"` gives streams and branches 16 bits. `fraction_bits=14` makes the
streams multiples of `2**-14`, whose sums are exact.
"""


def build(dtype="float32", fraction_bits=None):
    def branch():
        return keras.Sequential(
            [
                keras.layers.BatchNormalization(dtype=dtype),
                keras.layers.ReLU(dtype=dtype),
                keras.layers.Conv2D(8, 3, padding="same", dtype=dtype),
            ]
        )

    keras.utils.set_random_seed(0)
    blocks = [
        revnet_tf.RevBlock(branch(), branch(), dtype=dtype) for _ in range(args.blocks)
    ]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same"),
            revnet_tf.RevSequence(blocks, fraction_bits=fraction_bits),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.02), loss, jit_compile=False)
    return model


"""
## Measurements

`reconstruction_error` compares the inputs of each block with the reconstructed ones.
`gradient_angle` compares the gradient with that of stored activations.
"""


def show(name, model):
    errors = numerics.reconstruction_error(model, few[0])
    worst = max(error.relative for error in errors.values())
    angle = numerics.gradient_angle(model, *few).overall
    print(f"{name:26} {worst:12.1e} {angle:14.4f}")


print(f"{'streams':26} {'worst error':>12} {'angle, degrees':>14}")
show("float32", build())
show("float32, fixed point", build(fraction_bits=14))
model = build("bfloat16")
show("bfloat16", model)

"""
## Anchors

An anchor is a block that stores its inputs. Drift starts anew at each. `set_anchors`
finds a distance with error and angle below the bounds.
"""

anchors = numerics.set_anchors(model, *few, max_error=0.05)
show(f"bfloat16, {len(anchors)} anchors", model)

"""
## Monitor

The monitor measures both values during training, warns when one passes its bound, and
here sets anchors at once. It draws both over the steps.
"""

model = build("bfloat16")
monitor = numerics.ReversibilityMonitor(
    *few, every_steps=50, max_error=0.05, anchor=True, plot=args.plot
)
model.fit(batches, steps_per_epoch=args.steps, callbacks=[monitor], verbose=2)
for row in monitor.rows:
    print(row)
