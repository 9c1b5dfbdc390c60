"""Refuses all backends of Keras except TensorFlow, before the import of Keras."""

import json
import os
import sys


def chosen() -> str:
    """Returns the backend of Keras, also if Keras is not imported yet.

    `import keras` fails if the modules of its backend are missing. The function
    therefore reads the backend where Keras reads it.
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
        "Expected Keras with the backend 'tensorflow'; Keras uses "
        f"{chosen()!r}. Set the environment variable KERAS_BACKEND=tensorflow before "
        'Keras is imported, or "backend": "tensorflow" in keras.json.'
    )
