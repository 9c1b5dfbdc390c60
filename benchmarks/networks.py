"""The networks that the benchmarks and the tests of the memory claim measure."""

import keras

from revnet_tf import RevBlock, RevSequence, models

layers = keras.layers

# Chains that are one `RevSequence`, with its options.
SEQUENCES = {
    "sequence": {},
    "fixed_point": {"fraction_bits": 14},
    "ordinary": {"recompute": False},
}
CHAINS = ("functional", "sequential", *SEQUENCES)
REVNETS = ("revnet", "revnet_ordinary")


def branch(filters):
    stack = []
    for _ in range(2):
        stack += [
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
        ]
    return keras.Sequential(stack)


def block():
    return RevBlock(branch(32), branch(32))


def build(network, num_blocks, jit_compile=False):
    """Returns a compiled model with two streams of 32 channels, or a RevNet.

    Args:
        network: `"sequence"` (one `RevSequence`), `"functional"` or `"sequential"`
            (blocks called one by one in such a model), `"fixed_point"` (a sequence with
            fixed-point streams), `"ordinary"` (a sequence with ordinary
            backpropagation); `"revnet"` or `"revnet_ordinary"`, with the
            widths of the paper's RevNet-110.
        num_blocks: number of blocks; in each of three stages for a RevNet.
        jit_compile: whether to compile the training step with XLA.
    """
    if network in REVNETS:
        model = models.RevNet(
            (num_blocks,) * 3,
            (32, 32, 64, 128),
            classifier_activation=None,
            recompute=network == "revnet",
        )
    elif network == "sequential":
        blocks = [block() for _ in range(num_blocks)]
        model = keras.Sequential([keras.Input((32, 32, 64)), *blocks, *head()])
    elif network in CHAINS:
        x = y = keras.Input((32, 32, 64))
        if network == "functional":
            for _ in range(num_blocks):
                y = block()(y)
        else:
            blocks = [block() for _ in range(num_blocks)]
            y = RevSequence(blocks, **SEQUENCES[network])(y)
        for layer in head():
            y = layer(y)
        model = keras.Model(x, y)
    else:
        raise ValueError(f"network={network!r} must be one of {CHAINS + REVNETS}.")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
    return model


def head():
    return [layers.GlobalAveragePooling2D(), layers.Dense(10)]
