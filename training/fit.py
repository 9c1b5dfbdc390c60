"""The training of a recipe: network, optimizer, and the loop with its checkpoints."""

import contextlib
import dataclasses
import math
import re
import signal
import sys
import time
from pathlib import Path

import keras
import tensorflow as tf

from revnet_tf import RevBlock, memory, numerics
from training import outputs, runs
from training.checkpoints import Checkpoints
from training.cluster import watched
from training.strategy import (
    averaging,
    cluster_in,
    is_chief,
    is_multiworker,
    on_any_worker,
    trainable,
)

# The columns of the table, and the types of their values.
REVERSIBILITY = {
    "step": int,
    "reconstruction_error": float,
    "block": str,
    "gradient_angle": float,
}
# Number of steps after which the workers tell each other whether they got SIGTERM.
WORKERS_ASK_EVERY = 10


class Preempted(Exception):
    """SIGTERM ended the run, whose state is saved."""


def columns(scores):
    """Returns the columns of `metrics.csv`, and the types of their values.

    Args:
        scores: iterable of strings, the names of the scores of a task.
    """
    return {
        "epoch": int,
        "step": int,
        "learning_rate": float,
        **{f"{split}_{name}": float for split in ("train", "test") for name in scores},
        "seconds": float,
        "images_per_second": float,
        "peak_memory_mib": int,
    }


def learning_rate(recipe):
    """Returns the learning rate of a recipe: a number, or a schedule of the step."""
    return recipe.schedule.build(recipe.train_steps)


def build(recipe, images):
    """Returns the network: normalized images to logits."""
    before = keras.config.dtype_policy()
    if recipe.precision != "float32":
        keras.config.set_dtype_policy(recipe.precision)
    try:
        return recipe.network.build(recipe.task, images, recipe.optimizer)
    finally:
        keras.config.set_dtype_policy(before)


def compile_network(network, recipe):
    """Compiles the network, and returns its metrics."""
    optimizer = recipe.optimizer.build(learning_rate(recipe))
    if recipe.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    metrics = recipe.task.metrics(network.output_shape[-1])
    jit = recipe.jit
    if jit is None:
        # As Keras does for a model that was made in the scope of a strategy.
        alone = tf.distribute.get_strategy().num_replicas_in_sync == 1
        jit = "auto" if alone else False
    network.compile(
        optimizer=optimizer,
        loss=recipe.task.loss(),
        weighted_metrics=metrics,
        jit_compile=jit,
    )
    # A checkpoint can be read only into variables that exist.
    optimizer.build(network.trainable_variables)
    return metrics


def plan_memory(network, recipe, images, strategy, budget_bytes=None):
    """Estimates the memory of a training step on each replica.

    With a budget, the function also chooses the blocks of `network` that recompute
    their activations, and finds the largest batch for this choice.

    Args:
        network: `keras.Model`, made in the scope of `strategy`.
        recipe, images, strategy: as for `fit`.
        budget_bytes: int, the memory that a step may need, or `None`.

    Returns:
        A `revnet_tf.memory.Memory`, and an int, the largest batch on a replica that
        the budget allows, `None` without a budget.

    Raises:
        ValueError: the budget is too small, or the network is not reversible.
    """
    twin, batch_size = _on_one_replica(recipe, images, strategy)
    largest = None
    if budget_bytes is not None:
        memory.plan(twin, batch_size, budget_bytes)
        pair = map(memory.recomputing_layers, (network, twin))
        for layer, planned in zip(*pair, strict=True):
            layer.recompute = planned.recompute
        largest = memory.max_batch_size(twin, budget_bytes)
    return memory.estimate(twin, batch_size), largest


def reconstructs(network):
    """Returns whether a block of `network` reconstructs its activations."""
    return any(
        isinstance(block, RevBlock) and recompute
        for layer in memory.recomputing_layers(network)
        for block, recompute in layer.blocks_in_order()
    )


def activation_bytes(recipe, images, strategy):
    """Estimates the activation memory of a training step on each replica.

    Args:
        recipe, images, strategy: as for `fit`. The network is reversible.

    Returns:
        A dictionary of the bytes, if all activations are `"reconstructed"` and if all
        are `"stored"`.
    """
    twin, batch_size = _on_one_replica(recipe, images, strategy)
    found = {}
    for way in ("reconstructed", "stored"):
        for layer in memory.recomputing_layers(twin):
            layer.recompute = way == "reconstructed"
        found[way] = memory.estimate(twin, batch_size).activation_bytes
    return found


def _on_one_replica(recipe, images, strategy):
    """Returns a compiled network and the batch size of one replica.

    `memory` traces a step of one device, so the network is outside of the strategy.
    """
    network = build(recipe, images)
    compile_network(network, recipe)
    return network, recipe.global_batch_size // strategy.num_replicas_in_sync


def num_parameters(network):
    """Returns the number of trainable parameters, as papers count."""
    return sum(math.prod(weight.shape) for weight in network.trainable_weights)


def fit(network, recipe, images, run_dir, strategy, save_every=None, callbacks=()):
    """Trains `network`, from the last checkpoint in `run_dir` if there is a checkpoint.

    Args:
        network: `keras.Model`, made in the scope of `strategy`.
        recipe: a `Recipe`.
        images: the `Images` of the recipe.
        run_dir: path of the run folder.
        strategy: a `tf.distribute.Strategy`.
        save_every: int, the number of steps between checkpoints. Each epoch ends with
            a checkpoint, too.
        callbacks: list of further Keras callbacks.

    Returns:
        The rows of `metrics.csv`.

    Raises:
        Preempted: after SIGTERM.
        FloatingPointError: the loss is not finite.
    """
    model = trainable(network, strategy)
    with strategy.scope():
        metrics = compile_network(model, recipe)
        checkpoints = Checkpoints(
            run_dir / "checkpoints",
            is_chief(strategy),
            # TensorFlow does not find the seed generators of Keras in a model.
            network=model.variables,
            optimizer=model.optimizer.variables,
            sums=[variable for metric in metrics for variable in metric.variables],
        )
        progress, continue_epoch = resume(checkpoints, metrics, recipe, images, run_dir)
        scores = recipe.task.scores(images.class_names)
        saving = Saving(
            progress, checkpoints, recipe, scores, run_dir, strategy, save_every
        )
        test = strategy.distribute_datasets_from_function(
            lambda context: images.test_batches(
                recipe.global_batch_size, context=context
            )
        )
        with saving.on_sigterm(), watched(cluster_in(strategy)) as note:
            watching = keras.callbacks.LambdaCallback(
                on_train_batch_end=note, on_test_batch_end=note
            )
            while progress.step < recipe.train_steps:
                # First the rest of an epoch that has begun, then whole epochs.
                epoch, begun = divmod(progress.step, progress.steps_per_epoch)
                whole = math.ceil(recipe.train_steps / progress.steps_per_epoch)
                resumed = [continue_epoch] if begun else []
                model.fit(
                    strategy.distribute_datasets_from_function(
                        lambda context: images.training_batches(
                            recipe, progress.step, context
                        )
                    ),
                    validation_data=test,
                    validation_steps=images.test_steps(recipe.global_batch_size),
                    initial_epoch=epoch,
                    epochs=epoch + 1 if begun else whole,
                    steps_per_epoch=progress.steps_per_epoch - begun,
                    shuffle=False,  # The batches are shuffled.
                    callbacks=[*resumed, saving, watching, *callbacks],
                    verbose=1 if sys.stdout.isatty() and is_chief(strategy) else 0,
                )
    return progress.rows


@dataclasses.dataclass
class Progress:
    """The part of a run that is done.

    Attributes:
        train_steps: int, the number of steps of the whole run.
        steps_per_epoch: int, the number of steps of an epoch. The last may have fewer.
        step: int, the number of steps that are done.
        rows: list of dictionaries, the rows of `metrics.csv`.
        run: string, the identifier of the run, or `None`.
    """

    train_steps: int
    steps_per_epoch: int
    step: int
    rows: list
    run: str | None

    @property
    def epoch_is_whole(self):
        """Whether the last step ended an epoch."""
        return self.step == self.train_steps or self.step % self.steps_per_epoch == 0


def resume(checkpoints, metrics, recipe, images, run_dir):
    """Restores the last checkpoint of a run, if there is a checkpoint.

    Args:
        checkpoints: the `Checkpoints` of the run.
        metrics: list of the metrics, whose sums are in the checkpoints.
        recipe, images, run_dir: as for `fit`.

    Returns:
        The `Progress` of the run, and the callback with which an epoch that has begun
        continues its metrics.
    """
    step, record = checkpoints.restore()
    rows, run = record.get("rows", []), None
    if checkpoints.is_chief:
        run = runs.identifier(run_dir)
        outputs.remove_parts(run_dir)
        if step:
            print(f"Going on from step {step} of {recipe.train_steps}", flush=True)
        table = run_dir / "metrics.csv"
        scores = recipe.task.scores(images.class_names)
        found = outputs.read_own_table(table, columns(scores))
        if "rows" not in record:
            # A checkpoint of an older version. The table may be ahead of it.
            rows = [row for row in found if row["step"] <= step]
        if rows:
            outputs.write_table(table, rows)
    steps_per_epoch = images.steps_per_epoch(recipe.global_batch_size)
    sums = [(v, v.numpy()) for metric in metrics for v in metric.variables]
    for metric in metrics:
        # Keras resets a metric at the start of an epoch, but not before its first use.
        metric.reset_state()

    def continue_sums(*_):
        for variable, value in sums:
            variable.assign(value)

    return (
        Progress(recipe.train_steps, steps_per_epoch, step, rows, run),
        keras.callbacks.LambdaCallback(on_epoch_begin=continue_sums),
    )


class Saving(keras.callbacks.Callback):
    """Saves checkpoints and `metrics.csv`, and ends the run at its last step.

    Args:
        progress: a `Progress`, which the callback advances.
        checkpoints: the `Checkpoints` of the run.
        scores: dictionary, the scores of the task, as `Task.scores` returns them.
        recipe, run_dir, strategy, save_every: as for `fit`.
    """

    def __init__(
        self, progress, checkpoints, recipe, scores, run_dir, strategy, save_every
    ):
        super().__init__()
        self.progress = progress
        self.checkpoints = checkpoints
        self.scores = scores
        self.score = recipe.task.score
        self.batch_size = recipe.global_batch_size
        self.rate = learning_rate(recipe)
        self.run_dir = run_dir
        self.strategy = strategy
        self.save_every = save_every
        self.sigterm = False

    @contextlib.contextmanager
    def on_sigterm(self):
        """Has SIGTERM end the run after the current step, or the test of the epoch."""

        def note(*_):
            self.sigterm = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_train_begin(self, logs=None):
        self.average_statistics = averaging(self.model, self.strategy)

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()
        self.first_step = self.progress.step

    def on_train_batch_end(self, batch, logs=None):
        progress = self.progress
        progress.step += 1
        if progress.step == progress.train_steps:
            self.model.stop_training = True
        if not progress.epoch_is_whole:
            # Workers wait for each other when they ask.
            alone = not is_multiworker(self.strategy)
            asks = alone or progress.step % WORKERS_ASK_EVERY == 0
            ends = asks and on_any_worker(self.strategy, self.sigterm)
            if ends or (self.save_every and progress.step % self.save_every == 0):
                self.save()
            if ends:
                raise Preempted(f"ended by SIGTERM after step {progress.step}")

    def save(self):
        self.average_statistics()
        progress = self.progress
        record = {"run": progress.run, "step": progress.step, "rows": progress.rows}
        self.checkpoints.save(progress.step, record)

    def on_test_begin(self, logs=None):
        self.seconds = time.perf_counter() - self.began
        self.average_statistics()

    def on_epoch_end(self, epoch, logs=None):
        progress = self.progress
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The loss is {logs['loss']} after step {progress.step}; "
                "lower learning_rate."
            )
        trained = (progress.step - self.first_step) * self.batch_size
        logs["images_per_second"] = trained / self.seconds
        progress.rows.append(self.row(epoch, logs))
        if self.checkpoints.is_chief:
            outputs.write_table(self.run_dir / "metrics.csv", progress.rows)
        self.save()
        if self.checkpoints.is_chief and not sys.stdout.isatty():
            print(describe(progress, self.score), flush=True)
        if on_any_worker(self.strategy, self.sigterm):
            raise Preempted(f"ended by SIGTERM after step {progress.step}")

    def row(self, epoch, logs):
        """Returns the row of `metrics.csv` of an epoch."""
        iterations = int(self.model.optimizer.iterations.numpy())
        rate = self.rate(iterations - 1) if callable(self.rate) else self.rate
        return {
            "epoch": epoch + 1,
            "step": self.progress.step,
            "learning_rate": float(f"{float(rate):.6g}"),  # 0.1, not its float32
            **{f"train_{name}": logs[key] for name, key in self.scores.items()},
            **{f"test_{name}": logs[f"val_{key}"] for name, key in self.scores.items()},
            "seconds": round(self.seconds, 3),
            "images_per_second": round(logs["images_per_second"], 1),
            "peak_memory_mib": round(peak_memory() / 2**20),
        }


def describe(progress, score):
    """Returns the line that reports the last epoch, with its loss and a score."""
    row = progress.rows[-1]
    return (
        f"epoch {row['epoch']}  step {progress.step}/{progress.train_steps}  "
        f"loss {row['train_loss']:.4f}  {score} {row[f'train_{score}']:.4f}  "
        f"test loss {row['test_loss']:.4f}  test {score} {row[f'test_{score}']:.4f}  "
        f"{row['seconds']:.1f} s  {row['images_per_second']:.1f} images/s"
    )


class Monitor(numerics.ReversibilityMonitor):
    """Measures the reconstruction of 16 test images, or of a smaller batch.

    Its measurements go to `reversibility.csv` and `reversibility.png`.
    """

    def __init__(self, images, batch_size, run_dir, every_steps):
        x, y, *_ = next(iter(images.test_batches(min(16, batch_size))))
        super().__init__(x, y, every_steps, plot=run_dir / "reversibility.png")
        self.path = run_dir / "reversibility.csv"

    def on_train_begin(self, logs=None):
        # A resumed run repeats the measurements after its checkpoint.
        step = int(self.model.optimizer.iterations.numpy())
        rows = outputs.read_own_table(self.path, REVERSIBILITY)
        self.rows = [row for row in rows if row["step"] < step]
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        outputs.write_table(self.path, self.rows)


def peak_memory():
    """Returns the peak memory so far in bytes, of the first GPU or of this process."""
    if tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    # A file of Linux. `ru_maxrss` can be the peak of the parent process.
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else math.nan
