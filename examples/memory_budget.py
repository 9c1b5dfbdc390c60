"""
Title: A deep network within a memory budget
Description: Estimate the memory of a training step, plan for a budget, and measure it.

A reversible network can spend spare memory on speed: a block that stores its
activations needs no recomputation. `revnet_tf.memory` answers three questions:

- `estimate`: how much memory does a training step need? Nothing is computed.
- `plan`: which blocks may store their activations within a budget?
- `measure`: how much memory does a step need according to the device's allocator?

    python examples/memory_budget.py
"""

import argparse
import os

# TensorFlow's allocator for CPUs counts its bytes only with oneDNN, which TensorFlow
# does not use on every processor. `measure` needs the count.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"

import keras
import numpy as np

import revnet_tf
from revnet_tf import memory

parser = argparse.ArgumentParser(description="Plans a deep network for budgets.")
parser.add_argument("--blocks", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--budgets", type=int, default=4, help="number of budgets, above 1")
parser.add_argument("--steps", type=int, default=5, help="training steps at the end")
args = parser.parse_args()

"""
## A deep network

All blocks work at one resolution. Without XLA, the default of this script, TensorFlow
allocates each tensor by itself; with `jit_compile=True` the three functions report the
buffers of the compiled step.
"""


def branch():
    return keras.Sequential(
        [
            revnet_tf.normalization.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
        ]
    )


blocks = [revnet_tf.RevBlock(branch(), branch()) for _ in range(args.blocks)]
model = keras.Sequential(
    [
        keras.Input((32, 32, 3)),
        keras.layers.Conv2D(64, 3, padding="same"),
        revnet_tf.RevSequence(blocks, name="body"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=False)

"""
## Estimate

The report names each part of the peak. Then all blocks store their activations, as in
ordinary backpropagation.
"""

recomputed = memory.estimate(model, args.batch_size)
print(recomputed)
body = model.get_layer("body")
body.recompute = False
stored = memory.estimate(model, args.batch_size)
print(f"peak of ordinary backpropagation {stored.peak_bytes / 1e6:.1f} MB")

"""
## Plan and measure

`plan` sets `recompute` of every block, and counts estimates 8 % higher. If
the budget is too small even with recomputation, an error names the minimum.
"""

low, high = 1.3 * recomputed.peak_bytes, 1.2 * stored.peak_bytes
print(f"{'budget, MB':>12} {'stored blocks':>14} {'measured peak, MB':>18}")
for budget in np.linspace(low, high, args.budgets):
    memory.plan(model, args.batch_size, int(budget))
    num_stored = sum(not block.recompute for block in blocks)
    peak = memory.measure(model, args.batch_size).peak_bytes
    print(f"{budget / 1e6:12.1f} {num_stored:14} {peak / 1e6:18.1f}")

"""
## Training

The model trains with the last plan. Every plan computes the same gradients.
"""

rng = np.random.default_rng(0)
images = rng.random((args.steps * args.batch_size, 32, 32, 3), dtype="float32")
labels = rng.integers(10, size=len(images))
model.fit(images, labels, args.batch_size, verbose=2)
