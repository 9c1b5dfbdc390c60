"""The speed of the input pipeline and of RevNet-38, in images per second.

    python -m benchmarks.input_pipeline --data-dir DIR   # input_pipeline.csv; 2 minutes

The data are CIFAR-10 with the augmentation of `cifar10_revnet38`, in batches of 100.
The pipeline and the training alternate in one process, so each has all cores. The
figures are medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.provenance import FOLDER, provenance
from training import data, fit, outputs
from training.recipes import RECIPES

# The prefetched batches at the start of a round are few of so many batches.
ROUNDS, PIPELINE_BATCHES, TRAINING_STEPS = 7, 1000, 10


def images_per_second(count, step, batch_size):
    """Returns the images per second of `count` steps."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return count * batch_size / (time.perf_counter() - start)


def measure(recipe, images):
    """Returns the images per second of each round, of the pipeline and of training."""
    network = fit.build(recipe, images)
    fit.compile_network(network, recipe)
    iterator = iter(images.training_batches(recipe))
    x, y = next(iterator)
    network.train_on_batch(x, y)
    size = recipe.global_batch_size
    rounds = [
        (
            images_per_second(PIPELINE_BATCHES, lambda: next(iterator), size),
            images_per_second(
                TRAINING_STEPS, lambda: network.train_on_batch(x, y), size
            ),
        )
        for _ in range(ROUNDS)
    ]
    return zip(*rounds, strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of TFDS data sets")
    args = parser.parse_args()
    recipe = RECIPES["cifar10_revnet38"]
    images = data.load(recipe, args.data_dir)
    rows = []
    for what, figures in zip(
        ("pipeline", "training"), measure(recipe, images), strict=True
    ):
        low, high = np.percentile(figures, [10, 90])
        rows.append(
            {
                **provenance(),
                "what": what,
                "rounds": ROUNDS,
                "images_per_second": round(statistics.median(figures)),
                "p10": round(low),
                "p90": round(high),
            }
        )
        print(what, rows[-1]["images_per_second"], "images per second")
    outputs.write_table(FOLDER / "input_pipeline.csv", rows)


if __name__ == "__main__":
    main()
