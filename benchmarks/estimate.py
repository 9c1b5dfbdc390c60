"""The memory of a training step of whole networks: predicted, measured, lower bound.

    python -m benchmarks.estimate    # estimate.csv; 15 minutes

A fresh process for each row calls `revnet_tf.memory.estimate` and `measure`, in graph
mode or with XLA. With XLA both figures are those that the compiler assigns.

The lower bound counts the tensors that are alive while the backward pass differentiates
one branch, F or G, of the first stage. S is the size of one stream:

- the streams and their gradients, 4 S;
- the inputs of the convolutions and BNs of the branch, 3 S, of a bottleneck 2 S;
- the output of the last convolution, or its gradient, S;
- the images;
- the input of the first stage, if its first block is not invertible.
"""

import argparse
import json

from benchmarks import processes
from benchmarks.provenance import table

PAPER = ("RevNet38", "RevNet110", "RevNet164", "ResNet32", "ResNet110", "ResNet164")
XLA = [mode for mode in processes.MODES if mode != "graph"]
# Network, batch size and mode of each row.
ROWS = [
    *((name, 100, "graph") for name in PAPER),
    *((name, 100, mode) for mode in XLA for name in PAPER[:3]),
    ("attention", 32, "graph"),
    ("ResNet164", 32, "graph"),
    ("RevNet1004", 32, "graph"),
]


def build(network):
    """Returns a network of the paper, or one of those below."""
    from revnet_tf import models

    if network == "attention":
        return attention()
    if network == "RevNet1004":  # 167 blocks of 6 convolutions, and 2 more layers
        return models.RevNet(
            (55, 56, 56), (32, 32, 64, 128), True, classifier_activation=None
        )
    return getattr(models, network)(classifier_activation=None)


def attention():
    """Returns six reversible blocks with self-attention and perceptron branches."""
    import keras

    import revnet_tf

    def attend():
        x = keras.Input((256, 128))
        y = keras.layers.LayerNormalization()(x)
        return keras.Model(x, keras.layers.MultiHeadAttention(4, 32)(y, y))

    def perceive():
        return keras.Sequential(
            [
                keras.layers.LayerNormalization(),
                keras.layers.Dense(512, "gelu"),
                keras.layers.Dense(128),
            ]
        )

    x = keras.Input((256, 256))
    y = revnet_tf.RevSequence(
        [revnet_tf.RevBlock(attend(), perceive()) for _ in range(6)]
    )(x)
    y = keras.layers.GlobalAveragePooling1D()(y)
    return keras.Model(x, keras.layers.Dense(10)(y))


def least_bytes(network, batch_size):
    """Returns the lower bound of the activations of a RevNet for CIFAR, in float32."""
    bottleneck = network in ("RevNet164", "RevNet1004")
    pixels = 32 * 32 * batch_size * 4
    stream = pixels * (64 if bottleneck else 16)
    alive = 7 * stream + 32 * pixels if bottleneck else 8 * stream
    return alive + 3 * pixels


def measure_this_process(network, batch_size, mode):
    import dataclasses

    import keras

    from revnet_tf import memory

    model = build(network)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), jit_compile=mode in XLA)
    estimated = memory.estimate(model, batch_size)
    measured = estimated if mode in XLA else memory.measure(model, batch_size)
    print(json.dumps([dataclasses.asdict(m) for m in (estimated, measured)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "BATCH_SIZE", "MODE"))
    args = parser.parse_args()
    if args.one:
        network, batch_size, mode = args.one
        return measure_this_process(network, int(batch_size), mode)
    columns = ["network", "batch_size", "mode", "estimated_activation_bytes"]
    columns += ["measured_activation_bytes", "least_activation_bytes"]
    columns += ["estimated_peak_bytes", "measured_peak_bytes", "ratio"]
    with table("estimate.csv", columns) as add:
        for network, batch_size, mode in ROWS:
            estimated, measured = processes.run(
                "estimate", network, batch_size, mode, xla_flags=processes.MODES[mode]
            )
            row = [network, batch_size, mode, estimated["activation_bytes"]]
            row += [measured["activation_bytes"]]
            row += [least_bytes(network, batch_size) if "RevNet" in network else ""]
            row += [estimated["peak_bytes"], measured["peak_bytes"]]
            add(*row, f"{estimated['peak_bytes'] / measured['peak_bytes']:.3f}")


if __name__ == "__main__":
    main()
