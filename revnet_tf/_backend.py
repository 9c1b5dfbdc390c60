"""Refuses another backend of Keras than TensorFlow, before Keras is imported."""

import json
import os
import sys


def chosen() -> str:
    """Returns the backend that Keras has chosen, or chooses once it is imported.

    `import keras` fails if the modules of its backend are missing. The backend is
    therefore read from the places where Keras reads it.
    """
    if keras := sys.modules.get("keras"):
        return keras.config.backend()
    if backend := os.environ.get("KERAS_BACKEND"):
        return backend
    home = os.path.expanduser("~")
    base = home if os.access(home, os.W_OK) else "/tmp"
    folder = os.environ.get("KERAS_HOME", os.path.join(base, ".keras"))
    try:
        with open(os.path.expanduser(os.path.join(folder, "keras.json"))) as file:
            return json.load(file)["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


if chosen() != "tensorflow":
    raise ImportError(
        "revnet_tf needs Keras with the backend 'tensorflow', and Keras uses "
        f"{chosen()!r}: set the environment variable KERAS_BACKEND=tensorflow before "
        'Keras is imported, or "backend": "tensorflow" in keras.json.'
    )
