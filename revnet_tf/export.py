"""Export of a trained model: plain inference, checked after writing."""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata

import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from revnet_tf import saved_model_check
from revnet_tf._files import replacing

BATCH_SIZES = (1, 7, 32)


def export_saved_model(
    model, path, *, class_names=None, signatures=None, decode=None, card=None
):
    """Writes a model as a SavedModel that needs neither Keras nor this library.

    Its signatures have an open batch size and refuse an empty batch. The graph is the
    forward pass with `training=False`: it holds no gradient and nothing is recomputed.

    - `serving_default` takes the model's input, `inputs`, and returns `predictions`,
      the model's output, and, if `class_names` are given, of the largest prediction of
      each example the index, `class`, `(batch,)` int64, and the name, `class_name`,
      `(batch,)` strings.
    - One for each entry of `signatures` takes the same input.
    - `encoded`, if `decode` is given, takes JPEG or PNG files, `image_bytes`,
      `(batch,)` strings, and returns what `serving_default` does.

    Outputs of 16 bits, as under a mixed policy, leave as float32. Beside the graph lie
    a request for each signature with which TensorFlow Serving warms up, and
    `model_card.json`: name, number of parameters, signatures, class names, versions.

    The folder appears under its name only when it is complete, and a process of its own
    has loaded it and found it to give the answers of the model, as a graph and on a
    CPU, to 1e-5 of the largest, for batches of 1, 7 and 32.

    Args:
        model: built `keras.Model` with one input and one output.
        path: folder to write; it must not exist. TensorFlow Serving expects a number,
            the version, as its name.
        class_names: list of strings, one for each entry of the last axis of the
            output.
        signatures: dictionary from the name of a signature, which is that of its output
            too, to a tensor of the model, as
            `{"features": model.get_layer("avg_pool").output}`.
        decode: function of a TensorFlow graph from a file, `()` string, to an image of
            the model's input, `(height, width, channels)`; see `decode_image`.
        card: dictionary of what else `model_card.json` shall say.

    Raises:
        FileExistsError: there is something at `path` already.
        ValueError: the model is not built, has several inputs or outputs, or another
            number of outputs than `class_names`; `signatures` has a name that is taken.
        OSError, tf.errors.OpError: it cannot be written.
        RuntimeError: the written SavedModel does not reproduce the model's predictions,
            or its graph has a gradient.
    """
    path = os.path.normpath(os.fspath(path))
    spec = _validate(model, path)
    classes = model.outputs[0].shape[-1]
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"class_names has {len(class_names)} names, but {model.name} has {classes} "
            "outputs; give one name for each."
        )
    for name in signatures or ():
        if name in ("serving_default", "encoded"):
            raise ValueError(f"signatures has {name!r}, which is taken; rename it.")

    def predict(x):
        predictions = _answer(model, x)
        if class_names is None:
            return {"predictions": predictions}
        largest = tf.argmax(predictions, axis=-1)
        names = tf.gather(tf.constant(class_names), largest)
        return {"predictions": predictions, "class": largest, "class_name": names}

    endpoints = {"serving_default": (predict, spec)}
    for name, tensor in (signatures or {}).items():
        part = keras.Model(model.inputs, tensor, name=name)
        endpoints[name] = (_named(name, part), spec)
    if decode is not None:
        image = tf.TensorSpec(spec.shape[1:], spec.dtype)

        def predict_encoded(files):
            # One after the other fails at the first that is no image.
            return predict(tf.map_fn(decode, files, fn_output_signature=image))

        files = tf.TensorSpec((None,), tf.string, name="image_bytes")
        endpoints["encoded"] = (predict_encoded, files)

    archive = keras.export.ExportArchive()
    archive.track(model)
    functions = {
        name: archive.add_endpoint(name, _refusing(function, spec), [spec])
        for name, (function, spec) in endpoints.items()
    }
    specs = {name: spec for name, (_, spec) in endpoints.items()}
    with replacing(path) as part:
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        archive.write_out(str(part), options, verbose=False)
        _write_warmup(part, specs)
        _write_card(part, model, functions, specs, class_names, card or {})
        _check_saved_model(part, model, functions, specs)


def decode_image(shape):
    """Returns a function for `decode` that refuses images of another size.

    Args:
        shape: `(height, width, channels)` of the model's input, in `uint8`.
    """

    def decode(file):
        # Whatever the name of the operation says, it reads JPEG as well.
        return tf.ensure_shape(tf.io.decode_png(file, channels=shape[-1]), shape)

    return decode


def export_litert(model, path, *, representative_images=None):
    """Writes a model for LiteRT, the runtime of small devices (once TensorFlow Lite).

    Needs the extra `litert`. The file has one signature, `serving_default`, from the
    model's input to `predictions`, with an open batch size. It appears under its name
    only when LiteRT has given the answers of the model, to 1e-4 of the largest; with
    int8 arithmetic, with an error whose root mean square is less than half of the
    standard deviation of the answers to the representative images.

    Args:
        model: built `keras.Model` with one input and one output.
        path: file to write, `*.tflite`; it must not exist.
        representative_images: array of some hundred inputs, `(n, ...)`, in the dtype
            of the model's input: convert to int8 arithmetic, with the ranges that are
            found on them. Defaults to `None`, float32. (Fixed-point streams,
            `fraction_bits`, need more than 8 bits: what is written is not kept.)

    Raises:
        FileExistsError: there is something at `path` already.
        ImportError: the extra is not installed.
        ValueError: the model is not built, has several inputs or outputs; the name of
            the file has another ending; `representative_images` have another dtype
            than the input; the model computes in 16 bits, as under a mixed policy.
        OSError: it cannot be written.
        RuntimeError: the written file does not reproduce the model's predictions.
    """
    spec = _validate(model, path)
    litert = _extra("ai_edge_litert.interpreter", "litert")
    options = {}
    if representative_images is not None:
        images = representative_images
        if images.dtype != spec.dtype.as_numpy_dtype or not len(images):
            raise ValueError(
                f"representative_images are {len(images)} of {images.dtype}; give some "
                f"hundred of {spec.dtype.name}, as the input of {model.name}."
            )
        options = {
            "optimizations": [tf.lite.Optimize.DEFAULT],
            "representative_dataset": lambda: ([x[np.newaxis]] for x in images),
            "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
        }

    function = _graph(model, spec, "LiteRT", [tf.float16, tf.bfloat16])
    with replacing(path) as part:
        keras.Model(model.inputs, {"predictions": model.outputs[0]}).export(
            str(part), format="litert", input_signature=[spec], verbose=False, **options
        )
        run = litert.Interpreter(str(part)).get_signature_runner("serving_default")

        def predict(x):
            return run(inputs=x)["predictions"]

        if representative_images is None:
            _check_close(model, function, predict, spec)
        else:
            _check_quantized(model, function, predict, images)


def export_onnx(model, path):
    """Writes a model as an ONNX file, with the input and output of `export_litert`.

    Needs the extra `onnx`. The file appears under its name only when ONNX Runtime has
    given the answers of the model, to 1e-4 of the largest.

    Args:
        model: built `keras.Model` with one input and one output.
        path: file to write; it must not exist.

    Raises:
        As `export_litert`; float16 is no error.
    """
    spec = _validate(model, path)
    tf2onnx = _extra("tf2onnx", "onnx")
    onnx = _extra("onnx", "onnx")
    runtime = _extra("onnxruntime", "onnx")
    function = _graph(model, spec, "ONNX Runtime", [tf.bfloat16])
    proto, _ = tf2onnx.convert.from_function(function, [spec])
    # Tensors that a layer holds, as `Normalization` does, have become inputs.
    concrete = function.get_concrete_function()
    held = zip(concrete.inputs[1:], concrete.captured_inputs, strict=True)
    values = {tensor.name: value for tensor, value in held}
    used = {name for node in proto.graph.node for name in node.input}
    for argument in [x for x in proto.graph.input if x.name in values]:
        proto.graph.input.remove(argument)
        if argument.name in used:
            array = values[argument.name].numpy()
            constant = onnx.numpy_helper.from_array(array, argument.name)
            proto.graph.initializer.append(constant)
    with replacing(path) as part:
        onnx.save(proto, str(part))
        session = runtime.InferenceSession(
            str(part), providers=["CPUExecutionProvider"]
        )

        def predict(x):
            return session.run(["predictions"], {"inputs": x})[0]

        _check_close(model, function, predict, spec)


def _validate(model, path):
    """Returns the `tf.TensorSpec` of the model's input."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already; choose another path.")
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"{model.name} must be built and have one input and one output to be "
            "exported; build it as a functional or sequential model."
        )
    return tf.TensorSpec((None, *inputs[0].shape[1:]), inputs[0].dtype, name="inputs")


def _extra(module, extra):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is missing; install revnet-tf[{extra}]."
        ) from error


def _answer(model, x):
    y = model(x, training=False)
    return tf.cast(y, tf.float32) if y.dtype in (tf.float16, tf.bfloat16) else y


def _named(name, model):
    return lambda x: {name: _answer(model, x)}


def _refusing(function, spec):
    """Returns the function with checks of its argument, which servers leave to it."""

    def checked(x):
        filled = tf.debugging.Assert(
            tf.shape(x)[0] > 0, [f"{spec.name} is an empty batch; send an example."]
        )
        with tf.control_dependencies([filled]):
            return function(tf.ensure_shape(x, spec.shape))

    return checked


def _examples(specs, batch_size):
    """Returns a random argument for each signature."""
    rng = np.random.default_rng(batch_size)

    def inputs(dtype):
        # An open dimension, such as that of an image of any size, gets some size.
        sizes = [size or 32 for size in specs["serving_default"].shape[1:]]
        high = 256 if dtype.is_integer else 1
        x = rng.uniform(0, high, (batch_size, *sizes))
        return x.astype(dtype.as_numpy_dtype)

    return {
        name: np.array([tf.io.encode_png(x).numpy() for x in inputs(tf.uint8)])
        if spec.dtype == tf.string
        else inputs(spec.dtype)
        for name, spec in specs.items()
    }


def _write_warmup(folder, specs):
    """Writes the requests that TensorFlow Serving answers before it opens its door."""
    os.mkdir(os.path.join(folder, "assets.extra"))
    path = os.path.join(folder, "assets.extra", "tf_serving_warmup_requests")
    with tf.io.TFRecordWriter(path) as writer:
        for name, x in _examples(specs, 1).items():
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.signature_name = name
            request.inputs[specs[name].name].CopyFrom(tf.make_tensor_proto(x))
            writer.write(log.SerializeToString())


def _write_card(folder, model, functions, specs, class_names, card):
    def describe(specs):
        return {
            name: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}
            for name, spec in specs.items()
        }

    content = {
        "name": model.name,
        "num_parameters": model.count_params(),
        "class_names": class_names,
        "signatures": {
            name: {
                "inputs": describe({spec.name: spec}),
                "outputs": describe(
                    functions[name].get_concrete_function().structured_outputs
                ),
            }
            for name, spec in specs.items()
        },
        "versions": {
            "python": platform.python_version(),
            "revnet_tf": metadata.version("revnet_tf"),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        },
        **card,
    }
    with open(os.path.join(folder, "model_card.json"), "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def _check_saved_model(folder, model, functions, specs):
    arrays = {}
    for batch_size in BATCH_SIZES:
        for name, x in _examples(specs, batch_size).items():
            key = f"{name}/{batch_size}"
            arrays[f"{key}/inputs/{specs[name].name}"] = x
            with tf.device("CPU:0"):
                outputs = functions[name](tf.constant(x))
            for output, live in outputs.items():
                # Which of two equal predictions is the largest is chance.
                if output not in ("class", "class_name"):
                    arrays[f"{key}/outputs/{output}"] = live.numpy()
    with tempfile.TemporaryDirectory() as examples:
        examples = os.path.join(examples, "examples.npz")
        np.savez(examples, **arrays)
        # `-P`: the modules of this folder are not to be found beside the script.
        script = os.path.abspath(saved_model_check.__file__)
        done = subprocess.run(
            [sys.executable, "-P", script, folder, examples],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(
            f"The SavedModel of {model.name} was not kept: "
            f"{(done.stderr.strip() or 'its check was ended').splitlines()[-1]}"
        )


def _graph(model, spec, runtime, refused):
    """Returns the model as a function of a graph, if the runtime has its numbers."""
    function = tf.function(
        lambda inputs: {"predictions": _answer(model, inputs)}, [spec], autograph=False
    )
    operations = function.get_concrete_function().graph.get_operations()
    found = {tensor.dtype for operation in operations for tensor in operation.outputs}
    for dtype in refused:
        if dtype in found:
            raise ValueError(
                f"{model.name} computes in {dtype.name}, which {runtime} does not; "
                "build it under the dtype policy 'float32' and load its weights."
            )
    return function


def _live(function, x):
    """Returns the model's answers on the CPU, where those of the file come from."""
    with tf.device("CPU:0"):
        return function(tf.constant(x))["predictions"].numpy()


def _check_close(model, function, predict, spec):
    for batch_size in BATCH_SIZES:
        x = _examples({"serving_default": spec}, batch_size)["serving_default"]
        live, written = _live(function, x), predict(x)
        difference = np.abs(written - live).max()
        # Kernels of another library add up in another order.
        if not difference <= 1e-4 * max(1.0, np.abs(live).max()):
            raise RuntimeError(
                f"The exported {model.name} differs from the model by {difference:.3g} "
                f"on a batch of {batch_size}; it was not kept."
            )


def _check_quantized(model, function, predict, images):
    batches = [images[i : i + 32] for i in range(0, len(images), 32)]
    live = np.concatenate([_live(function, x) for x in batches])
    error = np.concatenate([predict(x) for x in batches]) - live
    error, deviation = np.sqrt(np.mean(error**2)), np.std(live - live.mean(0))
    if not error < deviation / 2:
        raise RuntimeError(
            f"The int8 {model.name} was not kept: its predictions are off by "
            f"{error:.3g}, where those of the model vary by {deviation:.3g}."
        )
