"""Export of a trained model for inference. Each file is checked after writing."""

import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata

import keras
import numpy as np
import tensorflow as tf

from revnet_tf import _examples, _saved_model_check
from revnet_tf._files import replacing

__all__ = ["decode_image", "export_litert", "export_onnx", "export_saved_model"]

# The largest difference between a file and the live model, relative to the largest
# value. Kernels of other runtimes compute sums in another order.
TOLERANCE = 1e-4


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    class_names: list[str] | None = None,
    signatures: dict | None = None,
    decode: Callable | None = None,
    card: dict | None = None,
    examples: np.ndarray | None = None,
) -> None:
    """Writes a model as a SavedModel that needs neither Keras nor this library.

    The SavedModel has these signatures:

    - `serving_default` maps `inputs`, the model's input, to `predictions`, the model's
      output. With `class_names` it also returns the index of the largest prediction of
      each example, `class`, `(batch,)` int64, and its name, `class_name`, `(batch,)`
      strings.
    - Each entry of `signatures` gives a signature with the same input.
    - `encoded` maps JPEG or PNG files, `image_bytes`, `(batch,)` strings, to the
      outputs of `serving_default`. It exists if `decode` is given.

    The signatures take batches of any size and refuse an empty batch. Their graph is
    the forward pass with `training=False`. It has no gradient and recomputes nothing.
    Outputs of 16 bits, as under a mixed policy, become float32.

    The folder also has `model_card.json`, with name, number of parameters, signatures,
    class names and versions. With the extra `serving`, the folder also has a request
    for each signature, with which TensorFlow Serving warms up.

    The folder appears under its name after its check. A process of its own loads it on
    a CPU and compares its answers with those of the model, for batches of 1, 7 and 32.
    The answers may differ by 1e-5 of the largest value.

    Args:
        model: `keras.Model` with weights, one input and one output. Call a subclassed
            model first.
        path: path of the new folder; it must not exist. TensorFlow Serving expects a
            number, the version, as its name.
        class_names: list of strings, one for each entry of the last axis of the
            output. Defaults to `None`.
        signatures: dict from the name of a signature to a tensor of the model, such as
            `{"features": model.get_layer("avg_pool").output}`. The output of the
            signature has the same name. Defaults to `None`.
        decode: function of a TensorFlow graph, maps a file, `()` string, to an image of
            the model's input, `(height, width, channels)`; see `decode_image`. Defaults
            to `None`.
        card: dict, further entries of `model_card.json`. Defaults to `None`.
        examples: array, a batch of real inputs for the check and the warm-up. Defaults
            to `None`: the function draws random inputs that suit the first layers of
            the model. If the model answers none of them, the function warns and skips
            the check.

    Raises:
        FileExistsError: `path` exists already.
        ValueError: the model has no weights, several inputs or several outputs, or does
            not take `examples`. Or `class_names` has another length than the output. Or
            a name in `signatures` is taken.
        OSError, tf.errors.OpError: the folder cannot be written.
        RuntimeError: the written SavedModel does not reproduce the model's predictions,
            or its graph has a gradient.
    """
    path = os.path.normpath(os.fspath(path))
    model, spec, examples = _validate(model, path, examples)
    classes = model.outputs[0].shape[-1]
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"Expected a name for each output of {model.name}; class_names has "
            f"{len(class_names)} names for {classes} outputs. Give one name for each."
        )
    for name in signatures or ():
        if name in ("serving_default", "encoded"):
            raise ValueError(
                f"Expected new names in signatures; got {name!r}, which is taken. "
                "Rename it."
            )

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
            # `map_fn` fails at the first file without an image.
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
    batches = _examples.batches(
        model, spec, _live(functions["serving_default"]), examples
    )
    with replacing(path) as part:
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        archive.write_out(str(part), options, verbose=False)
        _write_warmup(part, specs, batches[:1])
        _write_card(part, model, functions, specs, class_names, card or {})
        _check_saved_model(part, model, functions, specs, batches)


def decode_image(shape: tuple[int, int, int]) -> Callable:
    """Returns a function for `decode` that refuses images of another size.

    Args:
        shape: tuple `(height, width, channels)`, the shape of the model's `uint8`
            input.
    """

    def decode(file):
        # The operation also reads JPEG.
        return tf.ensure_shape(tf.io.decode_png(file, channels=shape[-1]), shape)

    return decode


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    representative_images: np.ndarray | None = None,
    examples: np.ndarray | None = None,
) -> None:
    """Writes a model for LiteRT, the runtime of small devices (once TensorFlow Lite).

    The function needs the extra `litert`. The file has one signature,
    `serving_default`, from the model's input to `predictions`, for batches of any size.

    The file appears under its name if LiteRT gives the answers of the model, to 1e-4 of
    the largest value. With int8 arithmetic the root mean square of the error must be
    less than half of the standard deviation of the answers.

    Some layers, such as GRU, need operations of TensorFlow (Flex operations). LiteRT's
    interpreter for Python does not have them. The function then writes the file with a
    warning and without a check.

    Args:
        model: `keras.Model` with weights, one input and one output. Call a subclassed
            model first.
        path: path of the new file, `*.tflite`; it must not exist.
        representative_images: array of some hundred inputs, `(n, ...)`, in the dtype
            of the model's input. The file then uses int8 arithmetic, with the ranges of
            values on these inputs. Fixed-point streams, `fraction_bits`, need more than
            8 bits and fail the check. Defaults to `None`, float32 arithmetic.
        examples: array, a batch of real inputs for the check. Defaults to `None`: with
            int8 arithmetic the representative images, otherwise random inputs that suit
            the first layers of the model. If the model answers no random input, the
            function warns and skips the check.

    Raises:
        FileExistsError: `path` exists already.
        ImportError: the extra is not installed.
        ValueError: the model has no weights, several inputs or several outputs, or does
            not take `examples`. Or it computes in 16 bits, as under a mixed policy. Or
            the name of the file has another ending. Or `representative_images` have
            another dtype than the input.
        OSError: the file cannot be written.
        RuntimeError: the written file does not reproduce the model's predictions.
    """
    model, spec, examples = _validate(model, path, examples)
    litert = _extra("ai_edge_litert.interpreter", "litert")
    options = {}
    if representative_images is not None:
        images = representative_images
        if images.dtype != spec.dtype.as_numpy_dtype or not len(images):
            raise ValueError(
                "Expected representative_images of the input's dtype, "
                f"{spec.dtype.name}; got {len(images)} of {images.dtype}. Give some "
                f"hundred of {spec.dtype.name} to {model.name}."
            )
        options = {
            "optimizations": [tf.lite.Optimize.DEFAULT],
            "representative_dataset": lambda: ([x[np.newaxis]] for x in images),
            "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
        }

    function = _graph(model, spec, "LiteRT", [tf.float16, tf.bfloat16])
    if representative_images is None:
        batches = _examples.batches(model, spec, _live(function), examples)
    with replacing(path) as part:
        keras.Model(model.inputs, {"predictions": model.outputs[0]}).export(
            str(part), format="litert", input_signature=[spec], verbose=False, **options
        )
        if flex := _flex_operations(part):
            warnings.warn(
                f"{path} is not checked. It needs {', '.join(flex)}, operations that "
                "LiteRT's interpreter for Python does not have. Link the Flex delegate "
                "where the file runs.",
                stacklevel=2,
            )
            return
        run = litert.Interpreter(str(part)).get_signature_runner("serving_default")

        def predict(x):
            return run(inputs=x)["predictions"]

        if representative_images is None:
            _check_close(model, function, predict, batches)
        else:
            given = representative_images if examples is None else examples
            _check_quantized(model, function, predict, given)


def export_onnx(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    examples: np.ndarray | None = None,
) -> None:
    """Writes a model as an ONNX file, with the input and output of `export_litert`.

    The function needs the extra `onnx`. The file appears under its name if ONNX Runtime
    gives the answers of the model, to 1e-4 of the largest value.

    A model that computes in float16, as under a mixed policy, has a larger tolerance,
    that of its own rounding. It is the spacing of float16 values, times the square root
    of the number of operations in float16.

    Args:
        model: `keras.Model` with weights, one input and one output. Call a subclassed
            model first.
        path: path of the new file; it must not exist.
        examples: array, a batch of real inputs for the check. Defaults to `None`: the
            function draws random inputs that suit the first layers of the model. If the
            model answers none of them, the function warns and skips the check.

    Raises:
        FileExistsError: `path` exists already.
        ImportError: the extra is not installed.
        ValueError: the model has no weights, several inputs or several outputs, or does
            not take `examples`. Or it computes in bfloat16, or looks values up in a
            table.
        OSError: the file cannot be written.
        RuntimeError: the written file does not reproduce the model's predictions.
    """
    model, spec, examples = _validate(model, path, examples)
    tf2onnx = _extra("tf2onnx", "onnx")
    onnx = _extra("onnx", "onnx")
    runtime = _extra("onnxruntime", "onnx")
    function = _graph(model, spec, "ONNX Runtime", [tf.bfloat16])
    if any(op.type.startswith("LookupTable") for op in _operations(function)):
        raise ValueError(
            f"Expected a model without lookups; {model.name} looks values up in a "
            "table, which an ONNX file cannot hold. Export the part of it without its "
            "lookup and text layers."
        )
    batches = _examples.batches(model, spec, _live(function), examples)
    proto, _ = tf2onnx.convert.from_function(function, [spec])
    # The converter turns tensors that a layer holds, such as those of `Normalization`,
    # into inputs. They become constants here.
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
        session = runtime.InferenceSession(part, providers=["CPUExecutionProvider"])

        def predict(x):
            return session.run(["predictions"], {"inputs": x})[0]

        _check_close(model, function, predict, batches)


def _validate(model, path, examples):
    """Returns a functional model, the `tf.TensorSpec` of its input, and the examples.

    A subclassed model becomes a layer of a functional model.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"Expected a new path; {path} exists already. Change it.")
    if model.built and not hasattr(model, "inputs"):
        model = _functional(model, examples)
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"The model must be built and have one input and one output; {model.name} "
            "is not such a model. Build it as a functional or sequential model, or "
            "call it."
        )
    spec = tf.TensorSpec(inputs[0].shape, inputs[0].dtype, name="inputs")
    if examples is not None:
        examples = _examples.given(examples, spec)
    return model, spec, examples


def _functional(model, examples):
    """Returns a subclassed model as a functional one, for inputs like the examples.

    Without examples, the inputs have the shape that built the model.
    """
    if examples is not None:
        shape, dtype = np.shape(examples), tf.as_dtype(np.asarray(examples).dtype).name
    else:
        config = model.get_build_config() or {}
        shape, dtype = config.get("input_shape"), model.input_dtype
    if not isinstance(shape, (list, tuple)) or any(
        isinstance(size, (list, tuple)) for size in shape
    ):
        return model
    x = keras.Input(batch_shape=(None, *shape[1:]), dtype=dtype)
    return keras.Model(x, model(x, training=False), name=model.name)


def _extra(module, extra):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Expected the module {module}; it is missing. Install revnet-tf[{extra}]."
        ) from error


def _answer(model, x):
    (y,) = tf.nest.flatten(model(x, training=False))
    return tf.cast(y, tf.float32) if y.dtype in (tf.float16, tf.bfloat16) else y


def _named(name, model):
    return lambda x: {name: _answer(model, x)}


def _refusing(function, spec):
    """Returns the function with checks of its argument. Servers do not check it."""

    def checked(x):
        filled = tf.debugging.Assert(
            tf.shape(x)[0] > 0,
            [f"Expected an example; {spec.name} is an empty batch. Send an example."],
        )
        with tf.control_dependencies([filled]):
            return function(tf.ensure_shape(x, spec.shape))

    return checked


def _write_warmup(folder, specs, batches):
    """Writes the requests with which TensorFlow Serving warms up.

    Writes none without `tensorflow-serving-api`, which has the messages.
    """
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError:
        return
    for x in batches:
        os.mkdir(os.path.join(folder, "assets.extra"))
        path = os.path.join(folder, "assets.extra", "tf_serving_warmup_requests")
        with tf.io.TFRecordWriter(path) as writer:
            for name, argument in _arguments(specs, x).items():
                log = prediction_log_pb2.PredictionLog()
                request = log.predict_log.request
                request.model_spec.signature_name = name
                request.inputs[specs[name].name].CopyFrom(
                    tf.make_tensor_proto(argument)
                )
                writer.write(log.SerializeToString())


def _arguments(specs, x):
    """Returns the argument of each signature for a batch of inputs."""
    return {name: _examples.encoded(x) if name == "encoded" else x for name in specs}


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


def _check_saved_model(folder, model, functions, specs, batches):
    arrays = {}
    for x in batches:
        for name, argument in _arguments(specs, x).items():
            key = f"{name}/{len(x)}"
            arrays[f"{key}/inputs/{specs[name].name}"] = argument
            with tf.device("CPU:0"):
                outputs = functions[name](tf.constant(argument))
            for output, live in outputs.items():
                # Of two equal predictions, rounding decides the largest one.
                if output not in ("class", "class_name"):
                    arrays[f"{key}/outputs/{output}"] = live.numpy()
    with tempfile.TemporaryDirectory() as examples:
        examples = os.path.join(examples, "examples.npz")
        np.savez(examples, **arrays)
        # `-P` hides the modules in the folder of the script.
        script = os.path.abspath(_saved_model_check.__file__)
        done = subprocess.run(
            [sys.executable, "-P", script, folder, examples],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(
            f"The SavedModel of {model.name} was not written. Its check failed: "
            f"{(done.stderr.strip() or 'its process was ended').splitlines()[-1]}"
        )


def _graph(model, spec, runtime, refused):
    """Returns the model as a `tf.function`, if the runtime has the dtypes in it."""
    function = tf.function(
        lambda inputs: {"predictions": _answer(model, inputs)}, [spec], autograph=False
    )
    found = {t.dtype for operation in _operations(function) for t in operation.outputs}
    for dtype in refused:
        if dtype in found:
            raise ValueError(
                f"Expected a model in float32; {model.name} computes in {dtype.name}, "
                f"which {runtime} does not. Build it under the dtype policy 'float32' "
                "and load its weights."
            )
    return function


def _operations(function):
    return function.get_concrete_function().graph.get_operations()


def _tolerance(function):
    """Returns the largest difference to allow. In float16 it is that of its rounding.

    One rounding changes a value by at most half of `eps`, the spacing of values near 1.
    `n` independent roundings add up to less than `eps * sqrt(n)`.
    """
    roundings = sum(
        any(t.dtype == tf.float16 for t in operation.outputs)
        for operation in _operations(function)
    )
    return max(TOLERANCE, float(np.finfo(np.float16).eps) * math.sqrt(roundings))


def _flex_operations(path):
    """Returns the names of the Flex operations in a LiteRT file."""
    found = re.findall(rb"Flex[A-Z]\w{3,}", path.read_bytes())
    return sorted({name.decode() for name in found})


def _live(function):
    """Returns a function from a batch to the model's answers on the CPU."""

    def answer(x):
        with tf.device("CPU:0"):
            return function(tf.constant(x))["predictions"].numpy()

    return answer


def _check_close(model, function, predict, batches):
    live, tolerance = _live(function), _tolerance(function)
    for x in batches:
        fault = _saved_model_check.find_fault(predict(x), live(x), tolerance)
        if fault:
            raise RuntimeError(
                f"The exported {model.name} was not written, because on a batch of "
                f"{len(x)} it {fault}."
            )


def _check_quantized(model, function, predict, images):
    batches = [images[i : i + 32] for i in range(0, len(images), 32)]
    live = np.concatenate([*map(_live(function), batches)])
    error = np.concatenate([*map(predict, batches)]) - live
    error, deviation = np.sqrt(np.mean(error**2)), np.std(live - live.mean(0))
    if not error < deviation / 2:
        raise RuntimeError(
            f"The int8 {model.name} was not written, because its predictions are off "
            f"by {error:.3g}, and those of the model vary by {deviation:.3g}. Use "
            "float32 arithmetic."
        )
