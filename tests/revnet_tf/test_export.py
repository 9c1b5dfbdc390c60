"""A SavedModel is complete, right and plain, or it does not exist."""

import collections
import json
import os
import resource
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2
from twins import conv_sequence, images

import revnet_tf
from revnet_tf import RevBlock, export, models
from revnet_tf.export import decode_image, export_saved_model

NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PNG, JPEG = tf.io.encode_png(NOISE).numpy(), tf.io.encode_jpeg(NOISE).numpy()


def small_model(**kwargs):
    kwargs.setdefault("input_shape", (8, 8, 3))
    return models.RevNet((1, 1), (8, 8, 16), classes=4, **kwargs)


def test_exported_model_predicts_the_same_in_a_process_without_this_project(tmp_path):
    model = small_model()
    export_saved_model(model, tmp_path / "1", class_names=["a", "b", "c", "d"])
    for batch_size in (1, 7, 32):
        np.save(tmp_path / f"x{batch_size}.npy", images(batch_size, 8, 8, 3))
        np.save(tmp_path / f"y{batch_size}.npy", model(images(batch_size, 8, 8, 3)))
    script = """
import sys, numpy as np, tensorflow as tf
serve = tf.saved_model.load("1").signatures["serving_default"]
for n in (1, 7, 32):
    result = serve(inputs=tf.constant(np.load(f"x{n}.npy")))
    y = np.load(f"y{n}.npy")
    np.testing.assert_allclose(result["predictions"], y, atol=1e-5)
    assert [b"abcd"[i:i + 1] for i in y.argmax(1)] == list(result["class_name"].numpy())
assert "revnet_tf" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def ops_of(path, name="serving_default"):
    """Returns the count of each operation in the graph of a signature."""
    signature = tf.saved_model.load(str(path)).signatures[name]
    # Only the functions that this graph calls, not those of other signatures.
    definition = signature.graph.as_graph_def()
    functions = {f.signature.name: f.node_def for f in definition.library.function}
    counts, todo = collections.Counter(), [definition.node]
    while todo:
        for node in todo.pop():
            counts[node.op] += 1
            todo += [functions[v.func.name] for v in node.attr.values() if v.func.name]
    return counts


@pytest.mark.parametrize(
    "network, convolutions, blocks",
    [
        pytest.param("RevNet38", 37, 9, marks=pytest.mark.thorough),
        pytest.param("RevNet110", 109, 27, marks=pytest.mark.slow),
    ],
)
def test_exported_graph_is_the_forward_pass_and_that_of_the_plain_twin(
    tmp_path, network, convolutions, blocks
):
    build = getattr(models, network)
    pair = [build(recompute=recompute) for recompute in (True, False)]
    # No check in a process of its own, because the test compares graphs only.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_check_saved_model", lambda *_: None)
        for i, model in enumerate(pair):
            export_saved_model(model, tmp_path / f"{i}")
    ops, twin = ops_of(tmp_path / "0"), ops_of(tmp_path / "1")
    assert ops == twin
    kinds = collections.Counter(type(x).__name__ for x in pair[0]._flatten_layers())
    assert ops["Conv2D"] == kinds["Conv2D"] == convolutions
    assert ops["Relu"] == kinds["ReLU"]
    assert ops["Rsqrt"] == kinds["BatchNormalization"]
    assert ops["MatMul"] == kinds["Dense"] == 1
    assert ops["AddN"] == 2 * blocks  # A block adds once to each stream.
    assert not [op for op in ops if "Grad" in op or "Backprop" in op or op == "While"]


@pytest.mark.thorough
def test_branch_with_a_custom_gradient_of_its_own_leaves_it_behind(tmp_path):
    x = keras.Input((8,))
    block = RevBlock(
        keras.layers.Dense(4, "swish"), keras.layers.Dense(4, activation="swish")
    )
    export_saved_model(keras.Model(x, block(x)), tmp_path / "1")
    definition = saved_model_pb2.SavedModel.FromString(
        (tmp_path / "1" / "saved_model.pb").read_bytes()
    )
    library = definition.meta_graphs[0].graph_def.library
    assert library.function
    assert not library.gradient and not library.registered_gradients


@pytest.mark.thorough
def test_graph_with_an_operation_of_a_gradient_is_not_written(tmp_path):
    @keras.saving.register_keras_serializable("test")
    class Slope(keras.layers.Layer):
        def call(self, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.tanh(x)
            return tape.gradient(y, x)

    x = keras.Input((4,))
    with pytest.raises(RuntimeError, match="has gradients: TanhGrad"):
        export_saved_model(keras.Model(x, Slope()(x)), tmp_path / "1")
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def uint8_export(tmp_path_factory):
    """A model of `uint8` images, and its SavedModel with all signatures."""
    path = tmp_path_factory.mktemp("export") / "1"
    x = keras.Input((8, 8, 3), dtype="uint8")
    y = keras.layers.Rescaling(1 / 255)(x)
    model = small_model(input_tensor=y)
    export_saved_model(
        model,
        path,
        class_names=list("abcd"),
        signatures={"features": model.get_layer("avg_pool").output},
        decode=decode_image((8, 8, 3)),
        card={"score": 0.5},
    )
    return model, path


def raw_images(batch_size):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (batch_size, 8, 8, 3), dtype=np.uint8)


def test_signatures_answer_as_the_live_model(uint8_export):
    model, path = uint8_export
    signatures = tf.saved_model.load(str(path)).signatures
    assert set(signatures) == {"serving_default", "features", "encoded"}
    x = tf.constant(raw_images(5))
    live = model.predict(x, verbose=0)
    served = signatures["serving_default"](inputs=x)
    np.testing.assert_allclose(served["predictions"], live, atol=1e-5)
    assert list(served["class"].numpy()) == list(live.argmax(1))
    assert [n.decode() for n in served["class_name"].numpy()] == [
        "abcd"[i] for i in live.argmax(1)
    ]
    features = keras.Model(model.input, model.get_layer("avg_pool").output)(x)
    got = signatures["features"](inputs=x)
    assert set(got) == {"features"}
    np.testing.assert_allclose(got["features"], features, atol=1e-5)
    # PNG files are lossless, so both ways give the same answer.
    files = tf.stack([tf.io.encode_png(image) for image in x])
    np.testing.assert_allclose(
        signatures["encoded"](image_bytes=files)["predictions"], live, atol=1e-5
    )
    files = tf.stack([tf.io.encode_jpeg(image) for image in x])
    decoded = tf.stack([tf.io.decode_jpeg(file) for file in files])
    np.testing.assert_allclose(
        signatures["encoded"](image_bytes=files)["predictions"],
        model.predict(decoded, verbose=0),
        atol=1e-5,
    )


def test_model_card_says_what_goes_in_and_out_and_what_it_was_given(uint8_export):
    model, path = uint8_export
    card = json.loads((path / "model_card.json").read_text())
    assert card["class_names"] == list("abcd")
    assert card["num_parameters"] == model.count_params()
    assert card["versions"]["tensorflow"] == tf.__version__
    assert card["versions"]["revnet_tf"] == revnet_tf.__version__
    assert card["score"] == 0.5
    described = card["signatures"]
    image = {"inputs": {"dtype": "uint8", "shape": [None, 8, 8, 3]}}
    assert described["serving_default"]["inputs"] == image
    files = {"image_bytes": {"dtype": "string", "shape": [None]}}
    assert described["encoded"]["inputs"] == files
    assert described["encoded"]["outputs"] == described["serving_default"]["outputs"]
    features = {"features": {"dtype": "float32", "shape": [None, 16]}}
    assert described["features"]["outputs"] == features


def test_warm_up_has_a_request_that_each_signature_answers(uint8_export):
    _, path = uint8_export
    signatures = tf.saved_model.load(str(path)).signatures
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    answered = set()
    for record in tf.data.TFRecordDataset(str(file)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        arguments = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
        arguments = {k: tf.constant(v) for k, v in arguments.items()}
        name = request.model_spec.signature_name
        assert signatures[name](**arguments)
        answered.add(name)
    assert answered == set(signatures)


def test_without_the_extra_serving_a_model_is_written_without_requests(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    # Without a process that checks: this is about the files.
    monkeypatch.setattr(export, "_check_saved_model", lambda *_: None)
    export_saved_model(small_model(), tmp_path / "1")
    assert (tmp_path / "1" / "saved_model.pb").exists()
    assert not (tmp_path / "1" / "assets.extra").exists()


@pytest.mark.parametrize(
    "name, argument, message",
    [
        ("serving_default", np.zeros((0, 8, 8, 3), np.uint8), "an empty batch"),
        ("features", np.zeros((0, 8, 8, 3), np.uint8), "an empty batch"),
        ("encoded", np.zeros((0,), object), "an empty batch"),
        ("encoded", np.array([b"no image"]), "Unknown image file format"),
        ("encoded", np.array([PNG[:60]]), "Invalid PNG data"),
        ("encoded", np.array([tf.io.encode_png(np.zeros((9, 8, 3), "uint8")).numpy()]),
         "9,8,3.* is not compatible with expected shape .8,8,3"),
        ("encoded", np.array([JPEG[:300]]), "Invalid JPEG data"),
    ],
)  # fmt: skip
def test_graph_refuses_what_is_no_batch_of_images(
    uint8_export, name, argument, message
):
    _, path = uint8_export
    signature = tf.saved_model.load(str(path)).signatures[name]
    ((keyword, spec),) = signature.structured_input_signature[1].items()
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        signature(**{keyword: tf.constant(argument, spec.dtype)})


def test_name_of_a_signature_that_is_taken_is_refused(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="'encoded', which is taken"):
        export_saved_model(model, tmp_path / "1", signatures={"encoded": model.output})


@pytest.mark.thorough
def test_mixed_precision_model_answers_in_float32_and_to_1e_5(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small_model()
    signatures = {"features": model.get_layer("avg_pool").output}
    export_saved_model(model, tmp_path / "1", signatures=signatures)
    x = images(7, 8, 8, 3)
    loaded = tf.saved_model.load(str(tmp_path / "1")).signatures
    served = loaded["serving_default"](inputs=x)["predictions"]
    live = model.predict(x, verbose=0)
    np.testing.assert_allclose(served, live, atol=1e-5)
    assert loaded["features"](inputs=x)["features"].dtype == tf.float32


@pytest.mark.thorough
def test_model_of_a_mirrored_strategy_is_exported_within_its_scope(
    tmp_path, two_replicas
):
    with two_replicas.scope():
        model = small_model()
        export_saved_model(model, tmp_path / "1")
    served = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    x = images(3, 8, 8, 3)
    np.testing.assert_allclose(served(inputs=x)["predictions"], model(x), atol=1e-5)


@pytest.mark.thorough
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


def test_saved_model_that_differs_is_not_written(tmp_path):
    class Unsteady(keras.layers.Layer):
        """A layer with another answer in every call."""

        def call(self, x):
            return x + tf.cast(tf.timestamp() % 1000, tf.float32)

    x = keras.Input((4,))
    model = keras.Model(x, Unsteady()(x))
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_saved_model(model, tmp_path / "1")
    assert not os.listdir(tmp_path)


@pytest.mark.thorough
def test_full_disk_leaves_the_version_before_alone(tmp_path):
    model = small_model()
    export_saved_model(model, tmp_path / "1")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit of the file size stands for a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises((OSError, tf.errors.OpError), match="File too large"):
            export_saved_model(model, tmp_path / "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_read_only_folder_is_left_alone():
    model = small_model()
    # Not in `tmp_path`, because only its owner can enter it.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        superuser = os.geteuid() == 0
        if superuser:  # It can write everywhere.
            os.seteuid(65534)
        try:
            with pytest.raises((OSError, tf.errors.OpError), match="ermission denied"):
                export_saved_model(model, os.path.join(folder, "1"))
        finally:
            if superuser:
                os.seteuid(0)
        assert not os.listdir(folder)
