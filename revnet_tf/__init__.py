"""Reversible residual networks for Keras: backpropagation without stored activations.

Reference: Gomez et al., 2017, https://arxiv.org/abs/1707.04585
"""

import revnet_tf._backend  # noqa: F401  First, before Keras.
from revnet_tf import export, layers, memory, models, normalization, numerics, segments
from revnet_tf.layers import (
    ChannelPadding,
    DownsamplingBlock,
    PoolingShortcut,
    Recompute,
    RevBlock,
    RevSequence,
    SpaceToDepth,
)
from revnet_tf.segments import recompute

__version__ = "0.1.0"
__all__ = [
    "ChannelPadding",
    "DownsamplingBlock",
    "PoolingShortcut",
    "Recompute",
    "RevBlock",
    "RevSequence",
    "SpaceToDepth",
    "export",
    "layers",
    "memory",
    "models",
    "normalization",
    "numerics",
    "recompute",
    "segments",
]
