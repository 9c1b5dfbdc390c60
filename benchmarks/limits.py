"""The largest batch and the largest depth that fit a budget of memory.

    python -m benchmarks.limits    # limits.csv; half an hour

The network is a chain of blocks of `benchmarks.networks`, in graph mode. The script
finds the largest batch for 16 blocks, and the most blocks for a batch of 64. A fresh
process measures each peak with `revnet_tf.memory.measure`. The script tries no value
above 200, so a row with 200 means 200 or more.
"""

import argparse
import functools
import itertools
import json

from benchmarks import processes
from benchmarks.provenance import table

BUDGET_BYTES = 2**28
NETWORKS = ("ordinary", "remat", "sequence")
NUM_BLOCKS, BATCH_SIZE = 16, 64
MOST = 200


def largest(peak):
    """Returns the largest number up to `MOST` whose peak is within the budget, or 0.

    The peak is nearly linear. Each guess extends a straight line through the last two
    measurements. The search ends when a number fits and the next one does not.
    """
    fits, too_many = 0, MOST + 1
    a, b = 2, 4
    while too_many - fits > 1:
        slope = (peak(b) - peak(a)) / (b - a)
        guess = b + (BUDGET_BYTES - peak(b)) / slope if slope > 0 else MOST
        guess = min(max(int(guess), fits + 1), too_many - 1)
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

            @functools.cache
            def peak(size, network=network, what=what, sizes=sizes):
                return processes.run("limits", network, *{**sizes, what: size}.values())

            size = largest(peak)
            sizes[what] = size
            add(BUDGET_BYTES, network, what, *sizes.values(), peak(size))


if __name__ == "__main__":
    main()
