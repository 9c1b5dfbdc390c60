"""The largest batch and the largest depth that fit a budget of memory.

    python -m benchmarks.limits    # limits.csv; an hour

A chain of blocks as in `benchmarks.networks`, in graph mode: the largest batch for 16
blocks, and the most blocks for a batch of 128, whose peak is within the budget by
`revnet_tf.memory.estimate` with the margin of `plan`, and what `measure` says of that
one in a fresh process.
"""

import argparse
import functools
import itertools
import json

from benchmarks import processes
from benchmarks.provenance import table

BUDGET_BYTES = 2**28
NETWORKS = ("ordinary", "remat", "sequence")
NUM_BLOCKS, BATCH_SIZE = 16, 128


def peak_bytes(network, num_blocks, batch_size):
    from benchmarks import networks
    from revnet_tf import memory

    model = networks.build(network, num_blocks)
    return memory.PLAN_MARGIN * memory.estimate(model, batch_size).peak_bytes


def largest(peak):
    """Returns the largest number whose peak is within the budget; 0 if not even 1.

    The peak is nearly linear: the guess is that of a straight line through the last two
    numbers, until one fits and the next does not.
    """
    peak = functools.cache(peak)
    fits, too_many = 0, None
    a, b = 2, 4
    while too_many is None or too_many - fits > 1:
        slope = (peak(b) - peak(a)) / (b - a)
        guess = int(b + (BUDGET_BYTES - peak(b)) / slope)
        guess = max(guess, fits + 1)
        if too_many is not None:
            guess = min(guess, too_many - 1)
        if peak(guess) <= BUDGET_BYTES:
            fits = guess
        else:
            too_many = guess
        if guess not in (a, b):
            a, b = sorted((b, guess))
    return fits


def measure_this_process(network, num_blocks, batch_size):
    from benchmarks import networks
    from revnet_tf import memory

    model = networks.build(network, num_blocks)
    print(json.dumps(memory.measure(model, batch_size).peak_bytes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "BLOCKS", "BATCH_SIZE"))
    args = parser.parse_args()
    if args.one:
        network, num_blocks, batch_size = args.one
        return measure_this_process(network, int(num_blocks), int(batch_size))
    columns = ["budget_bytes", "network", "largest", "num_blocks", "batch_size"]
    with table("limits.csv", [*columns, "measured_peak_bytes"]) as add:
        for network, what in itertools.product(NETWORKS, ("batch_size", "num_blocks")):
            sizes = {"num_blocks": NUM_BLOCKS, "batch_size": BATCH_SIZE}

            def peak(size, network=network, what=what, sizes=sizes):
                return peak_bytes(network, **{**sizes, what: size})

            sizes = {**sizes, what: largest(peak)}
            measured = processes.run("limits", network, *sizes.values())
            add(BUDGET_BYTES, network, what, *sizes.values(), measured)


if __name__ == "__main__":
    main()
