"""How long a training step takes, against ordinary backpropagation.

    python -m benchmarks.step_time    # step_time.csv; 10 minutes

A chain of 9 blocks, two streams of 32 channels, 32x32, batch 64: recomputed, with
fixed-point streams, under `keras.remat`, with ordinary backpropagation, and the
forward pass of that alone. The gradient is that for the weights and the input, as
inside of a network. The ways alternate in one process; the figures are the ratios of
the medians.

Whoever evaluates every branch once more than ordinary backpropagation takes its time
and that of a forward pass: the last row says where the bound of the others is.
"""

import csv
import statistics
import time

import numpy as np
import tensorflow as tf

from benchmarks import networks
from benchmarks.provenance import FOLDER, provenance

NUM_BLOCKS, BATCH_SIZE, ROUNDS = 9, 64, 15

WAYS = ("sequence", "fixed_point", "remat", "ordinary", "forward")


def training_step(way, jit_compile):
    chain = networks.chain("ordinary" if way == "forward" else way, NUM_BLOCKS)
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


def measure(jit_compile):
    """Returns the seconds and the CPU seconds of each round, for each of the ways."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH_SIZE, 32, 32, 64), dtype="float32")
    x = tf.constant(x)
    steps = [training_step(way, jit_compile) for way in WAYS]
    for step in steps:  # traced, compiled and warm before the first clock is read
        step(x)
    seconds, cpu_seconds = [[] for _ in steps], [[] for _ in steps]
    for _ in range(ROUNDS):
        for i, step in enumerate(steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            step(x)[0].numpy()  # waits for the device
            seconds[i].append(time.perf_counter() - start)
            cpu_seconds[i].append(time.process_time() - cpu_start)
    return seconds, cpu_seconds


def main():
    common = provenance()
    with open(FOLDER / "step_time.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = ["mode", "way", "rounds", "step_seconds", "p10", "p90"]
        writer.writerow([*common, *columns, "cpu_seconds", "ratio", "cpu_ratio"])
        for mode in ("graph", "xla"):
            seconds, cpu_seconds = measure(mode == "xla")
            medians = [statistics.median(s) for s in seconds]
            cpu_medians = [statistics.median(s) for s in cpu_seconds]
            ordinary = WAYS.index("ordinary")
            for i, way in enumerate(WAYS):
                figures = [
                    medians[i],
                    *np.percentile(seconds[i], [10, 90]),
                    cpu_medians[i],
                    medians[i] / medians[ordinary],
                    cpu_medians[i] / cpu_medians[ordinary],
                ]
                row = [mode, way, ROUNDS, *(f"{f:.4g}" for f in figures)]
                writer.writerow([*common.values(), *row])
                print(*row)


if __name__ == "__main__":
    main()
