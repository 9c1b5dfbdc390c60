"""The time of a training step, relative to ordinary backpropagation.

    python -m benchmarks.step_time    # step_time.csv; an hour

The network is a chain of 9 blocks with two streams of 32 channels, images of 32x32 and
batches of 64, in these ways:

- one `RevSequence`;
- the same blocks called one by one;
- a sequence that stores the activations of its last block;
- a sequence with fixed-point streams;
- plain blocks under `keras.remat`;
- ordinary backpropagation;
- the forward pass of ordinary backpropagation alone.

The script measures each way with Keras's batch normalization and with that of the
library. The gradient is that for the weights and the input, as inside a network. The
ways alternate in one process, in turns of both directions. The ratios are those of the
medians to ordinary backpropagation. The memory layout of a process changes the ratios
by some percent. The figures are therefore the median, the lowest and the highest ratio
of several fresh processes.

The lower bound of a recomputation is ordinary backpropagation plus one forward pass.
"""

import argparse
import itertools
import json
import statistics
import time

from benchmarks import networks, processes
from benchmarks.provenance import table

NUM_BLOCKS, BATCH_SIZE = 9, 64
PROCESSES, ROUNDS = 5, 6

WAYS = (
    "sequence",
    "functional",
    "last_stored",
    "fixed_point",
    "remat",
    "ordinary",
    "forward",
)


def training_step(way, norm, jit_compile, num_blocks=NUM_BLOCKS):
    import tensorflow as tf

    network = "ordinary" if way == "forward" else way
    chain = networks.chain(network, num_blocks, networks.NORMS[norm])
    chain.build((None, 32, 32, 64))
    weights = [v.value for v in chain.trainable_variables]

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_mean(chain(x, training=True) ** 2)
        if way == "forward":
            return [loss]
        return tape.gradient(loss, [*weights, x])

    return step


def batch(batch_size=BATCH_SIZE):
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(0)
    return tf.constant(rng.standard_normal((batch_size, 32, 32, 64), dtype="float32"))


def medians(steps, x, rounds=ROUNDS):
    """Returns the median seconds and the median CPU seconds of alternating steps."""
    for step in steps:  # The first call traces and compiles it.
        step(x)
    seconds, cpu_seconds = [[] for _ in steps], [[] for _ in steps]
    for round_ in range(rounds):
        there = range(len(steps))
        for i in there if round_ % 2 else reversed(there):
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[i](x)[0].numpy()  # It waits for the device.
            seconds[i].append(time.perf_counter() - start)
            cpu_seconds[i].append(time.process_time() - cpu_start)
    return [[statistics.median(s) for s in kind] for kind in (seconds, cpu_seconds)]


def measure_this_process(mode, norm):
    """Prints the medians of the seconds and of the CPU seconds of each way."""
    steps = [training_step(way, norm, mode != "graph") for way in WAYS]
    kinds = medians(steps, batch())
    print(json.dumps([dict(zip(WAYS, kind, strict=True)) for kind in kinds]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--one", nargs=2, metavar=("MODE", "NORM"), help="measure in this process"
    )
    args = parser.parse_args()
    if args.one:
        return measure_this_process(*args.one)
    columns = [
        "mode",
        "norm",
        "way",
        "processes",
        "rounds",
        "step_seconds",
        "cpu_seconds",
    ]
    columns += ["ratio", "lowest_ratio", "highest_ratio", "cpu_ratio"]
    with table("step_time.csv", columns) as add:
        cells = itertools.product(processes.MODES.items(), networks.NORMS)
        for (mode, flags), norm in cells:
            runs = [
                processes.run("step_time", mode, norm, xla_flags=flags)
                for _ in range(PROCESSES)
            ]
            for way in WAYS:
                seconds, cpu_seconds = zip(*runs, strict=True)
                ratios = [s[way] / s["ordinary"] for s in seconds]
                cpu_ratios = [s[way] / s["ordinary"] for s in cpu_seconds]
                figures = [
                    statistics.median(s[way] for s in seconds),
                    statistics.median(s[way] for s in cpu_seconds),
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                    statistics.median(cpu_ratios),
                ]
                add(mode, norm, way, PROCESSES, ROUNDS, *(f"{f:.4g}" for f in figures))


if __name__ == "__main__":
    main()
