"""The speed of an exported network in each runtime, on the CPU.

    python -m benchmarks.serving [--rounds N]    # serving.csv

The networks are RevNet-38 and ResNet-32 on raw 32x32 images, as a run exports them.
The runtimes are the live `keras.Model` (`predict_on_batch`), its SavedModel in this
process, LiteRT and ONNX Runtime. LiteRT has one thread for each core, the others their
default number. The runtimes alternate in one process.

The latency is that of a batch of 1, in milliseconds. The images per second are those of
the median batch of 32.
"""

import argparse
import csv
import os
import pathlib
import tempfile
import time

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from benchmarks.provenance import FOLDER, provenance
from revnet_tf import models
from revnet_tf.export import export_litert, export_onnx, export_saved_model

NETWORKS = ("RevNet38", "ResNet32")
BATCH_SIZES = (1, 32)
# The number of batches of 1, of which ten are above p99. A tenth as many have 32.
ROUNDS = 1000


def serving_model(network):
    inputs = keras.Input((32, 32, 3), dtype="uint8")
    normalized = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    return keras.Model(inputs, getattr(models, network)()(normalized))


def runtimes(model, folder):
    """Returns a dict from runtimes to functions from `uint8` images to predictions."""
    export_saved_model(model, folder / "1")
    export_litert(model, folder / "model.tflite")
    export_onnx(model, folder / "model.onnx")
    served = tf.saved_model.load(str(folder / "1")).signatures["serving_default"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    lite = {}
    for batch_size in BATCH_SIZES:  # One interpreter each, as resizing takes time.
        lite[batch_size] = Interpreter(
            str(folder / "model.tflite"), num_threads=os.cpu_count()
        ).get_signature_runner("serving_default")
    return {
        "keras": model.predict_on_batch,
        "saved_model": lambda x: served(inputs=tf.constant(x))["predictions"].numpy(),
        "litert": lambda x: lite[len(x)](inputs=x)["predictions"],
        "onnxruntime": lambda x: session.run(["predictions"], {"inputs": x})[0],
    }


def measure(functions, rounds):
    """Returns the seconds of each call, as dicts by runtime and batch size."""
    rng = np.random.default_rng(0)
    seconds = {name: {size: [] for size in BATCH_SIZES} for name in functions}
    for batch_size in BATCH_SIZES:
        x = rng.integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
        for function in functions.values():  # The first calls trace it.
            for _ in range(3):
                function(x)
        for _ in range(rounds if batch_size == 1 else max(1, rounds // 10)):
            for name, function in functions.items():
                start = time.perf_counter()
                function(x)
                seconds[name][batch_size].append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--output", type=pathlib.Path, default=FOLDER / "serving.csv", metavar="CSV"
    )
    args = parser.parse_args()
    common = provenance()
    common |= {"onnxruntime": onnxruntime.__version__}
    columns = ["network", "runtime", "rounds", "p50_ms", "p99_ms", "images_per_second"]
    rows = []
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            functions = runtimes(serving_model(network), pathlib.Path(folder))
            for name, seconds in measure(functions, args.rounds).items():
                p50, p99 = 1000 * np.percentile(seconds[1], [50, 99])
                rate = 32 / np.median(seconds[32])
                row = [network, name, args.rounds, f"{p50:.3g}", f"{p99:.3g}"]
                rows.append([*common.values(), *row, f"{rate:.4g}"])
                print(*row, f"{rate:.4g}", flush=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*common, *columns])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
