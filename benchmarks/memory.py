"""How much memory a training step takes, by depth.

    python -m benchmarks.memory          # memory.csv and memory.png; half an hour
    python -m benchmarks.memory --plot   # memory.png again, from memory.csv

A measurement that has its row in memory.csv is not made again.

Each measurement is a fresh process that makes two training steps. Without XLA the
figure is the process's peak resident size (`VmHWM`, Linux), with XLA the size of the
temporary buffer that the compiler assigns to the training step, exact to the byte. It
is taken at two batch sizes: their difference, divided by the difference in samples,
leaves out the weights and their gradients, the code and what tracing costs. (A resident
size varies by some megabytes. A sample of a RevNet takes little, so there are more.
What the allocator wastes when it gives chunks away whole is left out, too: it comes and
goes with the load of the machine, up to 30 MB.)
"""

import argparse
import csv
import json
import pathlib
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor

from benchmarks import processes

FOLDER = pathlib.Path(__file__).parent
# Chains that keep something of every block.
GROWING = "remat", "ordinary"


def bytes_per_sample(network, num_blocks, mode="graph"):
    """Returns what one more sample adds to the peak of a step."""

    def measure(batch_size):
        if mode == "graph":
            return peak_bytes(network, num_blocks, batch_size)
        return xla_temporary_bytes(network, num_blocks, batch_size, mode)

    sizes = 16, 208 if network.startswith("revnet") else 80
    with ThreadPoolExecutor() as pool:  # each a process; their peaks are their own
        small, large = pool.map(measure, sizes)
    return (large - small) / (sizes[1] - sizes[0])


def peak_bytes(network, num_blocks, batch_size):
    """Returns the peak resident size of a fresh process that trains in graph mode."""
    found = processes.run("memory", network, num_blocks, batch_size, "graph")
    return found["peak_bytes"]


def xla_temporary_bytes(network, num_blocks, batch_size, mode="xla"):
    """Returns the size of the temporary buffer of a training step under XLA."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{processes.MODES[mode]} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        processes.run("memory", network, num_blocks, batch_size, mode, xla_flags=flags)
        sizes = []
        for path in pathlib.Path(folder).glob("*buffer-assignment.txt"):
            found = re.findall(r"size (\d+), preallocated-temp", path.read_text())
            sizes.append(sum(map(int, found)))
    return max(sizes)


def measure_this_process(network, num_blocks, batch_size, mode):
    import numpy as np

    from benchmarks import networks
    from revnet_tf.memory import split_large_region

    split_large_region()
    model = networks.build(network, num_blocks, jit_compile=mode != "graph")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, *model.input_shape[1:]), dtype="float32")
    for _ in range(2):
        model.train_on_batch(x, np.zeros(batch_size, "int32"))
    print(json.dumps({"peak_bytes": peak_resident_bytes()}))


def peak_resident_bytes():
    # Not `ru_maxrss`: that starts at the size of the process that forked this one.
    status = pathlib.Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    return 1024 * kib


def cells():
    """Yields network, number of blocks and mode of each measurement."""
    for network in ("sequence", "last_stored", "functional", "remat", "ordinary"):
        for num_blocks in (4, 16) if network in GROWING else (4, 16, 64):
            for mode in processes.MODES:
                yield network, num_blocks, mode
    for network in ("revnet", "revnet_ordinary"):
        for num_blocks in (3, 9, 18):
            yield network, num_blocks, "graph"


def sweep():
    from benchmarks.provenance import provenance

    path = FOLDER / "memory.csv"
    common = provenance()
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    for network, num_blocks, mode in cells():
        cell = {"network": network, "num_blocks": str(num_blocks), "mode": mode}
        if any(cell.items() <= row.items() for row in rows):
            continue
        value = bytes_per_sample(network, num_blocks, mode)
        rows.append({**common, **cell, "bytes_per_sample": round(value)})
        print(*cell.values(), round(value), flush=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def plot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with open(FOLDER / "memory.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {
        "ordinary": "ordinary backpropagation",
        "sequence": "RevSequence",
        "functional": "RevBlocks, functional model",
        "remat": "keras.remat",
        "revnet_ordinary": "ordinary backpropagation",
        "revnet": "RevNet",
    }
    # The reversible chains lie on one another: open markers of different sizes.
    style = {
        "ordinary": dict(color="C1", marker="s"),
        "revnet_ordinary": dict(color="C1", marker="s"),
        "sequence": dict(color="C0", marker="o", markersize=12, fillstyle="none"),
        "functional": dict(color="C2", marker="o", markersize=8, fillstyle="none"),
        "remat": dict(color="C3", marker="^", markersize=9, fillstyle="none"),
        "revnet": dict(color="C0", marker="o"),
    }
    panels = [
        ("chain of blocks, graph mode", "graph", ("ordinary", *list(style)[2:5])),
        ("chain of blocks, XLA", "xla", ("ordinary", *list(style)[2:5])),
        ("XLA, ordered for memory", "xla_for_memory", ("ordinary", *list(style)[2:5])),
        ("RevNet, three stages, graph mode", "graph", ("revnet_ordinary", "revnet")),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for ax, (title, mode, networks) in zip(axes, panels, strict=True):
        ticks = set()
        for network in networks:
            chosen = [r for r in rows if (r["network"], r["mode"]) == (network, mode)]
            x = [int(r["num_blocks"]) for r in chosen]
            if network.startswith("revnet"):
                x = [3 * n for n in x]
            ticks.update(x)
            y = [float(r["bytes_per_sample"]) / 2**20 for r in chosen]
            ax.plot(x, y, label=names[network], **style[network])
        ax.set(title=title, xlabel="blocks", xticks=sorted(ticks))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    axes[0].set_ylabel("memory of a training step,\nMiB per sample")
    figure.savefig(FOLDER / "memory.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("NETWORK", "NUM_BLOCKS", "BATCH_SIZE", "MODE"),
        help="make one measurement in this process and print it",
    )
    args = parser.parse_args()
    if args.one:
        network, num_blocks, batch_size, mode = args.one
        return measure_this_process(network, int(num_blocks), int(batch_size), mode)
    if not args.plot:
        sweep()
    plot()


if __name__ == "__main__":
    main()
