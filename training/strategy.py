"""Which `tf.distribute` strategy a run is trained under."""

import tensorflow as tf


def get_strategy(name):
    """Returns the strategy of that name.

    Args:
        name: `"single"` (one device), `"mirrored"` (every GPU of this machine, or
            every logical CPU where there is none), or `"auto"` (mirrored where there
            are several GPUs, single elsewhere).
    """
    gpus = tf.config.list_logical_devices("GPU")
    if name == "single" or (name == "auto" and len(gpus) < 2):
        return tf.distribute.get_strategy()
    if name in ("auto", "mirrored"):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy(devices)
    raise ValueError(f"strategy={name!r}: use 'auto', 'single' or 'mirrored'.")
