"""The training program in a process of its own: `program.py OPTIONS ARGV ...`.

Options, as JSON:
    devices: number of logical CPUs. They have to be set before TensorFlow starts, and
        two mirrored strategies in one process abort it.
    network: one of `NETWORKS`, in place of that of the recipe.
    weights: file for the weights. Every worker adds its number to the name.
    fit_only: whether the run ends with the training, without export and score.
    timeout: seconds that a worker waits for the others.
    hang: number of the worker that hangs after its first step.
    kill: seconds from the end of the first step to SIGKILL.
    kill_in_save: seconds from the beginning of the first checkpoint to SIGKILL. The
        process is killed before it renames the checkpoint at the latest.
"""

import json
import os
import signal
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf

import revnet_tf
from revnet_tf import models
from training import cluster, fit, train


def network(*normalization):
    """Returns a function with the arguments of `models.RevNet`."""

    def branch(channels):
        layers = [layer() for layer in normalization]
        conv = keras.layers.Conv2D(channels, 3, padding="same", activation="tanh")
        return keras.Sequential([*layers, conv])

    def build(num_blocks, channels, bottleneck, *, input_shape, classes, **_):
        inputs = keras.Input(input_shape)
        x = keras.layers.Conv2D(8, 3, padding="same")(inputs)
        blocks = [revnet_tf.RevBlock(branch(4), branch(4)) for _ in range(2)]
        x = revnet_tf.RevSequence(blocks)(x)
        x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
        return keras.Model(inputs, keras.layers.Dense(classes)(x))

    return build


def normalize(**options):
    return lambda: keras.layers.BatchNormalization(**options)


NETWORKS = {
    "plain": network(),
    "batch_norm": network(normalize()),
    "synchronized": network(normalize(synchronized=True)),
    "dropout": network(normalize(), lambda: keras.layers.Dropout(0.2)),
}


def kill_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.start()
    return timer


def after_first_step(action):
    on_train_batch_end = fit.Saving.on_train_batch_end

    def first(*args, **logs):
        action()
        fit.Saving.on_train_batch_end = on_train_batch_end
        on_train_batch_end(*args, **logs)

    fit.Saving.on_train_batch_end = first


def kill_in_save(seconds):
    write = tf.train.Checkpoint.write

    def killed(*args):
        kill_after(seconds)
        write(*args)
        kill_after(0).join()

    tf.train.Checkpoint.write = killed


def main(options, argv):
    task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {})
    index = task.get("index", 0)
    if "devices" in options:
        (cpu,) = tf.config.list_physical_devices("CPU")
        devices = [tf.config.LogicalDeviceConfiguration()] * options["devices"]
        tf.config.set_logical_device_configuration(cpu, devices)
    if "network" in options:
        models.RevNet = NETWORKS[options["network"]]
    if "timeout" in options:
        cluster.TIMEOUT = options["timeout"]
    if options.get("hang") == index:
        after_first_step(lambda: time.sleep(1000))
    if "kill" in options:
        after_first_step(lambda: kill_after(options["kill"]))
    if "kill_in_save" in options:
        kill_in_save(options["kill_in_save"])
    if options.get("fit_only"):
        train.finish = lambda *_: None
    fit_ = fit.fit

    def fit_and_write(network, *args):
        rows = fit_(network, *args)
        if "weights" in options:
            weights = np.concatenate([w.numpy().ravel() for w in network.weights])
            np.save(f"{options['weights']}{index}.npy", weights)
        return rows

    fit.fit = fit_and_write
    train.main(argv)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
