"""The time of a training step within a budget of memory.

    python -m benchmarks.budget                            # RevNet-38; 15 minutes
    python -m benchmarks.budget --network EfficientNetV2B0 # the other one; 15 minutes
    python -m benchmarks.budget --plot                     # plots again, from the files

`revnet_tf.memory.plan` plans a network in graph mode for ten budgets. The smallest one
suffices if all blocks recompute, the largest one suffices for ordinary backpropagation.
A fresh process measures the peak of each plan. The steps of all plans alternate in one
process. The figures are the ratios of the medians to ordinary backpropagation. One more
row has the network with each block or segment under `keras.remat`.

RevNet-38 has batches of 100 images of 32 x 32 pixels, and reversible blocks. Its files
are `budget.csv` and `budget.png`. EfficientNetV2B0 has batches of 8 images of
160 x 160 pixels, and segments of `revnet_tf.recompute`. Its files are
`budget_segments.*`.
"""

import argparse
import csv
import json
import math
import statistics
import time
from unittest import mock

from benchmarks import applications, processes
from benchmarks.provenance import FOLDER, IMAGES, provenance

NETWORKS = {"RevNet38": "budget", "EfficientNetV2B0": "budget_segments"}
BATCH_SIZES = {"RevNet38": 100, "EfficientNetV2B0": applications.BATCH_SIZE}
NUM_BUDGETS, ROUNDS = 10, 11


def build(network, way=""):
    """Returns a compiled network.

    Args:
        network: key of `NETWORKS`.
        way: str, a digit for each block: whether it recomputes. With `"remat"`, plain
            blocks under `keras.remat`.
    """
    import keras

    from benchmarks import networks
    from revnet_tf import models

    if network == "EfficientNetV2B0":
        model = applications.build(network, "remat" if way == "remat" else "recompute")
    else:
        model = models.RevNet38(classifier_activation=None)
        if way == "remat":
            model = networks.with_remat(model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=False)
    if way != "remat":
        for block, flag in zip(blocks_of(model), way, strict=bool(way)):
            block.recompute = flag == "1"
    return model


def blocks_of(model):
    from revnet_tf import memory

    found = memory.recomputing_layers(model)
    # The blocks of a sequence are among them.
    return [layer for layer in found if not hasattr(layer, "blocks")]


def way_of(model):
    return "".join(str(int(block.recompute)) for block in blocks_of(model))


def measure_this_process(network, way):
    from revnet_tf import memory

    found = memory.measure(build(network, way), BATCH_SIZES[network])
    print(json.dumps(found.peak_bytes))


def step_seconds(network, ways):
    """Returns a dict from each way to the seconds of its rounds."""
    import numpy as np

    models = {way: build(network, way) for way in ways}
    rng = np.random.default_rng(0)
    shape = BATCH_SIZES[network], *next(iter(models.values())).input_shape[1:]
    x, y = rng.random(shape, dtype="float32"), np.zeros(shape[0], "int32")
    seconds = {way: [] for way in ways}
    for model in models.values():  # The first step traces the network.
        model.train_on_batch(x, y)
    for _ in range(ROUNDS):
        for way, model in models.items():
            start = time.perf_counter()
            model.train_on_batch(x, y)
            seconds[way].append(time.perf_counter() - start)
    return seconds


def plans(network):
    """Returns the budgets, and the way that each plan chooses."""
    from revnet_tf import memory

    batch_size, known, estimate = BATCH_SIZES[network], {}, memory.estimate

    def estimated(model, batch_size):
        # The plans for ten budgets ask for the same estimates.
        way = way_of(model)
        if way not in known:
            known[way] = estimate(model, batch_size)
        return known[way]

    model = build(network)
    all_recompute, all_store = ("1" * len(way_of(model)), "0" * len(way_of(model)))
    with mock.patch.object(memory, "estimate", estimated):
        low, high = (
            math.ceil(memory.PLAN_MARGIN * estimated(found, batch_size).peak_bytes)
            for found in (build(network, all_recompute), build(network, all_store))
        )
        steps = range(NUM_BUDGETS)
        budgets = [low + (high - low) * i // (NUM_BUDGETS - 1) for i in steps]
        ways = [way_of(memory.plan(model, batch_size, b)) for b in budgets]
    return budgets, ways, all_store


def sweep(network):
    budgets, ways, ordinary = plans(network)
    budgets, ways = [*budgets, "remat"], [*ways, "remat"]
    different = dict.fromkeys([ordinary, *ways])
    peaks = {way: processes.run("budget", network, way) for way in different}
    seconds = step_seconds(network, different)
    medians = {way: statistics.median(s) for way, s in seconds.items()}
    common = provenance()
    with open(FOLDER / f"{NETWORKS[network]}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = ["budget_bytes", "measured_peak_bytes", "stored_blocks"]
        writer.writerow([*common, *columns, "blocks", "step_seconds", "ratio"])
        for budget, way in zip(budgets, ways, strict=True):
            stored = way if way == "remat" else way.count("0")
            row = [budget, peaks[way], stored, len(ordinary), f"{medians[way]:.4g}"]
            row.append(f"{medians[way] / medians[ordinary]:.4g}")
            writer.writerow([*common.values(), *row])
            print(*row)


def plot(network):
    from matplotlib.figure import Figure

    with open(FOLDER / f"{NETWORKS[network]}.csv", newline="") as file:
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
        title=f"{network}, batch {BATCH_SIZES[network]}: {rows[0]['blocks']} blocks",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(IMAGES / f"{NETWORKS[network]}.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    parser.add_argument("--network", choices=NETWORKS, default="RevNet38")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"))
    args = parser.parse_args()
    if args.one:
        return measure_this_process(*args.one)
    if not args.plot:
        sweep(args.network)
    for network, name in NETWORKS.items():
        if (FOLDER / f"{name}.csv").exists():
            plot(network)


if __name__ == "__main__":
    main()
