"""The networks that the benchmarks and the tests of the memory claim measure."""

import keras
import tensorflow as tf

from revnet_tf import RevBlock, RevSequence, models, normalization

layers = keras.layers

NORMS = {
    "keras": layers.BatchNormalization,
    "revnet_tf": normalization.BatchNormalization,
}

# Chains that are one `RevSequence`, with its options.
SEQUENCES = {
    "sequence": {},
    "last_stored": {},
    "fixed_point": {"fraction_bits": 14},
    "ordinary": {"recompute": False},
}
CHAINS = ("functional", "sequential", "remat", *SEQUENCES)
REVNETS = ("revnet", "revnet_ordinary")


class PlainBlock(layers.Layer):
    """The function of a `RevBlock` as an ordinary layer."""

    def __init__(self, f, g):
        super().__init__()
        self.f = f
        self.g = g

    def build(self, input_shape):
        *others, channels = input_shape
        for branch in (self.f, self.g):
            branch.build((*others, channels // 2))

    def call(self, inputs, training=False):
        x1, x2 = tf.split(inputs, 2, -1)
        y1 = x1 + self.f(x2, training=training)
        y2 = x2 + self.g(y1, training=training)
        return tf.concat([y1, y2], -1)


class RematBlock(PlainBlock):
    """A `PlainBlock` that stores its input and recomputes the rest."""

    def call(self, inputs, training=False):
        block = super()
        return keras.remat(lambda x: block.call(x, training=training))(inputs)


def branch(filters, norm):
    stack = []
    for _ in range(2):
        stack += [
            norm(),
            layers.ReLU(),
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
        ]
    return keras.Sequential(stack)


def block(kind=RevBlock, norm=layers.BatchNormalization):
    return kind(branch(32, norm), branch(32, norm))


def chain(network, num_blocks, norm=layers.BatchNormalization):
    """Returns a layer of several blocks with two streams of 32 channels.

    Args:
        network: str, the name of a chain; see `build`.
        num_blocks: int, the number of blocks.
        norm: function, returns the normalization layers of the branches.
    """
    if network in SEQUENCES:
        blocks = [block(norm=norm) for _ in range(num_blocks)]
        blocks[-1].recompute = network != "last_stored"
        return RevSequence(blocks, **SEQUENCES[network])
    if network == "functional":
        return keras.Sequential([block(norm=norm) for _ in range(num_blocks)])
    return keras.Sequential([block(RematBlock, norm) for _ in range(num_blocks)])


def build(network, num_blocks, jit_compile=False, norm="keras"):
    """Returns a compiled model with two streams of 32 channels, or a RevNet.

    Args:
        network: str, one of

            - `"sequence"`: one `RevSequence`.
            - `"last_stored"`: a sequence whose last block stores its activations.
            - `"fixed_point"`: a sequence with fixed-point streams.
            - `"ordinary"`: a sequence with ordinary backpropagation.
            - `"functional"`, `"sequential"`: blocks called one by one in such a model.
            - `"remat"`: plain blocks, each under `keras.remat`, which is
              `tf.recompute_grad`.
            - `"revnet"`, `"revnet_ordinary"`: networks with the widths of the paper's
              RevNet-110, with recomputation and with ordinary backpropagation.
        num_blocks: int, the number of blocks, for a RevNet that of each stage.
        jit_compile: bool, whether XLA compiles the training step.
        norm: str, key of `NORMS`, the batch normalization of a chain. A RevNet uses
            that of the library.
    """
    if network in REVNETS:
        model = models.RevNet(
            (num_blocks,) * 3,
            (32, 32, 64, 128),
            classifier_activation=None,
            recompute=network == "revnet",
        )
    elif network == "sequential":
        blocks = [block(norm=NORMS[norm]) for _ in range(num_blocks)]
        model = keras.Sequential([keras.Input((32, 32, 64)), *blocks, *head()])
    elif network in CHAINS:
        x = y = keras.Input((32, 32, 64))
        if network == "functional":
            for _ in range(num_blocks):
                y = block(norm=NORMS[norm])(y)
        else:
            y = chain(network, num_blocks, NORMS[norm])(y)
        for layer in head():
            y = layer(y)
        model = keras.Model(x, y)
    else:
        raise ValueError(
            f"network must be one of {CHAINS + REVNETS}; got network={network!r}."
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
    return model


def with_remat(model):
    """Returns a functional model with plain blocks under remat in its sequences."""

    def call(layer, *args, **kwargs):
        if not isinstance(layer, RevSequence):
            return layer(*args, **kwargs)
        (x,) = args
        for block in layer.blocks:
            x = RematBlock(block.f, block.g)(x)
        return x

    return keras.models.clone_model(model, call_function=call)


def head():
    return [layers.GlobalAveragePooling2D(), layers.Dense(10)]
