"""The effect of rounding on reconstructed activations and on gradients.

    python -m benchmarks.numerics                         # by depth and precision
    python -m benchmarks.numerics --training --minutes 30 --data-dir DIR
    python -m benchmarks.numerics --plot                  # the plots, from CSV files

By depth: the network is a chain of blocks with its initial weights, two streams of 4
channels, images of 8x8, and batches of 16. The files are numerics.csv and numerics.png.
Eager mode saves the tracing of graphs with hundreds of blocks. `--mode graph` and
`--mode xla` measure such graphs.

Training: the paper's figure, with the recipe of RevNet-164 on CIFAR-10. Two trainings
alternate, with reconstructed and with stored activations, from the same weights and
images. A third one shows the effect of rounding alone. The files are
numerics_training.csv and numerics_training.png.

The same command continues after an interruption. It skips cells of the table that have
a row, and resumes a training from its last checkpoint.
"""

import argparse
import math
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from benchmarks.provenance import FOLDER, IMAGES, provenance
from revnet_tf import RevBlock, RevSequence
from revnet_tf._files import replacing
from revnet_tf.numerics import ReversibilityMonitor
from training import data, fit, outputs
from training.recipes import RECIPES

DEPTHS = 10, 30, 100, 300, 1000

# For each way: policy of all layers, fraction bits, blocks between two anchors.
WAYS = {
    "float32": ("float32", None, None),
    "float32, fraction_bits=14": ("float32", 14, None),
    "mixed_bfloat16": ("mixed_bfloat16", None, None),
    "mixed_float16": ("mixed_float16", None, None),
    "bfloat16 streams": ("bfloat16", None, None),
    "bfloat16 streams, an anchor every 5 blocks": ("bfloat16", None, 5),
}

# The networks of the training. The last one shows the effect of float32 alone. Its
# first weights differ from those of the others by one unit in the last place.
CURVES = {
    "rebuilt": "reconstructed activations",
    "stored": "stored activations",
    "perturbed": "stored, first weights one unit in the last place off",
}

CHECKPOINT_STEPS = 10


def branch():
    return keras.Sequential(
        [
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False),
        ]
    )


def chain(num_blocks, mode, policy, fraction_bits, anchor_every):
    """Returns a compiled chain of blocks with a classifier."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    blocks = [
        RevBlock(
            branch(),
            branch(),
            fraction_bits=fraction_bits,
            anchor=anchor_every is not None and i % anchor_every == 0,
        )
        for i in range(num_blocks)
    ]
    x = keras.Input((8, 8, 8))
    pooled = keras.layers.GlobalAveragePooling2D()(RevSequence(blocks)(x))
    model = keras.Model(x, keras.layers.Dense(10)(pooled))
    optimizer = keras.optimizers.SGD(0.1)
    if policy == "mixed_float16":
        # Gradients overflow with Keras's initial scale, until training halves it.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0**7)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer,
        loss,
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    return model


def watched(model, x, y, every_steps=1):
    """Returns a monitor after its first measurement. It never warns."""
    monitor = ReversibilityMonitor(
        x, y, every_steps, max_error=math.inf, max_angle=math.inf
    )
    monitor.set_model(model)
    monitor.on_train_begin()
    return monitor


def by_depth(depths, mode):
    path = FOLDER / "numerics.csv"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 8, 8, 8), dtype="float32")
    y = rng.integers(10, size=16)
    for depth in depths:
        for way, options in WAYS.items():
            rows = outputs.read_table(path)
            cell = {"mode": mode, "way": way, "num_blocks": str(depth)}
            if any(cell.items() <= row.items() for row in rows):
                continue
            (found,) = watched(chain(depth, mode, *options), x, y).rows
            row = cell | {
                "reconstruction_error": f"{found['reconstruction_error']:.3g}",
                "gradient_angle": f"{found['gradient_angle']:.3g}",
            }
            outputs.write_table(path, [*rows, provenance() | row])
            print(*row.values(), flush=True)
            keras.backend.clear_session()


def training(recipe, images, run_dir, every_steps, steps, minutes):
    """Trains the networks in turns, one step each, and writes their losses."""
    path, start = FOLDER / "numerics_training.csv", time.monotonic()
    networks = {}
    for name in CURVES:
        keras.utils.set_random_seed(recipe.seed)
        network = fit.build(recipe.replace(recompute=name == "rebuilt"), images)
        fit.compile_network(network, recipe)
        networks[name] = network
    stem = networks["perturbed"].trainable_variables[0]
    stem.assign(np.nextafter(stem.numpy(), np.float32(np.inf)))
    variables = [
        [*network.variables, *network.optimizer.variables]
        for network in networks.values()
    ]
    checkpoint = tf.train.Checkpoint(variables=variables)
    manager = tf.train.CheckpointManager(checkpoint, run_dir, max_to_keep=2)
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
    first = int(networks["rebuilt"].optimizer.iterations.numpy())
    rows = [row for row in outputs.read_table(path) if int(row["step"]) <= first]
    common = provenance()
    x, y, _ = next(iter(images.test_batches(16)))
    monitor = watched(networks["rebuilt"], x, y, every_steps)
    batches = iter(images.training_batches(recipe, first))
    for step in range(first + 1, steps + 1):
        x, y = next(batches)
        row = {"step": step}
        for name, network in networks.items():
            network.reset_metrics()
            logs = network.train_on_batch(x, y, return_dict=True)
            row[f"{name}_loss"] = float(logs["cross_entropy"])
        monitor.on_train_batch_end(step)
        last = monitor.rows[-1]
        for name in ("reconstruction_error", "gradient_angle"):
            row[name] = last[name] if last["step"] == step else ""
        rows.append(common | row)
        print(*row.values(), flush=True)
        done = step == steps or time.monotonic() - start > 60 * minutes
        if done or step % CHECKPOINT_STEPS == 0:
            outputs.write_table(path, rows)
            manager.save(step)
        if done:
            return


def plot():
    from matplotlib.figure import Figure

    rows = outputs.read_table(FOLDER / "numerics.csv")
    rows = [row for row in rows if row["mode"] == "eager"]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    quantities = {
        "reconstruction_error": "relative reconstruction error",
        "gradient_angle": "gradient angle, degrees",
    }
    for ax, (name, label) in zip(
        figure.subplots(1, 2), quantities.items(), strict=True
    ):
        for way in WAYS:
            points = sorted(
                (int(r["num_blocks"]), float(r[name])) for r in rows if r["way"] == way
            )
            ax.plot(*zip(*points, strict=True) if points else ([], []), "o-", label=way)
        ax.set(xlabel="blocks", ylabel=label, xscale="log")
        # The axis is logarithmic down to the smallest decade, and linear below it.
        values = [float(r[name]) for r in rows if float(r[name]) > 0]
        decade = 10 ** math.floor(math.log10(min(values)))
        ax.set_yscale("symlog", linthresh=decade, linscale=0.5)
        ax.set_ylim(-decade / 4, 3 * max(values))
        depths = sorted({int(r["num_blocks"]) for r in rows})
        ax.set_xticks(depths, depths)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, "numerics.png")

    rows = outputs.read_table(FOLDER / "numerics_training.csv")
    if not rows:
        return
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    angle, loss = figure.subplots(1, 2)
    measured = [row for row in rows if row["gradient_angle"]]
    angle.plot(
        [int(row["step"]) for row in measured],
        [float(row["gradient_angle"]) for row in measured],
        ".-",
    )
    steps = [int(row["step"]) for row in rows]
    for name, label in CURVES.items():
        loss.plot(steps, [float(row[f"{name}_loss"]) for row in rows], label=label)
    angle.set(xlabel="step", ylabel=quantities["gradient_angle"], yscale="log")
    loss.set(xlabel="step", ylabel="training cross-entropy")
    figure.legend(loc="outside lower center", ncols=3)
    for ax in (angle, loss):
        ax.grid(alpha=0.3)
    save(figure, "numerics_training.png")


def save(figure, name):
    with replacing(IMAGES / name) as part:
        figure.savefig(part, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--mode", choices=("eager", "graph", "xla"), default="eager")
    parser.add_argument("--training", action="store_true", help="the paper's figure")
    parser.add_argument("--steps", type=int, default=80_000, help="steps to train")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument(
        "--every", type=int, default=10, metavar="N", help="steps between measurements"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "numerics"))
    parser.add_argument("--data-dir", type=Path, help="folder of TFDS data sets")
    parser.add_argument("--plot", action="store_true", help="only draw the plots")
    args = parser.parse_args()
    if args.training:
        recipe = RECIPES["cifar10_revnet164"]
        images = data.load(recipe, args.data_dir)
        training(recipe, images, args.run_dir, args.every, args.steps, args.minutes)
    elif not args.plot:
        by_depth(args.depths, args.mode)
    plot()


if __name__ == "__main__":
    main()
