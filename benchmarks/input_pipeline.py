"""How many images a second the input pipeline delivers, and RevNet-38 trains.

    python -m benchmarks.input_pipeline --data-dir DIR   # input_pipeline.csv; 2 minutes

Real CIFAR-10 with the augmentation of `cifar10_revnet38`, batches of 100. Both sides
alternate in one process, each with all cores to itself; the figures are medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.provenance import FOLDER, provenance
from training import data, fit, outputs
from training.recipes import RECIPES

# So many batches that the few that lie ready at the start of a round do not matter.
ROUNDS, PIPELINE_BATCHES, TRAINING_STEPS = 7, 1000, 10


def images_per_second(count, step, batch_size):
    """Returns how many images a number of steps take in a second."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return count * batch_size / (time.perf_counter() - start)


def measure(recipe, images):
    """Returns images a second of each round, of the pipeline and of the training."""
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
    parser.add_argument("--data-dir", type=Path, help="as of training.train")
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
