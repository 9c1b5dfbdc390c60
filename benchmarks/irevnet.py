"""The inverse of a trained i-RevNet, and its memory by stages and blocks.

    python -m benchmarks.irevnet inverse --data-dir DIR   # irevnet_inverse.csv
    python -m benchmarks.irevnet memory                   # irevnet_memory.csv

`inverse` trains `cifar10_irevnet_short` for some hundred steps, in float32 and in fixed
point. It then computes the 10,000 test images back from the features of the body, in
eager mode and in a graph, in inference mode. The table has the largest difference of a
pixel in [0, 1], and the number of `uint8` pixels that differ.

`memory` measures the bytes that one more image adds to a training step. All networks
have outputs of one size: space to depth keeps the number of values. With XLA the figure
is that of the compiler, in a graph that of the allocator (`memory.measure`).

Each measurement is a process of its own. `memory` skips those that have a row.
"""

import argparse
import itertools
import json
import pathlib

from benchmarks import processes
from benchmarks.provenance import FOLDER, provenance, table
from training import outputs

CHANNELS, STRIDES = (16, 64, 256), (1, 2, 2)
# Stages and blocks of each stage.
DEPTHS = ((1, 6), (2, 6), (3, 6), (3, 2), (3, 18))
BATCH_SIZES = 64, 256
FRACTION_BITS = None, 14
MODES = "eager", "graph"


def measure_memory(mode, recompute, stages, blocks):
    """Returns the bytes an image of a training step in this process."""
    import keras

    from revnet_tf import memory, models

    model = models.iRevNet(
        (blocks,) * stages,
        CHANNELS[:stages],
        STRIDES[:stages],
        classifier_activation=None,
        recompute=recompute,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=mode == "xla")
    small, large = (
        memory.measure(model, batch_size).activation_bytes for batch_size in BATCH_SIZES
    )
    return (large - small) / (BATCH_SIZES[1] - BATCH_SIZES[0])


def measure_inverse(fraction_bits, steps, data_dir):
    """Returns for each mode the largest difference and the number of other pixels."""
    import keras
    import numpy as np
    import tensorflow as tf

    from training import data, fit
    from training.recipes import RECIPES

    recipe = RECIPES["cifar10_irevnet_short"].replace(fraction_bits=fraction_bits)
    images = data.load(recipe, data_dir)
    keras.utils.set_random_seed(recipe.seed)
    network = fit.build(recipe, images)
    fit.compile_network(network, recipe)
    batches = images.training_batches(recipe)
    network.fit(batches, steps_per_epoch=steps, verbose=0)
    body = network.get_layer("body")

    def there_and_back(pixels):
        features = body(images.normalize(pixels), training=False)
        return body.inverse(features) * images.scale + images.mean

    found = {}
    for mode in MODES:
        function = there_and_back
        if mode == "graph":
            function = tf.function(there_and_back, autograph=False)
        difference, others = 0.0, 0
        for batch in np.split(images.test_images, 40):
            back = function(tf.constant(batch)).numpy()
            difference = max(difference, np.abs(back - batch).max() / 255)
            others += int((np.rint(back) != batch).sum())
        found[mode] = float(difference), others
    return found


def inverse(args):
    columns = "fraction_bits", "steps", "mode", "images", "difference", "other_pixels"
    with table("irevnet_inverse.csv", columns) as add:
        for bits in FRACTION_BITS:
            arguments = "inverse", bits or 0, args.steps, args.data_dir or ""
            for mode, values in processes.run("irevnet", *arguments).items():
                add(bits, args.steps, mode, 10_000, *values)


def memory(args):
    path = FOLDER / "irevnet_memory.csv"
    names = "mode", "recompute", "stages", "blocks"
    for mode, recompute, depth in itertools.product(
        ("xla", "graph"), (True, False), DEPTHS
    ):
        rows = outputs.read_table(path)
        values = mode, recompute, *depth
        cell = {k: str(v) for k, v in zip(names, values, strict=True)}
        if not any(cell.items() <= row.items() for row in rows):
            found = processes.run("irevnet", "memory", mode, int(recompute), *depth)
            row = provenance() | cell | {"bytes_per_image": round(found)}
            outputs.write_table(path, [*rows, row])
            print(*values, round(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("inverse", "memory"))
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder of TFDS data")
    parser.add_argument("--one", nargs="+", help="make one measurement in this process")
    args = parser.parse_args()
    if not args.one:
        if not args.part:
            parser.error("expected a part, inverse or memory; give one")
        return {"inverse": inverse, "memory": memory}[args.part](args)
    part, *arguments = args.one
    if part == "memory":
        mode, *numbers = arguments
        recompute, stages, blocks = map(int, numbers)
        print(json.dumps(measure_memory(mode, bool(recompute), stages, blocks)))
    else:
        bits, steps, data_dir = arguments
        found = measure_inverse(int(bits) or None, int(steps), data_dir or None)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
