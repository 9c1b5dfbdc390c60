"""The time for tracing and compiling a network, before its first training step.

    python -m benchmarks.first_step    # first_step.csv; 15 minutes

The first step traces the network, compiles it and trains. Later steps only train. The
figure is the CPU time of the first step, minus that of the third. Each measurement is a
fresh process. Processes with recomputation and with ordinary backpropagation alternate.
The ratio is that of the medians.
"""

import argparse
import itertools
import json
import statistics
import time

from benchmarks import processes
from benchmarks.provenance import table

NETWORKS, BATCH_SIZE, ROUNDS = ("RevNet38", "RevNet164"), 4, 3


def measure_this_process(network, mode, recompute):
    import keras
    import numpy as np

    from revnet_tf import models

    model = getattr(models, network)(classifier_activation=None, recompute=recompute)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=mode == "xla"
    )
    x, y = np.zeros((BATCH_SIZE, 32, 32, 3), "float32"), np.zeros(BATCH_SIZE, "int32")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        model.train_on_batch(x, y)
        seconds.append(time.process_time() - start)
    print(json.dumps(seconds[0] - seconds[2]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "MODE", "RECOMPUTE"))
    args = parser.parse_args()
    if args.one:
        network, mode, recompute = args.one
        return measure_this_process(network, mode, recompute == "True")
    columns = ["network", "mode", "rounds", "cpu_seconds", "ordinary_cpu_seconds"]
    with table("first_step.csv", [*columns, "ratio"]) as add:
        for network, mode in itertools.product(NETWORKS, ("graph", "xla")):
            pairs = [
                [
                    processes.run("first_step", network, mode, recompute)
                    for recompute in (True, False)
                ]
                for _ in range(ROUNDS)
            ]
            rebuilt, ordinary = map(statistics.median, zip(*pairs, strict=True))
            figures = [rebuilt, ordinary, rebuilt / ordinary]
            add(network, mode, ROUNDS, *(f"{f:.4g}" for f in figures))


if __name__ == "__main__":
    main()
