"""The memory of a training step, by depth.

    python -m benchmarks.memory          # memory.csv and the plots; 40 minutes
    python -m benchmarks.memory --plot   # the plots again, from memory.csv

`memory.png` shows a chain with the library's batch normalization in graph mode,
`memory_modes.png` chains with Keras's in all modes, and RevNets. The script skips
measurements that have a row in memory.csv.

Each measurement is a fresh process that makes two training steps. Without XLA the
figure is the process's peak resident size (`VmHWM`, Linux). With XLA it is the size of
the temporary buffer that the compiler assigns to the training step, exact to the byte.

The script measures two batch sizes and divides the difference by the difference in
samples. This leaves out the weights, their gradients, the code and the tracing.

A resident size varies by some megabytes. A sample of a RevNet takes little memory, so
its larger batch has more samples. The figures also leave out the memory that the
allocator wastes in chunks that it does not split. This waste changes with the load of
the machine, by up to 30 MB.
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
# Chains whose memory grows with each block.
GROWING = "remat", "ordinary"


def bytes_per_sample(network, num_blocks, mode="graph", norm="keras"):
    """Returns the bytes that one more sample adds to the peak of a step."""

    def measure(batch_size):
        if mode == "graph":
            return peak_bytes(network, num_blocks, batch_size, norm)
        return xla_temporary_bytes(network, num_blocks, batch_size, mode)

    sizes = 16, 208 if network.startswith("revnet") else 80
    with ThreadPoolExecutor() as pool:  # Each measurement is a process of its own.
        small, large = pool.map(measure, sizes)
    return (large - small) / (sizes[1] - sizes[0])


def peak_bytes(network, num_blocks, batch_size, norm):
    """Returns the peak resident size of a fresh process that trains in graph mode."""
    found = processes.run("memory", network, num_blocks, batch_size, "graph", norm)
    return found["peak_bytes"]


def xla_temporary_bytes(network, num_blocks, batch_size, mode="xla"):
    """Returns the size of the temporary buffer of a training step under XLA."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{processes.MODES[mode]} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        cell = network, num_blocks, batch_size, mode, "keras"
        processes.run("memory", *cell, xla_flags=flags)
        sizes = []
        for path in pathlib.Path(folder).glob("*buffer-assignment.txt"):
            found = re.findall(r"size (\d+), preallocated-temp", path.read_text())
            sizes.append(sum(map(int, found)))
    return max(sizes)


def measure_this_process(network, num_blocks, batch_size, mode, norm):
    import numpy as np

    from benchmarks import networks
    from revnet_tf.memory import split_large_region

    split_large_region()
    model = networks.build(network, num_blocks, mode != "graph", norm)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, *model.input_shape[1:]), dtype="float32")
    for _ in range(2):
        model.train_on_batch(x, np.zeros(batch_size, "int32"))
    print(json.dumps({"peak_bytes": peak_resident_bytes()}))


def peak_resident_bytes():
    # Not `ru_maxrss`, which starts at the size of the parent process.
    status = pathlib.Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    return 1024 * kib


def cells():
    """Yields network, number of blocks, mode and normalization of each measurement."""
    for network in ("sequence", "last_stored", "functional", "remat", "ordinary"):
        for num_blocks in (4, 16) if network in GROWING else (4, 16, 64):
            for mode in processes.MODES:
                yield network, num_blocks, mode, "keras"
    for network in ("sequence", "remat", "ordinary"):
        for num_blocks in (4, 16) if network in GROWING else (4, 16, 64):
            yield network, num_blocks, "graph", "revnet_tf"
    for network in ("revnet", "revnet_ordinary"):
        for num_blocks in (3, 9, 18):
            yield network, num_blocks, "graph", "revnet_tf"


def sweep():
    from benchmarks.provenance import provenance

    path = FOLDER / "memory.csv"
    common = provenance()
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    for values in cells():
        network, num_blocks, mode, norm = values
        cell = {"network": network, "num_blocks": str(num_blocks)}
        cell |= {"mode": mode, "norm": norm}
        if any(cell.items() <= row.items() for row in rows):
            continue
        value = bytes_per_sample(*values)
        rows.append({**common, **cell, "bytes_per_sample": round(value)})
        print(*cell.values(), round(value), flush=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


NAMES = {
    "ordinary": "ordinary backpropagation",
    "remat": "keras.remat",
    "sequence": "RevSequence",
    "functional": "RevBlocks, functional model",
    "revnet_ordinary": "ordinary backpropagation",
    "revnet": "RevNet",
}
# The lines of reversible chains coincide. Open markers show all of them.
STYLE = {
    "ordinary": dict(color="C1", marker="s"),
    "remat": dict(color="C3", marker="^", markersize=9, fillstyle="none"),
    "sequence": dict(color="C0", marker="o", markersize=12, fillstyle="none"),
    "functional": dict(color="C2", marker="o", markersize=8, fillstyle="none"),
    "revnet_ordinary": dict(color="C1", marker="s"),
    "revnet": dict(color="C0", marker="o"),
}
CHAIN, REVNET = ("ordinary", "remat", "sequence", "functional"), tuple(STYLE)[4:]


def plot():
    from matplotlib.figure import Figure

    from benchmarks.provenance import IMAGES

    with open(FOLDER / "memory.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel(figure.subplots(), rows, "graph", "revnet_tf", CHAIN)
    figure.savefig(IMAGES / "memory.png", dpi=120)

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = [
        ("chain of blocks, graph mode", "graph", "keras", CHAIN),
        ("chain of blocks, XLA", "xla", "keras", CHAIN),
        ("chain of blocks, XLA ordered for memory", "xla_for_memory", "keras", CHAIN),
        ("RevNet of three stages, graph mode", "graph", "revnet_tf", REVNET),
    ]
    for ax, (title, *of) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        panel(ax, rows, *of)
        ax.set_title(title)
    figure.savefig(IMAGES / "memory_modes.png", dpi=120)


def panel(ax, rows, mode, norm, networks):
    """Draws memory against the number of blocks."""
    ticks = set()
    for network in networks:
        of = {"network": network, "mode": mode, "norm": norm}
        chosen = [row for row in rows if of.items() <= row.items()]
        if not chosen:
            continue
        stages = 3 if network in REVNET else 1
        x = [stages * int(row["num_blocks"]) for row in chosen]
        y = [float(row["bytes_per_sample"]) / 2**20 for row in chosen]
        ticks.update(x)
        ax.plot(x, y, label=NAMES[network], **STYLE[network])
    ax.set(xlabel="blocks", xticks=sorted(ticks))
    ax.set_ylabel("memory of a training step,\nMiB an image")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    parser.add_argument(
        "--one",
        nargs=5,
        metavar=("NETWORK", "NUM_BLOCKS", "BATCH_SIZE", "MODE", "NORM"),
        help="make one measurement in this process and print it",
    )
    args = parser.parse_args()
    if args.one:
        network, num_blocks, batch_size, *rest = args.one
        return measure_this_process(network, int(num_blocks), int(batch_size), *rest)
    if not args.plot:
        sweep()
    plot()


if __name__ == "__main__":
    main()
