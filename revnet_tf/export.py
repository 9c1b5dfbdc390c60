"""Export of a trained model as a SavedModel: plain inference, checked after writing."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import tensorflow as tf


def export_saved_model(model, path, *, class_names=None):
    """Writes a model as a SavedModel that needs neither Keras nor this library.

    The SavedModel has one signature, `serving_default`. It takes the model's input,
    with the batch size open, and returns a dictionary: `predictions`, the model's
    output, and, if `class_names` are given, `class_name`, the name of the largest
    prediction of each example, `(batch,)` strings. The graph is the forward pass with
    `training=False`: it holds no custom gradient of this library.

    The folder appears under its name only when it is complete and has been loaded and
    found to give the model's own predictions.

    Args:
        model: built `keras.Model` with one input and one output.
        path: folder to write; it must not exist.
        class_names: list of strings, one for each entry of the last axis of the
            output.

    Raises:
        FileExistsError: there is something at `path` already.
        ValueError: the model is not built, has several inputs or outputs, or another
            number of outputs than `class_names`.
        RuntimeError: the written SavedModel does not reproduce the model's predictions.
    """
    path = os.path.normpath(os.fspath(path))
    if os.path.exists(path):
        raise FileExistsError(f"{path} exists already; choose another path.")
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"{model.name} must be built and have one input and one output to be "
            "exported; build it as a functional or sequential model."
        )
    classes = model.outputs[0].shape[-1]
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"class_names has {len(class_names)} names, but {model.name} has {classes} "
            "outputs; give one name for each."
        )

    def serve(x):
        predictions = model(x, training=False)
        if class_names is None:
            return {"predictions": predictions}
        names = tf.gather(tf.constant(class_names), tf.argmax(predictions, axis=-1))
        return {"predictions": predictions, "class_name": names}

    # Beside the target, so that the rename stays within one file system.
    partial = f"{path}.partial-{os.getpid()}"
    spec = tf.TensorSpec((None, *inputs[0].shape[1:]), inputs[0].dtype, name="inputs")
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve, input_signature=[spec])
    try:
        archive.write_out(partial, verbose=False)
        # In another thread, which no `strategy.scope()` is open in: under one, what is
        # loaded would be distributed.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_check, model, partial, spec).result()
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(model, path, spec):
    serve = tf.saved_model.load(path).signatures["serving_default"]
    rng = np.random.default_rng(0)
    for batch_size in (1, 3):
        # An open dimension, such as that of an image of any size, gets some size.
        shape = (batch_size, *(size or 32 for size in spec.shape[1:]))
        x = tf.cast(
            rng.uniform(0, 255 if spec.dtype.is_integer else 1, shape), spec.dtype
        )
        live = tf.cast(model(x, training=False), tf.float32)
        written = tf.cast(serve(inputs=x)["predictions"], tf.float32)
        # The same kernels in eager and in graph mode, fused otherwise.
        difference = float(tf.reduce_max(tf.abs(live - written)))
        tolerance = 1e-5 if model.compute_dtype in ("float32", "float64") else 1e-2
        if not difference <= tolerance * max(1.0, float(tf.reduce_max(tf.abs(live)))):
            raise RuntimeError(
                f"The SavedModel of {model.name} differs from the model by "
                f"{difference:.3g} on a batch of {batch_size}; it was not kept."
            )
