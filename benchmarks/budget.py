"""The time of a training step within a budget of memory.

    python -m benchmarks.budget          # budget.csv and budget.png; 15 minutes
    python -m benchmarks.budget --plot   # budget.png again, from budget.csv

`revnet_tf.memory.plan` plans RevNet-38 with batches of 100, in graph mode, for ten
budgets. The smallest one suffices if all blocks recompute, the largest one suffices for
ordinary backpropagation. A fresh process measures the peak of each plan. The steps of
all plans alternate in one process. The figures are the ratios of the medians to
ordinary backpropagation. One more row has the network with each block under
`keras.remat`.
"""

import argparse
import csv
import json
import math
import statistics
import time

from benchmarks import processes
from benchmarks.provenance import FOLDER, IMAGES, provenance

BATCH_SIZE, NUM_BUDGETS, ROUNDS = 100, 10, 11


def build(way=0):
    """Returns a compiled RevNet-38 whose last `way` blocks store activations.

    With `way="remat"` plain blocks under `keras.remat` replace the reversible ones.
    """
    import keras

    from benchmarks import networks
    from revnet_tf import models

    model = models.RevNet38(classifier_activation=None)
    if way == "remat":
        model = networks.with_remat(model)
    else:
        layers = blocks_of(model)
        for i, layer in enumerate(layers):
            layer.recompute = i < len(layers) - way
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=False)
    return model


def blocks_of(model):
    return [
        block
        for layer in model.layers
        if hasattr(layer, "recompute")
        for block in getattr(layer, "blocks", [layer])
    ]


def measure_this_process(budget):
    from revnet_tf import memory

    if budget == "remat":
        model, stored = build("remat"), "remat"
    else:
        model = memory.plan(build(), BATCH_SIZE, int(budget))
        stored = sum(not block.recompute for block in blocks_of(model))
    print(json.dumps([stored, memory.measure(model, BATCH_SIZE).peak_bytes]))


def step_seconds(ways):
    """Returns a dict from each way to the seconds of its rounds."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH_SIZE, 32, 32, 3), dtype="float32")
    y = np.zeros(BATCH_SIZE, "int32")
    networks = {way: build(way) for way in ways}
    seconds = {way: [] for way in ways}
    for network in networks.values():  # The first step traces the network.
        network.train_on_batch(x, y)
    for _ in range(ROUNDS):
        for way, network in networks.items():
            start = time.perf_counter()
            network.train_on_batch(x, y)
            seconds[way].append(time.perf_counter() - start)
    return seconds


def sweep():
    from revnet_tf import memory

    all_blocks = len(blocks_of(build()))
    low, high = (
        math.ceil(memory.PLAN_MARGIN * memory.estimate(model, BATCH_SIZE).peak_bytes)
        for model in (build(), build(all_blocks))
    )
    budgets = [low + (high - low) * i // (NUM_BUDGETS - 1) for i in range(NUM_BUDGETS)]
    budgets.append("remat")
    # For each budget the number of storing blocks, and the measured peak.
    plans = [processes.run("budget", budget) for budget in budgets]
    ways = dict.fromkeys([all_blocks, *(stored for stored, _ in plans)])
    seconds = step_seconds(ways)
    medians = {way: statistics.median(s) for way, s in seconds.items()}
    common = provenance()
    with open(FOLDER / "budget.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = ["budget_bytes", "measured_peak_bytes", "stored_blocks"]
        writer.writerow([*common, *columns, "blocks", "step_seconds", "ratio"])
        for budget, (way, peak) in zip(budgets, plans, strict=True):
            row = [budget, peak, way, all_blocks, f"{medians[way]:.4g}"]
            row.append(f"{medians[way] / medians[all_blocks]:.4g}")
            writer.writerow([*common.values(), *row])
            print(*row)


def plot():
    from matplotlib.figure import Figure

    with open(FOLDER / "budget.csv", newline="") as file:
        *rows, remat = csv.DictReader(file)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    peaks = [int(row["measured_peak_bytes"]) / 1e6 for row in rows]
    ratios = [float(row["ratio"]) for row in rows]
    budgets = [int(row["budget_bytes"]) / 1e6 for row in rows]
    ax.step(budgets, ratios, where="post", color="0.7", label="budget")
    ax.plot(peaks, ratios, "o", label="measured peak")
    at = int(remat["measured_peak_bytes"]) / 1e6, float(remat["ratio"])
    ax.plot(*at, "C3^", label="keras.remat, measured peak")
    labels = {
        row["stored_blocks"]: at for row, *at in zip(rows, peaks, ratios, strict=True)
    }
    for i, (stored, at) in enumerate(labels.items()):
        offset = (6, -11 if i % 2 else 4)  # Neighbours do not overlap.
        text = f"{stored} stored"
        ax.annotate(text, at, offset, textcoords="offset points", fontsize="small")
    ax.set(
        xlabel="memory of a training step, MB",
        ylabel="time of a step,\nordinary backpropagation = 1",
        title=f"RevNet-38, batch {BATCH_SIZE}: {rows[0]['blocks']} blocks",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(IMAGES / "budget.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    parser.add_argument("--one", metavar="BUDGET_BYTES_OR_REMAT")
    args = parser.parse_args()
    if args.one:
        return measure_this_process(args.one)
    if not args.plot:
        sweep()
    plot()


if __name__ == "__main__":
    main()
