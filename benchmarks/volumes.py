"""The largest volume that a U-Net trains on within 1 GiB, and its memory by depth.

    python -m benchmarks.volumes          # volumes.csv and volumes.png
    python -m benchmarks.volumes --plot   # volumes.png again, from volumes.csv

The network has four levels of 16, 32, 64 and 128 channels and instance normalization.
It comes in three kinds: `RevUNet`, the same with ordinary backpropagation
(`recompute=False`), and the same with plain blocks under `keras.remat`.

- Rows `largest`: the largest volume whose peak is at most 1 GiB, by `memory.measure` in
  a fresh process, with a batch of one volume in graph mode. Sizes are multiples of 8.
  The largest and the smallest size of a volume differ by 8 at most.
- Rows `depth`: the activation bytes of a volume of 64^3 voxels. Figures with XLA are
  those that the compiler assigns.
- Rows `time`: the medians of the seconds and of the CPU seconds of a step and of a
  forward pass, for a volume of 64^3 voxels. The kinds alternate in one process.

The script skips measurements that have a row in volumes.csv. All of them take some 20
minutes on two idle CPU cores.
"""

import argparse
import csv
import functools
import json
import math
import statistics
import time

from benchmarks import processes
from benchmarks.provenance import FOLDER, IMAGES

BUDGET_BYTES = 2**30
CHANNELS = 16, 32, 64, 128
DIVISOR = 2 ** (len(CHANNELS) - 1)
KINDS = "revunet", "ordinary", "remat"
SIZE, ROUNDS = 64, 7


def build(kind, num_blocks, sizes, jit_compile=False):
    """Returns a compiled U-Net with a number of blocks in each level and branch."""
    import keras

    from benchmarks import networks
    from revnet_tf import models

    model = models.RevUNet(
        CHANNELS,
        num_blocks,
        num_blocks,
        input_shape=(*sizes, 1),
        classes=2,
        norm="instance",
        recompute=kind == "revunet",
    )
    if kind == "remat":
        model = networks.with_remat(model)
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=jit_compile)
    return model


def near_cube(step):
    """Returns the sizes of a volume. Each step lengthens the shortest side by 8."""
    return tuple(DIVISOR * ((step + i) // 3) for i in range(3))


def measure_this_process(kind, num_blocks, mode, sizes):
    from revnet_tf import memory

    model = build(kind, num_blocks, sizes, mode == "xla")
    found = memory.measure(model, 1)
    print(json.dumps([found.peak_bytes, found.activation_bytes]))


def measured(kind, num_blocks, mode, sizes):
    """Returns the peak and the activation bytes of a step in a process of its own."""
    sizes = "x".join(map(str, sizes))
    return processes.run("volumes", kind, num_blocks, mode, sizes)


def largest(kind, num_blocks):
    """Returns the sizes of the largest volume within the budget, and its peak."""

    @functools.cache
    def peak(step):
        return measured(kind, num_blocks, "graph", near_cube(step))[0]

    def voxels(step):
        return math.prod(near_cube(step))

    # The peak is nearly linear in the number of voxels.
    first = 3 * SIZE // DIVISOR
    fits = first
    while voxels(fits + 1) * peak(first) / voxels(first) <= BUDGET_BYTES:
        fits += 1
    while peak(fits) > BUDGET_BYTES:
        fits -= 1
    while peak(fits + 1) <= BUDGET_BYTES:
        fits += 1
    return near_cube(fits), peak(fits)


@functools.cache
def step_seconds(num_blocks):
    """Returns the medians of a step of each kind, and of a forward pass."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal((1, *[SIZE] * 3, 1), dtype="float32")
    y = np.zeros((1, *[SIZE] * 3), "int32")
    networks = {kind: build(kind, num_blocks, [SIZE] * 3) for kind in KINDS}
    calls = {
        kind: functools.partial(model.train_on_batch, x, y)
        for kind, model in networks.items()
    }
    calls["forward"] = functools.partial(networks["ordinary"].predict_on_batch, x)
    found = {name: [] for name in calls}
    for call in calls.values():  # The first call traces the network.
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            end = time.perf_counter(), time.process_time()
            found[name].append((end[0] - start[0], end[1] - start[1]))
    return {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in found.items()
    }


def cells():
    """Yields question, kind, mode and number of blocks of each measurement."""
    for num_blocks in (2, 4):
        for kind in KINDS:
            yield "largest", kind, "graph", num_blocks
    for mode in ("graph", "xla"):
        for num_blocks in (1, 2, 4, 8):
            yield "depth", "revunet", mode, num_blocks
    yield from (("time", kind, "graph", 2) for kind in (*KINDS, "forward"))


def answer(question, kind, mode, num_blocks):
    """Returns the sizes of a volume, bytes, seconds and CPU seconds."""
    cube = (SIZE,) * 3
    if question == "largest":
        return *largest(kind, num_blocks), "", ""
    if question == "depth":
        return cube, measured(kind, num_blocks, mode, cube)[1], "", ""
    return cube, "", *(f"{s:.4g}" for s in step_seconds(num_blocks)[kind])


def sweep():
    from benchmarks.provenance import provenance

    path, rows = FOLDER / "volumes.csv", []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    for values in cells():
        keys = "question", "kind", "mode", "num_blocks"
        cell = dict(zip(keys, map(str, values), strict=True))
        if any(cell.items() <= row.items() for row in rows):
            continue
        sizes, *figures = answer(*values)
        volume = {"sizes": "x".join(map(str, sizes)), "voxels": math.prod(sizes)}
        figures = zip(("bytes", "seconds", "cpu_seconds"), figures, strict=True)
        rows.append({**provenance(), **cell, **volume, **dict(figures)})
        print(*rows[-1].values(), flush=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


NAMES = {
    "ordinary": "ordinary backpropagation",
    "remat": "keras.remat of every block",
    "revunet": "RevUNet",
}


def plot():
    from matplotlib.figure import Figure

    with open(FOLDER / "volumes.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["question"] == "largest"]
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    ax = figure.subplots()
    depths = sorted({int(row["num_blocks"]) for row in rows})
    for i, (kind, name) in enumerate(NAMES.items()):
        of = {
            int(row["num_blocks"]): row for row in rows if row["kind"] == kind
        }  # by depth
        at = [depth + (i - 1) * 0.5 for depth in depths]
        bars = ax.bar(at, [int(of[d]["voxels"]) / 1e6 for d in depths], 0.5, label=name)
        ax.bar_label(bars, [of[d]["sizes"] for d in depths], fontsize="small")
    ax.set(
        xlabel="blocks in each level of the encoder and of the decoder",
        ylabel="voxels, millions",
        title="Largest volume that trains within 1 GiB",
        xticks=depths,
    )
    ax.margins(y=0.15)
    ax.legend(fontsize="small")
    figure.savefig(IMAGES / "volumes.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("KIND", "NUM_BLOCKS", "MODE", "SIZES"),
        help="make one measurement in this process and print it",
    )
    args = parser.parse_args()
    if args.one:
        kind, num_blocks, mode, sizes = args.one
        sizes = tuple(map(int, sizes.split("x")))
        return measure_this_process(kind, int(num_blocks), mode, sizes)
    if not args.plot:
        sweep()
    plot()


if __name__ == "__main__":
    main()
