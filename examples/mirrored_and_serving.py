"""
Title: Training on several devices, and serving the result
Description: Train under `MirroredStrategy`, write a SavedModel, and load it.

A reversible network trains under a distribution strategy as any Keras model. Every
device computes the gradient of its share of the batch, and all devices apply the sum.
The result becomes a SavedModel. A server loads it with TensorFlow only.

The script uses all GPUs. Without a GPU it splits the CPU into two logical devices. The
data are scikit-learn's handwritten digits.

    python examples/mirrored_and_serving.py
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import revnet_tf

parser = argparse.ArgumentParser(description="Trains on several devices; exports.")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--output", default=f"served/{int(time.time())}", metavar="DIR")
args = parser.parse_args()

"""
## Devices

TensorFlow fixes its devices when it starts, so this comes first.
"""

if not tf.config.list_physical_devices("GPU"):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
strategy = tf.distribute.MirroredStrategy()
print(f"{strategy.num_replicas_in_sync} devices")

"""
## Network

The variables, and so the model, are made in the scope of the strategy. Every device
normalizes its own share of the batch, unless `synchronized=True`.
"""


def branch():
    return keras.Sequential(
        [
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
        ]
    )


keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype="uint8"),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Conv2D(32, 3, padding="same"),
            revnet_tf.RevSequence(
                [revnet_tf.RevBlock(branch(), branch()) for _ in range(4)]
            ),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])

"""
## Training

`fit` splits each batch evenly among the devices.
"""

digits = load_digits()
images, labels = digits.images[..., None].astype("uint8"), digits.target
train_images, train_labels = images[360:], labels[360:]
test_images, test_labels = images[:360], labels[:360]
model.fit(train_images, train_labels, batch_size=64, epochs=args.epochs, verbose=2)
_, accuracy = model.evaluate(test_images, test_labels, verbose=0)
print(f"test accuracy: {accuracy:.3f}")

"""
## Export

`export_saved_model` writes the forward pass only. Before the folder gets its name,
another process loads it and compares the answers. The name of the folder is a version
number, as TensorFlow Serving expects.
"""

revnet_tf.export.export_saved_model(
    model,
    args.output,
    class_names=[str(digit) for digit in range(10)],
    examples=test_images[:32],
)

"""
## Serving

A server loads the folder and calls a signature. Every device has moving statistics of
its own. The file, and the model outside of `fit`, use their mean.
"""

serve = tf.saved_model.load(args.output).signatures["serving_default"]
answers = serve(inputs=tf.constant(test_images[:8]))
print("digits:", [name.decode() for name in answers["class_name"].numpy()])
live = model(test_images[:8], training=False)
difference = np.abs(answers["predictions"] - live).max()
print(f"largest difference from the live model: {difference:.1e}")
