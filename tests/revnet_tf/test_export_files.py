"""LiteRT and ONNX files give the model's answers, or do not exist."""

import os
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from revnet_tf import RevBlock, models
from revnet_tf.export import export_litert, export_onnx, export_saved_model

WRITERS = {"model.tflite": export_litert, "model.onnx": export_onnx}


def ask(path, x):
    """Returns the predictions of a file."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return session.run(["predictions"], {"inputs": x})[0]
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    return runner(inputs=x)["predictions"]


def dense_model(layer=None):
    x = keras.Input((4,))
    return keras.Model(x, (layer or keras.layers.Dense(2))(x))


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("name", WRITERS)
def test_file_answers_as_a_model_with_streams_of_floats_and_its_own_constants(
    tmp_path, name
):
    x = keras.Input((8, 8, 3))
    # A constant larger than those that TensorFlow writes into a graph.
    mean = np.linspace(-1, 1, 8 * 8 * 3).reshape(8, 8, 3)
    y = keras.layers.Normalization((1, 2, 3), mean=mean, variance=mean**2 + 1)(x)
    network = models.RevNet((2, 2), (8, 8, 16), input_shape=(8, 8, 3), classes=4)
    model = keras.Model(x, network(y))
    WRITERS[name](model, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    x = random(5, 8, 8, 3)
    live = model.predict(x, verbose=0)
    np.testing.assert_allclose(ask(tmp_path / name, x), live, atol=1e-4)


@pytest.mark.thorough
def test_fixed_point_streams_are_served_and_never_leave_their_range_in_silence(
    tmp_path,
):
    block = RevBlock(keras.layers.Dense(2), keras.layers.Dense(2), fraction_bits=14)
    model = dense_model(block)
    x, too_large = random(5, 4), np.full((5, 4), 2000, "float32")  # of 2**10
    live = model.predict(x, verbose=0)
    for name, write in WRITERS.items():
        write(model, tmp_path / name)
        # A sum in another order can round to the next multiple.
        np.testing.assert_allclose(ask(tmp_path / name, x), live, atol=2**-13)
        assert np.isnan(ask(tmp_path / name, too_large)).all()
    export_saved_model(model, tmp_path / "1")
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    np.testing.assert_allclose(serve(inputs=x)["predictions"], live, atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a stream within"):
        serve(inputs=tf.constant(too_large))


@pytest.mark.parametrize(
    "name, dtype", [("model.tflite", "float16"), ("model.onnx", "bfloat16")]
)
def test_dtypes_that_the_runtime_does_not_have_are_refused(tmp_path, name, dtype):
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    with pytest.raises(ValueError, match=f"computes in {dtype}, which .* does not"):
        WRITERS[name](dense_model(), tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_existing_file_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        WRITERS[name](dense_model(), tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "name, module, extra",
    [
        ("model.tflite", "ai_edge_litert.interpreter", "litert"),
        ("model.onnx", "tf2onnx", "onnx"),
        ("model.onnx", "onnxruntime", "onnx"),
    ],
)
def test_missing_extra_is_named(tmp_path, monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"Install revnet-tf\[{extra}\]"):
        WRITERS[name](dense_model(), tmp_path / name)
    assert not os.listdir(tmp_path)


def test_litert_file_that_differs_is_not_written(tmp_path):
    class Unsteady(keras.layers.Layer):
        """A layer with another answer in every graph."""

        def call(self, x):
            return x + np.random.default_rng().uniform()

    with pytest.raises(RuntimeError, match="differs from the model"):
        export_litert(dense_model(Unsteady()), tmp_path / "model.tflite")
    assert not os.listdir(tmp_path)


def test_onnx_file_that_differs_is_not_written(tmp_path, monkeypatch):
    save = onnx.save

    def save_other_weights(proto, path):
        for weight in proto.graph.initializer:
            array = onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(array + 1, weight.name))
        save(proto, path)

    monkeypatch.setattr(onnx, "save", save_other_weights)
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_onnx(dense_model(), tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)


def test_int8_file_of_ranges_that_do_not_fit_is_not_written(tmp_path):
    class Steep(keras.layers.Layer):
        """A layer whose differences are far below the resolution of 8 bits."""

        def call(self, x):
            return (x * 1e-4 + 1e4) - 1e4

    with pytest.raises(RuntimeError, match="int8 .* was not written.*are off by"):
        export_litert(
            dense_model(Steep()),
            tmp_path / "model.tflite",
            representative_images=1e3 * random(50, 4),
        )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("images", [random(0, 4), random(3, 4).astype("float64")])
def test_representative_images_of_another_kind_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="some hundred of float32"):
        export_litert(
            dense_model(), tmp_path / "model.tflite", representative_images=images
        )
    assert not os.listdir(tmp_path)
