"""The inputs on which an exported model is compared with the live one."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from revnet_tf import RevBlock, _examples, models
from revnet_tf._saved_model_check import find_fault
from revnet_tf.export import export_litert, export_onnx, export_saved_model

layers = keras.layers


def head(x):
    y = RevBlock(layers.Dense(4), layers.Dense(4))(x)
    return layers.Dense(3)(layers.GlobalAveragePooling1D()(y))


def tokens(shape=(None,), dtype="int32"):
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, head(layers.Embedding(50, 8)(x)))


def text():
    x = keras.Input((), dtype="string")
    y = layers.TextVectorization(vocabulary=["one", "two", "three"])(x)
    return keras.Model(x, head(layers.Embedding(5, 8)(y)))


def wide_kernel_on_an_open_length():
    x = keras.Input((None, 4))
    return keras.Model(x, head(layers.Conv1D(8, 48)(x)))


def sizes_that_64_divides():
    x = y = keras.Input((None, None, 2))
    for _ in range(6):
        y = layers.Conv2D(2, 3, 2, padding="same")(y)
    y = layers.UpSampling2D(64)(y)
    return keras.Model(x, layers.Concatenate()([x, y]))


class Positions(layers.Layer):
    """Adds embeddings of positions, of which the table has 16."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(16, 8)

    def call(self, x):
        return x + self.table(tf.range(tf.shape(x)[1]))


def table_of_few_positions():
    x = keras.Input((None,), dtype="int32")
    return keras.Model(x, head(Positions()(layers.Embedding(50, 8)(x))))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(50, 8)
        self.block = RevBlock(layers.Dense(4), layers.Dense(4))

    def call(self, x, training=False):
        return self.block(self.embedding(x), training=training)


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 6), "int32"))
    return model


def logarithm(offset):
    x = keras.Input((8,))
    y = layers.Dense(4)(layers.Rescaling(1.0, -offset)(x))
    return keras.Model(x, RevBlock(layers.Dense(2), layers.Dense(2))(keras.ops.log(y)))


def one_hot():
    x = keras.Input((1,), dtype="int64")
    y = layers.CategoryEncoding(num_tokens=7, output_mode="one_hot")(x)
    return keras.Model(x, layers.Dense(2)(y))


class Table(layers.Layer):
    """A layer with a table of five entries that no attribute shows."""

    def call(self, x):
        return tf.gather(tf.eye(5), x)


def unknown_table():
    x = keras.Input((3,), dtype="int32")
    return keras.Model(x, Table()(x))


class Largest(layers.Layer):
    def call(self, x):
        return tf.argmax(x, -1)


def indices_of_the_largest():
    x = keras.Input((8, 8, 3))
    return keras.Model(x, Largest()(layers.Conv2D(4, 3)(x)))


def booleans():
    x = keras.Input((8,), dtype="bool")
    return keras.Model(x, layers.Dense(2)(keras.ops.cast(x, "float32")))


def fixed_batch():
    x = keras.Input(batch_shape=(4, 8))
    return keras.Model(x, keras.ops.reshape(layers.Dense(8)(x), (4, 2, 4)))


def one_output_in_a_dict():
    x = keras.Input((8,))
    return keras.Model(x, {"answer": layers.Dense(2)(x)})


@pytest.mark.parametrize(
    "make",
    [
        tokens,
        lambda: tokens((6,), "float32"),
        wide_kernel_on_an_open_length,
        sizes_that_64_divides,
        table_of_few_positions,
        subclassed,
        one_hot,
        unknown_table,
        indices_of_the_largest,
        booleans,
        fixed_batch,
        one_output_in_a_dict,
    ],
)
def test_inputs_are_drawn_that_the_model_accepts(make, tmp_path):
    # In the tests, the warning of a missing check is an error.
    export_onnx(make(), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]


def requests_of(folder):
    """Returns the arguments of the warm-up requests."""
    file = folder / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(file)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        yield tf.make_ndarray(log.predict_log.request.inputs["inputs"])


@pytest.mark.thorough
def test_text_model_is_checked_and_warmed_up_with_words_that_it_knows(tmp_path):
    export_saved_model(text(), tmp_path / "1")
    (request,) = requests_of(tmp_path / "1")
    assert set(request[0].split()) <= {b"one", b"two", b"three"}


@pytest.mark.thorough
def test_subclassed_model_of_any_input_is_exported_with_examples(tmp_path):
    model = subclassed()
    examples = np.arange(12).reshape(3, 4)
    export_saved_model(model, tmp_path / "1", examples=examples)
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    got = serve(inputs=tf.constant(examples))["predictions"]
    np.testing.assert_allclose(got, model(examples), rtol=1e-6)
    (request,) = requests_of(tmp_path / "1")
    np.testing.assert_array_equal(request, examples[:1])


@pytest.mark.thorough
def test_model_without_finite_answers_is_written_with_a_warning(tmp_path):
    # The logarithm of negative values is NaN in both models.
    model = logarithm(1e6)
    model.layers[2].set_weights([np.ones((8, 4)), np.zeros(4)])
    with pytest.warns(UserWarning, match="not checked.*is finite.*Give `examples`"):
        export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()
    with pytest.warns(UserWarning, match="not checked"):
        export_saved_model(model, tmp_path / "1")
    assert not (tmp_path / "1" / "assets.extra").exists()


def test_examples_allow_a_check_where_random_inputs_do_not(tmp_path):
    model = logarithm(1e6)
    model.layers[2].set_weights([np.ones((8, 4)), np.zeros(4)])
    examples = np.full((2, 8), 2e6)
    export_onnx(model, tmp_path / "model.onnx", examples=examples)
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_model_with_some_finite_answers_is_checked_and_written(tmp_path):
    # The kernel is random. Some of its products are negative for all inputs.
    export_onnx(logarithm(0.0), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    "examples, message",
    [
        (np.zeros((3, 5), "int32"), r"shape \(None, 6\); got int32 of the shape"),
        (np.zeros((3, 6), "float32"), "int32 inputs.*got float32"),
        (np.zeros((0, 6), "int32"), r"got int32 of the shape \(0, 6\)"),
        ([["a"] * 6], "got string"),
        (np.full((3, 6), 70), r"does not take `examples`: indices.* = 70 is not in"),
    ],
)
@pytest.mark.parametrize("write", [export_saved_model, export_litert, export_onnx])
def test_examples_of_another_kind_are_refused(write, examples, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tokens((6,)), tmp_path / "model.tflite", examples=examples)
    assert not os.listdir(tmp_path)


def test_examples_are_repeated_up_to_the_largest_batch():
    examples = np.arange(3)
    spec = tf.TensorSpec((None,), tf.int32)
    found = _examples.batches(tokens(), spec, lambda x: x, examples)
    assert [list(x) for x in found[:2]] == [[0], [0, 1, 2, 0, 1, 2, 0]]
    assert len(found[2]) == 32


@pytest.mark.parametrize("make", [text, lambda: keras.Model(*recurrent())])
def test_litert_file_with_operations_of_tensorflow_is_written_with_a_note(
    make, tmp_path
):
    with pytest.warns(UserWarning, match="needs Flex.*Link the Flex delegate"):
        export_litert(make(), tmp_path / "model.tflite")
    assert os.listdir(tmp_path) == ["model.tflite"]


def recurrent():
    x = keras.Input((10, 8))
    return x, layers.GRU(3)(RevBlock(layers.Dense(4), layers.Dense(4))(x))


def test_onnx_file_without_the_tables_of_a_text_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table.*without its lookup and text layers"):
        export_onnx(text(), tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)


def confident_network(policy):
    """A RevNet-38 whose probabilities differ as those of a trained network do."""
    keras.config.set_dtype_policy(policy)
    model = models.RevNet38(input_shape=(8, 8, 3), classes=10)
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([30 * kernel, bias])
    return model


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_float16_network_is_written_with_the_tolerance_of_its_rounding(
    policy, tmp_path
):
    export_onnx(confident_network(policy), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    "got, live, fault",
    [
        ([1.0, np.nan], [1.0, np.nan], None),
        ([np.inf, -np.inf], [np.inf, -np.inf], None),
        ([1.0, 2.0], [1.0, np.nan], "differs from the model by nan"),
        ([np.inf], [-np.inf], "differs from the model by inf"),
        ([100.05, np.inf], [100.0, np.inf], None),
        ([1.05], [1.0], "differs from the model by 0.05"),
        ([[1.0]], [1.0], "has the shape (1, 1), live (1,)"),
        ([0] * 99 + [1], [0] * 100, None),
        ([0, 255], np.array([0, 1], "uint8"), "in 50% of the values"),
        ([True], [False], "in 100% of the values"),
        ([b"a"], np.array([b"b"], object), "in 100% of the values"),
    ],
)
def test_faults_are_found_in_answers_of_every_kind(got, live, fault):
    live = np.asarray(live)
    found = find_fault(np.asarray(got, live.dtype), live, 1e-3)
    assert (found is None) if fault is None else (fault in found)
