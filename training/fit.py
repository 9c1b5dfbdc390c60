"""A recipe, fitted: the network, its optimizer, the loop with its checkpoints."""

import math
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from revnet_tf import models
from training import runs


def learning_rate(recipe):
    """Returns the learning rate of a recipe: a number, or a schedule of the step."""
    schedules = keras.optimizers.schedules
    if recipe.schedule == "cosine":
        return schedules.CosineDecay(
            0.0 if recipe.warmup_steps else recipe.learning_rate,
            recipe.train_steps - recipe.warmup_steps,
            warmup_target=recipe.learning_rate if recipe.warmup_steps else None,
            warmup_steps=recipe.warmup_steps,
        )
    if not recipe.decay_steps:
        return recipe.learning_rate
    return schedules.PiecewiseConstantDecay(
        # A boundary is the last step of the rate before it.
        [step - 1 for step in recipe.decay_steps],
        [recipe.learning_rate / 10**i for i in range(len(recipe.decay_steps) + 1)],
    )


def build(recipe, images):
    """Returns the compiled network: normalized images to logits."""
    options = {}
    if recipe.reversible:
        options = {
            "recompute": recipe.recompute,
            "fraction_bits": recipe.fraction_bits,
        }
    network = (models.RevNet if recipe.reversible else models.ResNet)(
        recipe.num_blocks,
        recipe.channels,
        recipe.bottleneck,
        stem="imagenet" if recipe.dataset == "imagenet2012" else "cifar",
        input_shape=images.image_shape,
        classes=len(images.class_names),
        classifier_activation=None,
        # The gradient of c * w**2 is 2 * c * w. Keras's own `weight_decay` is
        # decoupled from the gradient, and would be another method.
        kernel_regularizer=keras.regularizers.L2(recipe.weight_decay / 2),
        **options,
    )
    network.compile(
        optimizer=keras.optimizers.SGD(learning_rate(recipe), recipe.momentum),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[
            keras.metrics.SparseCategoricalAccuracy("accuracy"),
            # What Keras reports as `loss` has the regularization in it.
            keras.metrics.SparseCategoricalCrossentropy(
                "cross_entropy", from_logits=True
            ),
        ],
    )
    # Before any checkpoint is read: there has to be something to read it into.
    network.optimizer.build(network.trainable_variables)
    return network


def num_parameters(network):
    """Returns the number of trainable ones, as papers count."""
    return sum(math.prod(weight.shape) for weight in network.trainable_weights)


def serving_model(network, images):
    """Returns the model that takes `uint8` images and gives probabilities."""
    inputs = keras.Input(images.image_shape, dtype="uint8", name="image")
    normalized = keras.layers.Normalization(
        axis=(1, 2, 3),
        mean=images.mean,
        variance=np.full_like(images.mean, images.scale**2),
    )(inputs)
    probabilities = keras.layers.Softmax(name="probabilities")(network(normalized))
    return keras.Model(inputs, probabilities, name=f"{network.name}_serving")


def fit(network, recipe, images, run_dir):
    """Trains `network`, from the last checkpoint in `run_dir` if there is one.

    Returns:
        The rows of `metrics.csv`.
    """
    steps_per_epoch = images.steps_per_epoch(recipe.global_batch_size)
    # The variables, not the model: in a model TensorFlow does not find Keras's seed
    # generators.
    checkpoint = tf.train.Checkpoint(
        network=network.variables, optimizer=network.optimizer.variables
    )
    manager = tf.train.CheckpointManager(
        checkpoint, run_dir / "checkpoints", max_to_keep=2
    )
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
    first_step = int(network.optimizer.iterations.numpy())
    first_epoch = math.ceil(first_step / steps_per_epoch)
    if first_step:
        print(f"Going on from step {first_step} of {recipe.train_steps}", flush=True)
    # Written before the checkpoint, it may be a row ahead of it.
    rows = runs.read_metrics(run_dir / "metrics.csv")[:first_epoch]
    network.fit(
        images.training_batches(recipe, first_step),
        validation_data=images.test_batches(recipe.global_batch_size),
        initial_epoch=first_epoch,
        epochs=math.ceil(recipe.train_steps / steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        shuffle=False,  # done by the batches
        callbacks=[_RunFolder(recipe, run_dir, rows, manager, first_step)],
        verbose=1 if sys.stdout.isatty() else 0,
    )
    return rows


class _RunFolder(keras.callbacks.Callback):
    """Keeps the run folder up to date, and ends the run at its last step."""

    def __init__(self, recipe, run_dir, rows, manager, first_step):
        super().__init__()
        self.recipe = recipe
        self.run_dir = run_dir
        self.rows = rows
        self.manager = manager
        self.step = first_step
        self.rate = learning_rate(recipe)

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step == self.recipe.train_steps:
            self.model.stop_training = True

    def on_test_begin(self, logs=None):
        self.seconds = time.perf_counter() - self.began

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The loss is {logs['loss']} after step {self.step}; "
                "lower learning_rate."
            )
        rate = self.rate(self.step - 1) if callable(self.rate) else self.rate
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "learning_rate": float(f"{float(rate):.6g}"),  # 0.1, not its float32
            "train_loss": logs["cross_entropy"],
            "train_accuracy": logs["accuracy"],
            "test_loss": logs["val_cross_entropy"],
            "test_accuracy": logs["val_accuracy"],
            "seconds": round(self.seconds, 3),
        }
        self.rows.append(row)
        runs.write_metrics(self.run_dir / "metrics.csv", self.rows)
        self.manager.save(self.step)
        if not sys.stdout.isatty():
            print(
                f"epoch {row['epoch']}  step {self.step}/{self.recipe.train_steps}  "
                f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.4f}  "
                f"test loss {row['test_loss']:.4f}  "
                f"test accuracy {row['test_accuracy']:.4f}  {row['seconds']:.1f} s",
                flush=True,
            )
