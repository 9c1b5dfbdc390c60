"""Memory and time of networks of `keras.applications` whose segments are recomputed.

    python -m benchmarks.applications memory   # applications_memory.csv; 10 minutes
    python -m benchmarks.applications time     # applications_time.csv; 10 minutes

The networks train on batches of 8 images of 160 x 160 pixels in graph mode, in three
ways: with ordinary backpropagation, with the default segments of `revnet_tf.recompute`,
and with the same segments under `keras.remat`. The last way trains another network: it
moves the batch statistics twice and draws new dropout masks.

The activations are those of `revnet_tf.memory.measure`, in a fresh process each. The
times are medians of alternated steps in one process for each network. `forward` is one
forward pass in training mode.
"""

import argparse
import json
import statistics
import time

from benchmarks import processes

NETWORKS = (
    "ResNet50V2",
    "EfficientNetV2B0",
    "MobileNetV3Large",
    "DenseNet121",
    "ConvNeXtTiny",
)
WAYS = ("ordinary", "recompute", "remat")
BATCH_SIZE, IMAGE_SIZE, ROUNDS = 8, 160, 7


def build(network, way):
    import keras

    from revnet_tf import recompute

    build = getattr(keras.applications, network)
    model = build(weights=None, input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3))
    if way != "ordinary":
        model = recompute(model)
    if way == "remat":
        for segment in model.segments:
            segment.recompute = False
            segment.layer.call = under_remat(segment.layer.call)
    optimizer = keras.optimizers.SGD(0.01)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
    return model


def under_remat(function):
    import keras

    def call(*inputs, training=None):
        return keras.remat(lambda *x: function(*x, training=training))(*inputs)

    return call


def measure_this_process(network, way):
    from revnet_tf import memory

    found = memory.measure(build(network, way), BATCH_SIZE)
    print(json.dumps([found.activation_bytes, found.peak_bytes]))


def time_this_process(network):
    """Prints a dict from each way to the median of its seconds."""
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(0)
    shape = BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3
    x, y = rng.random(shape, dtype="float32"), np.zeros(BATCH_SIZE, "int32")
    models = {way: build(network, way) for way in WAYS}
    forward = tf.function(lambda x: models["ordinary"](x, training=True))
    steps = {"forward": lambda: forward(x)}
    for way, model in models.items():
        steps[way] = lambda model=model: model.train_on_batch(x, y)
    x = tf.constant(x)
    seconds = {way: [] for way in steps}
    for way, step in list(steps.items()):
        try:
            step()  # The first step traces the network.
        except Exception as error:  # `keras.remat` does not work for all networks.
            if way != "remat":
                raise
            print(type(error).__name__)
            del steps[way]
    for _ in range(ROUNDS):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
    print(json.dumps({w: statistics.median(s) for w, s in seconds.items() if s}))


def memory_table():
    from benchmarks.provenance import table

    columns = ("network", "way", "activation_bytes", "peak_bytes", "ratio")
    with table("applications_memory.csv", columns) as add:
        for network in NETWORKS:
            ordinary = None
            for way in WAYS:
                try:
                    found = processes.run("applications", network, way)
                except RuntimeError:
                    if way != "remat":
                        raise
                    add(network, way, "", "", "")
                    continue
                ordinary = ordinary or found[0]
                add(network, way, *found, f"{found[0] / ordinary:.3f}")


def time_table():
    from benchmarks.provenance import table

    columns = ("network", "way", "seconds", "ratio")
    with table("applications_time.csv", columns) as add:
        for network in NETWORKS:
            found = processes.run("applications", network, "time")
            # Ordinary backpropagation and one forward pass.
            limit = found["ordinary"] + found["forward"]
            for way in ("forward", *WAYS):
                if way in found:
                    ratio = f"{found[way] / limit:.3f}"
                    add(network, way, f"{found[way]:.4g}", ratio)
                else:
                    add(network, way, "", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "time"), nargs="?")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY_OR_TIME"))
    args = parser.parse_args()
    if args.one:
        network, way = args.one
        if way == "time":
            return time_this_process(network)
        return measure_this_process(network, way)
    if args.what is None:
        parser.error("Expected memory or time.")
    {"memory": memory_table, "time": time_table}[args.what]()


if __name__ == "__main__":
    main()
