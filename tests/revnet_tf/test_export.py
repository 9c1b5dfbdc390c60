"""A SavedModel is complete, right and plain, or it is not there."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import conv_sequence, images

from revnet_tf import models
from revnet_tf.export import export_saved_model


def small_model(**kwargs):
    return models.RevNet((1, 1), (8, 8, 16), input_shape=(8, 8, 3), classes=4, **kwargs)


def test_exported_model_predicts_the_same_in_a_process_without_this_project(tmp_path):
    model = small_model()
    export_saved_model(model, tmp_path / "1", class_names=["a", "b", "c", "d"])
    for batch_size in (1, 7):
        np.save(tmp_path / f"x{batch_size}.npy", images(batch_size, 8, 8, 3))
        np.save(tmp_path / f"y{batch_size}.npy", model(images(batch_size, 8, 8, 3)))
    script = """
import sys, numpy as np, tensorflow as tf
serve = tf.saved_model.load("1").signatures["serving_default"]
for n in (1, 7):
    result = serve(inputs=tf.constant(np.load(f"x{n}.npy")))
    y = np.load(f"y{n}.npy")
    np.testing.assert_allclose(result["predictions"], y, atol=1e-5)
    assert [b"abcd"[i:i + 1] for i in y.argmax(1)] == list(result["class_name"].numpy())
assert "revnet_tf" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_exported_graph_is_the_forward_pass_only(tmp_path):
    model = small_model()
    export_saved_model(model, tmp_path / "1")
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    function = loaded.signatures["serving_default"]
    definition = function.graph.as_graph_def()
    ops = [n.op for f in definition.library.function for n in f.node_def]
    convolutions = sum(
        isinstance(x, keras.layers.Conv2D) for x in model._flatten_layers()
    )
    assert ops.count("Conv2D") == convolutions
    assert not [op for op in ops if op == "IdentityN" or "Backprop" in op]


def test_users_own_model_of_blocks_is_exported(tmp_path):
    x = keras.Input((6, 6, 8))
    model = keras.Model(x, conv_sequence()(x))
    export_saved_model(model, tmp_path / "1")
    assert (tmp_path / "1" / "saved_model.pb").exists()


def test_existing_path_is_refused_and_left_alone(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_saved_model(small_model(), tmp_path / "1")
    assert os.listdir(tmp_path) == ["1"]
    assert os.listdir(tmp_path / "1") == ["mine"]


def test_wrong_number_of_class_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 names.*4 outputs"):
        export_saved_model(small_model(), tmp_path / "1", class_names=["a", "b"])
    assert not os.listdir(tmp_path)


def test_model_that_was_never_built_is_refused(tmp_path):
    class Unbuilt(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="must be built"):
        export_saved_model(Unbuilt(), tmp_path / "1")


def test_saved_model_that_differs_is_not_kept(tmp_path):
    class Unsteady(keras.layers.Layer):
        """Answers otherwise every time, as a layer does that ignores `training`."""

        def call(self, x):
            return x + tf.random.uniform(())

    x = keras.Input((4,))
    model = keras.Model(x, Unsteady()(x))
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_saved_model(model, tmp_path / "1")
    assert not os.listdir(tmp_path)
