"""Memory and time of a training step on this machine, in three ways.

    python -m benchmarks.report [--output DIR]    # some ten minutes on two cores

The three ways are ordinary backpropagation, plain blocks under `keras.remat`, and one
`RevSequence`. Each trains chains of 4, 8 and 16 blocks, two streams of 32 channels,
32x32, with the batch normalization of the paper's networks, in graph mode and float32.
The program measures the first GPU, or the CPU if TensorFlow finds no GPU. It prints a
table and writes it to `DIR/report.md`, with `report.csv` and the picture `report.png`.

- Memory: the bytes that one more sample adds to the peak of a step, as in
  `benchmarks.memory`. On a CPU (Linux) this is resident memory, good to some percent.
- Time: the median step of several processes, as in `benchmarks.step_time`.
- The lower bound of a recomputation is ordinary backpropagation plus one forward pass.

On a GPU the memory is that of TensorFlow's allocator, as `get_memory_info` reports it.
The path for GPUs has not been run: the project had no GPU.
"""

import argparse
import csv
import json
import pathlib
import statistics
import sys

from benchmarks import memory, processes, step_time
from benchmarks.provenance import table

WAYS = {
    "ordinary": "ordinary backpropagation",
    "remat": "`keras.remat`",
    "sequence": "`RevSequence`",
}
# The lower bound is a time, not a way of training: it has no memory.
ROWS = {**WAYS, "bound": "lower bound of a recomputation"}
QUANTITIES = "memory", "time"
SMALL_BATCH = 16


def measure_memory(way, num_blocks, batch_size):
    """Returns the peak memory of a step in this process, in bytes."""
    import tensorflow as tf

    from revnet_tf.memory import split_large_region

    gpu = bool(tf.config.list_physical_devices("GPU"))
    if not gpu:
        split_large_region()
    step = step_time.training_step(way, "revnet_tf", False, num_blocks)
    x = step_time.batch(batch_size)
    step(x)
    if gpu:  # without the memory of tracing and of the choice of kernels
        tf.config.experimental.reset_memory_stats("GPU:0")
    step(x)[0].numpy()
    if gpu:
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return memory.peak_resident_bytes()


def measure_time(num_blocks, batch_size, rounds):
    """Returns the seconds of a step by way, and those of a forward pass."""
    ways = [*WAYS, "forward"]
    steps = [
        step_time.training_step(way, "revnet_tf", False, num_blocks) for way in ways
    ]
    seconds, _ = step_time.medians(steps, step_time.batch(batch_size), rounds)
    return dict(zip(ways, seconds, strict=True))


def measure(args):
    """Writes `report.csv`; each measurement is a process of its own."""

    def run(text, *arguments):
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {num_blocks} blocks, {text}", flush=True)
        return processes.run("report", *arguments)

    done, total = 0, len(args.blocks) * (args.processes + 2 * len(WAYS))
    columns = "way", "num_blocks", "bytes_per_sample", "step_seconds", "ratio"
    with table(args.output.resolve() / "report.csv", columns) as add:
        for num_blocks in args.blocks:
            per_sample = {}
            for way, name in WAYS.items():
                small, large = (
                    run(f"memory of {name}", "memory", way, num_blocks, batch_size)
                    for batch_size in (SMALL_BATCH, SMALL_BATCH + args.batch_size)
                )
                per_sample[way] = round((large - small) / args.batch_size)
            times = [
                run("time of all", "time", num_blocks, args.batch_size, args.rounds)
                for _ in range(args.processes)
            ]
            for row in times:
                row["bound"] = row["ordinary"] + row["forward"]
            for way in ROWS:
                seconds = statistics.median(row[way] for row in times)
                ratio = statistics.median(row[way] / row["ordinary"] for row in times)
                memory_column = per_sample.get(way, "")
                add(way, num_blocks, memory_column, f"{seconds:.4g}", f"{ratio:.4g}")


def by_way(rows, column, scale=1):
    """Returns a dict from each way to its numbers of a column, in order of depth."""
    return {
        way: [float(r[column]) / scale for r in rows if r["way"] == way and r[column]]
        for way in ROWS
    }


def title(row):
    return (
        f"{row['device']}; TensorFlow {row['tensorflow']}, Keras {row['keras']}; "
        f"{row['date']}"
    )


def markdown(rows):
    """Returns the table of a report."""
    depths = dict.fromkeys(row["num_blocks"] for row in rows)
    heads = [f"{quantity}, {n} blocks" for quantity in QUANTITIES for n in depths]
    per_sample, ratios = by_way(rows, "bytes_per_sample", 2**20), by_way(rows, "ratio")
    lines = [["", *heads], ["---"] * (1 + len(heads))]
    for way, name in ROWS.items():
        memory_columns = [f"{x:.2f}" for x in per_sample[way]] or [""] * len(depths)
        lines.append([name, *memory_columns, *(f"{x:.2f}" for x in ratios[way])])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{title(rows[0])}\n\n{text}\n\nMemory: MiB that one sample adds to a training "
        "step. Time: that of a step, relative to ordinary backpropagation.\n"
    )


def draw(rows):
    """Returns the picture of a report, a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    depths = list(dict.fromkeys(int(row["num_blocks"]) for row in rows))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title(rows[0]))
    panels = zip(
        figure.subplots(1, 2),
        (by_way(rows, "bytes_per_sample", 2**20), by_way(rows, "step_seconds")),
        ("memory of a step, MiB per sample", "time of a step, seconds"),
        strict=True,
    )
    for ax, values, label in panels:
        for way, name in ROWS.items():
            if values[way]:
                style = "k:" if way == "bound" else "o-"
                ax.plot(depths, values[way], style, label=name.replace("`", ""))
        ax.set(xlabel="blocks", ylabel=label, xticks=depths)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    return figure


def write(output):
    """Writes table and picture from `report.csv`, and prints the table."""
    with open(output / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    text = markdown(rows)
    (output / "report.md").write_text(text)
    draw(rows).savefig(output / "report.png", dpi=120)
    print(f"\n{text}\nThe table and the picture are in {output}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/report"),
        metavar="DIR",
        help="folder of the report (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[4, 8, 16], help="depths of the chains"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=6, help="timed steps of each way in a process"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="processes that measure the time"
    )
    parser.add_argument("--one", nargs="+", help="make one measurement in this process")
    args = parser.parse_args()
    if args.one:
        kind, *arguments = args.one
        arguments = [int(a) if a.isdigit() else a for a in arguments]
        function = {"memory": measure_memory, "time": measure_time}[kind]
        return print(json.dumps(function(*arguments)))
    if min(*args.blocks, args.batch_size, args.rounds, args.processes) < 1:
        parser.error(
            "expected numbers above 0 for --blocks, --batch-size, --rounds and "
            "--processes, got 0 or less; change it"
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output must be a folder that can be written: {error}")
    try:
        measure(args)
        write(args.output)
    except (OSError, RuntimeError) as error:
        sys.exit(f"report: {error}".splitlines()[-1])  # status 1


if __name__ == "__main__":
    main()
