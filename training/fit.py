"""A recipe, fitted: the network, its optimizer, the loop with its checkpoints."""

import contextlib
import math
import re
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from revnet_tf import memory, models, numerics
from training import outputs
from training.checkpoints import Checkpoints
from training.strategy import (
    averaging,
    is_chief,
    is_multiworker,
    on_any_worker,
    trainable,
)

# Steps between two questions to the other workers whether the run shall end.
WORKERS_ASK_EVERY = 10


class Preempted(Exception):
    """The run was asked to end by SIGTERM, and its state is saved."""


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
    """Returns the network: normalized images to logits."""
    options = {}
    if recipe.reversible:
        options = {
            "recompute": recipe.recompute,
            "fraction_bits": recipe.fraction_bits,
        }
    before = keras.config.dtype_policy()
    if recipe.precision != "float32":
        keras.config.set_dtype_policy(recipe.precision)
    try:
        return (models.RevNet if recipe.reversible else models.ResNet)(
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
    finally:
        keras.config.set_dtype_policy(before)


def compile_network(network, recipe):
    """Compiles the network, and returns its metrics."""
    optimizer = keras.optimizers.SGD(learning_rate(recipe), recipe.momentum)
    if recipe.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    metrics = [
        keras.metrics.SparseCategoricalAccuracy("accuracy"),
        # What Keras reports as `loss` has the regularization in it.
        keras.metrics.SparseCategoricalCrossentropy("cross_entropy", from_logits=True),
    ]
    jit = recipe.jit
    if jit is None:
        # What Keras does with a model that was made in the scope of a strategy.
        alone = tf.distribute.get_strategy().num_replicas_in_sync == 1
        jit = "auto" if alone else False
    network.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=metrics,
        jit_compile=jit,
    )
    # Before any checkpoint is read: there has to be something to read it into.
    optimizer.build(network.trainable_variables)
    return metrics


def plan_memory(network, recipe, images, strategy, budget_bytes=None):
    """Returns what a training step keeps on each replica, by estimate.

    With a budget, what `network` recomputes is chosen by it. (A twin that is no part of
    the strategy is estimated.)

    Raises:
        ValueError: the budget is too small, or the network is not reversible.
    """
    twin = build(recipe, images)
    compile_network(twin, recipe)
    batch_size = recipe.global_batch_size // strategy.num_replicas_in_sync
    if budget_bytes is not None:
        memory.plan(twin, batch_size, budget_bytes)
        for layer, planned in zip(_blocks(network), _blocks(twin), strict=True):
            layer.recompute = planned.recompute
    return memory.estimate(twin, batch_size)


def _blocks(network):
    return [
        block
        for layer in network.layers
        if hasattr(layer, "recompute")
        for block in (layer, *getattr(layer, "blocks", []))
    ]


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


def fit(network, recipe, images, run_dir, strategy, save_every=None, callbacks=()):
    """Trains `network`, from the last checkpoint in `run_dir` if there is one.

    Args:
        network: built in the scope of `strategy`.
        recipe: a `Recipe`.
        images: its `Images`.
        run_dir: path of the run folder.
        strategy: a `tf.distribute.Strategy`.
        save_every: number of steps between checkpoints, besides that of each epoch.
        callbacks: further Keras callbacks.

    Returns:
        The rows of `metrics.csv`.

    Raises:
        Preempted: after SIGTERM.
        FloatingPointError: the loss is not a number any more.
    """
    steps_per_epoch = images.steps_per_epoch(recipe.global_batch_size)
    model = trainable(network, strategy)
    with strategy.scope():
        metrics = compile_network(model, recipe)
        folder = _RunFolder(
            model, metrics, recipe, images, run_dir, strategy, save_every
        )
        test = strategy.distribute_datasets_from_function(
            lambda context: images.test_batches(
                recipe.global_batch_size, context=context
            )
        )
        with folder.saved_on_sigterm():
            while folder.step < recipe.train_steps:
                # First what is left of an epoch that was begun, then whole epochs.
                epoch, begun = divmod(folder.step, steps_per_epoch)
                whole = math.ceil(recipe.train_steps / steps_per_epoch)
                model.fit(
                    strategy.distribute_datasets_from_function(
                        lambda context: images.training_batches(
                            recipe, folder.step, context
                        )
                    ),
                    validation_data=test,
                    validation_steps=images.test_steps(recipe.global_batch_size),
                    initial_epoch=epoch,
                    epochs=epoch + 1 if begun else whole,
                    steps_per_epoch=steps_per_epoch - begun,
                    shuffle=False,  # done by the batches
                    callbacks=[folder, *callbacks],
                    verbose=1 if sys.stdout.isatty() and is_chief(strategy) else 0,
                )
    return folder.rows


class _RunFolder(keras.callbacks.Callback):
    """Keeps the run folder up to date, and ends the run at its last step."""

    def __init__(self, model, metrics, recipe, images, run_dir, strategy, save_every):
        super().__init__()
        self.recipe = recipe
        self.steps_per_epoch = images.steps_per_epoch(recipe.global_batch_size)
        self.run_dir = run_dir
        self.strategy = strategy
        self.is_chief = is_chief(strategy)
        self.save_every = save_every
        self.rate = learning_rate(recipe)
        self.average_statistics = averaging(model, strategy)
        self.sigterm = False
        # An epoch that is resumed in its middle goes on with what it has summed up.
        self.sums = [variable for metric in metrics for variable in metric.variables]
        self.checkpoints = Checkpoints(
            run_dir / "checkpoints",
            self.is_chief,
            # The variables, not the model: in a model TensorFlow does not find Keras's
            # seed generators.
            network=model.variables,
            optimizer=model.optimizer.variables,
            sums=self.sums,
        )
        self.step = self.checkpoints.restore()
        self.restored_sums = None
        if self.step and self.is_chief:
            print(f"Going on from step {self.step} of {recipe.train_steps}", flush=True)
        if not self.epoch_is_whole():
            self.restored_sums = [variable.numpy() for variable in self.sums]
        # Keras does not reset those that it has not used yet.
        for metric in metrics:
            metric.reset_state()
        # Written before the checkpoint, metrics.csv may be a row ahead of it.
        epochs = self.step / self.steps_per_epoch
        epochs = math.ceil(epochs) if self.epoch_is_whole() else math.floor(epochs)
        self.rows = outputs.read_table(run_dir / "metrics.csv")[:epochs]

    def epoch_is_whole(self):
        """Returns whether no epoch is begun and not ended; the last one is shorter."""
        last = self.step == self.recipe.train_steps
        return last or self.step % self.steps_per_epoch == 0

    def is_asked(self):
        """Returns whether to look for SIGTERM, for which workers have to wait."""
        return not is_multiworker(self.strategy) or self.step % WORKERS_ASK_EVERY == 0

    @contextlib.contextmanager
    def saved_on_sigterm(self):
        """Has SIGTERM end the run after the step, or the epoch's test, that it hits."""

        def note(*_):
            self.sigterm = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()
        self.first_step = self.step
        if self.restored_sums:
            for variable, value in zip(self.sums, self.restored_sums, strict=True):
                variable.assign(value)
            self.restored_sums = None

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step == self.recipe.train_steps:
            self.model.stop_training = True
        if not self.epoch_is_whole():
            ends = self.is_asked() and on_any_worker(self.strategy, self.sigterm)
            if ends or (self.save_every and self.step % self.save_every == 0):
                self.save()
            if ends:
                raise Preempted(f"ended by SIGTERM after step {self.step}")

    def save(self):
        self.average_statistics()
        self.checkpoints.save(self.step)

    def on_test_begin(self, logs=None):
        self.seconds = time.perf_counter() - self.began
        self.average_statistics()

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The loss is {logs['loss']} after step {self.step}; "
                "lower learning_rate."
            )
        iterations = int(self.model.optimizer.iterations.numpy())
        rate = self.rate(iterations - 1) if callable(self.rate) else self.rate
        trained = (self.step - self.first_step) * self.recipe.global_batch_size
        logs["images_per_second"] = trained / self.seconds
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "learning_rate": float(f"{float(rate):.6g}"),  # 0.1, not its float32
            "train_loss": logs["cross_entropy"],
            "train_accuracy": logs["accuracy"],
            "test_loss": logs["val_cross_entropy"],
            "test_accuracy": logs["val_accuracy"],
            "seconds": round(self.seconds, 3),
            "images_per_second": round(logs["images_per_second"], 1),
            "peak_memory_mib": round(peak_memory() / 2**20),
        }
        self.rows.append(row)
        if self.is_chief:
            outputs.write_table(self.run_dir / "metrics.csv", self.rows)
        self.save()
        if self.is_chief and not sys.stdout.isatty():
            print(
                f"epoch {row['epoch']}  step {self.step}/{self.recipe.train_steps}  "
                f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.4f}  "
                f"test loss {row['test_loss']:.4f}  "
                f"test accuracy {row['test_accuracy']:.4f}  {row['seconds']:.1f} s  "
                f"{row['images_per_second']:.0f} images/s",
                flush=True,
            )
        if on_any_worker(self.strategy, self.sigterm):
            raise Preempted(f"ended by SIGTERM after step {self.step}")


class Monitor(numerics.ReversibilityMonitor):
    """Watches the reconstruction of 16 test images, for the run folder.

    Its measurements go to `reversibility.csv` and `reversibility.png`.
    """

    def __init__(self, images, run_dir, every_steps):
        x, y, _ = next(iter(images.test_batches(16)))
        super().__init__(x, y, every_steps, plot=run_dir / "reversibility.png")
        self.path = run_dir / "reversibility.csv"

    def on_train_begin(self, logs=None):
        # Those of a run that goes on: what came after its checkpoint comes again.
        step = int(self.model.optimizer.iterations.numpy())
        self.rows = []
        for row in outputs.read_table(self.path):
            if int(row["step"]) < step:
                numbers = {k: float(v) for k, v in row.items() if k != "block"}
                self.rows.append(row | numbers | {"step": int(row["step"])})
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        outputs.write_table(self.path, self.rows)


def peak_memory():
    """Returns the peak in bytes so far: of the first GPU, else of this process."""
    if tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    # Linux's. `ru_maxrss` may be that of the process which started this one.
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else math.nan
