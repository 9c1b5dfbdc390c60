"""The largest batch within a budget: by estimate, and by measurement.

    python -m benchmarks.max_batch   # max_batch.csv; 15 minutes

For 5 networks in graph mode and 4 budgets each, `revnet_tf.memory.max_batch_size` names
a batch. The measured batch is the largest one with a measured peak within the budget,
the largest peak of nine steps. It comes from measurements at four batch sizes: the peak
is nearly linear between them.
The column `ratio` is the estimated batch by the measured one. Each network has a
process of its own.
"""

import argparse
import json

from benchmarks import processes

NETWORKS = ("sequence", "ordinary", "RevNet", "ResNet", "ResNet in segments")
FACTORS = (1, 2, 3, 4)
# About the batch of the smallest budget: large enough for the allocator's statistics.
BATCH_SIZE = 96


def build(network):
    import keras

    from benchmarks import networks
    from revnet_tf import models, recompute

    if network in networks.CHAINS:
        return networks.build(network, 4)
    name, *segments = network.split(" in ")
    widths = (32, 32, 64, 128)
    model = getattr(models, name)((2, 2, 2), widths, classifier_activation=None)
    model = recompute(model) if segments else model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=False)
    return model


def measure_this_process(network):
    """Prints for each budget its bytes, and the batches by estimate and measurement."""
    import numpy as np

    from revnet_tf import memory

    model = build(network)
    smallest = memory.estimate(model, BATCH_SIZE).peak_bytes
    budgets = [factor * smallest for factor in FACTORS]
    estimated = [memory.max_batch_size(model, budget) for budget in budgets]
    sizes = [*estimated[:3], round(1.2 * estimated[3])]
    # The order of execution differs from step to step. `measure` makes three.
    peaks = [
        max(memory.measure(model, size).peak_bytes for _ in range(3)) for size in sizes
    ]
    # Beyond the first and last size, as between their neighbours.
    measured = []
    for budget in budgets:
        i = int(np.clip(np.searchsorted(peaks, budget) - 1, 0, len(sizes) - 2))
        a_sample = (peaks[i + 1] - peaks[i]) / (sizes[i + 1] - sizes[i])
        measured.append(int(sizes[i] + (budget - peaks[i]) / a_sample))
    print(json.dumps(list(zip(budgets, estimated, measured, strict=True))))


def sweep():
    from benchmarks.provenance import table

    columns = ("network", "budget_bytes", "estimated_batch", "measured_batch", "ratio")
    with table("max_batch.csv", columns) as add:
        for network in NETWORKS:
            for budget, estimated, measured in processes.run("max_batch", network):
                ratio = f"{estimated / measured:.3f}"
                add(network, budget, estimated, measured, ratio)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", metavar="NETWORK")
    args = parser.parse_args()
    if args.one:
        return measure_this_process(args.one)
    sweep()


if __name__ == "__main__":
    main()
