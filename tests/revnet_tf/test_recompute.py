"""`Recompute` and `recompute`: a step equals the step of the ordinary network."""

import json
import math
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, assert_same_state, images, loss_and_gradients

from revnet_tf import Recompute, RevBlock, RevSequence, memory, models, recompute

layers = keras.layers

MODES = [
    pytest.param({"run_eagerly": True}, id="eager", marks=pytest.mark.thorough),
    pytest.param({"jit_compile": False}, id="graph"),
    pytest.param({"jit_compile": True}, id="xla", marks=pytest.mark.thorough),
]


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")


@keras.saving.register_keras_serializable("tests")
class AddsALoss(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(x**2))
        return x


def body(channels=6):
    """Batch statistics, dropout, a loss, weight decay, and a frozen layer."""
    stack = [
        layers.Conv2D(channels, 3, padding="same", kernel_regularizer="l2"),
        layers.BatchNormalization(momentum=0.9),
        layers.Activation("tanh"),
        layers.Dropout(0.3, noise_shape=(None, 1, 1, channels), seed=1),
        layers.Conv2D(channels, 1, trainable=False),
        AddsALoss(),
    ]
    return keras.Sequential(stack)


def wrapped(wrap):
    """Returns a network of a `body` and of a layer that is used twice."""
    inputs = keras.Input((6, 6, 3))
    x = wrap(body())(inputs)
    shared = layers.Conv2D(6, 3, padding="same", activation="tanh")
    x = wrap(shared)(x) + wrap(shared)(x[:, ::-1])
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))


def whole():
    """Returns the same kind of network, with a nested model and no wrapper."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Rescaling(2.0)(inputs)
    nested_input = keras.Input((6, 6, 3))
    y = layers.Conv2D(6, 3, padding="same")(nested_input)
    y = y + body()(y)
    x = keras.Model(nested_input, y, name="nested")(x)
    shared = layers.Conv2D(6, 3, padding="same", activation="tanh", name="shared")
    x = x + shared(x)
    x = x + shared(x)
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))


NETWORKS = {
    "wrapped": lambda: wrapped(Recompute),
    "segments": lambda: recompute(whole(), 3),
}
TWINS = {
    "wrapped": lambda: wrapped(lambda layer: Recompute(layer, recompute=False)),
    "segments": whole,
}


def trained(make, **kwargs):
    """Returns a network after two steps, and the losses of the steps."""
    keras.utils.set_random_seed(3)
    model = make()
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "mse", metrics=["mae"], **kwargs)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 6, 6, 3)), rng.standard_normal((8, 1))
    history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return model, history.history


def assert_same_training(found, expected):
    (model, history), (twin, twin_history) = found, expected
    for name, values in twin_history.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-9)
    for v, w in zip(model.variables, twin.variables, strict=True):
        is_state = "moving" in v.path or "seed" in v.path
        # Second evaluations sum gradients in another order, and these reach the
        # statistics of the second step.
        tolerance = 1e-12 if is_state else 1e-9
        np.testing.assert_allclose(
            v.numpy(), w.numpy(), tolerance, tolerance, err_msg=v.path
        )


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize(
    "network", ["segments", pytest.param("wrapped", marks=pytest.mark.thorough)]
)
def test_training_equals_that_of_the_ordinary_network(network, kwargs, float64):
    found = trained(NETWORKS[network], **kwargs)
    expected = trained(TWINS[network], **kwargs)
    assert_same_training(found, expected)


def test_state_after_a_pass_is_that_of_the_twin_to_the_last_bit(float64):
    pair = []
    for name in ("segments", "wrapped"):
        for make in (NETWORKS[name], TWINS[name]):
            keras.utils.set_random_seed(3)
            pair.append(make())
            pair[-1](images(4, 6, 6, 3, dtype="float64"), training=True)
        assert_same_state(*pair[-2:])


@pytest.mark.thorough
@pytest.mark.parametrize("network", NETWORKS)
def test_training_on_two_replicas_equals_that_of_the_ordinary_network(
    network, two_replicas, float64
):
    with two_replicas.scope():
        found = trained(NETWORKS[network], jit_compile=False)
        expected = trained(TWINS[network], jit_compile=False)
    assert_same_training(found, expected)


class Remat(layers.Layer):
    """A layer under `keras.remat`, as its documentation shows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, x, training=False):
        return keras.remat(lambda x: self.layer(x, training=training))(x)


def test_keras_remat_moves_statistics_twice_and_draws_another_dropout_mask():
    # Keras 3.15 on TensorFlow. Correct the documentation of `Recompute` if this fails.
    def layer():
        keras.utils.set_random_seed(3)
        norm = layers.BatchNormalization(momentum=0.9)
        return keras.Sequential([norm, layers.Dropout(0.5, seed=1)])

    x = 3 + images(64, 5)

    def pass_of(layer):
        layer.build(x.shape)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        dx = tape.gradient(y, x, tf.ones_like(y) * x)
        norm, dropout = (layer if hasattr(layer, "layers") else layer.layer).layers
        return dx, norm.moving_mean.numpy(), dropout.seed_generator.state.numpy()

    ordinary, ours, remat = map(pass_of, (layer(), Recompute(layer()), Remat(layer())))
    for got, expected in zip(ours, ordinary, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for got, expected in zip(remat, ordinary, strict=True):
        assert not np.allclose(got, expected, rtol=1e-3)


@pytest.mark.thorough
def test_keras_remat_scope_fails_in_fit_of_a_functional_model():
    with keras.RematScope(mode="full"):
        model = whole()
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match="keywords arguments only when eager"):
        model.fit(np.ones((4, 6, 6, 3)), np.ones((4, 1)), verbose=0)


class Mixes(layers.Layer):
    """Takes and returns nested structures."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)
        self.supports_masking = True

    def call(self, inputs, scale=None, training=False):
        a, tokens = inputs["a"], inputs["tokens"]
        y = self.dense(a) * (1.0 if scale is None else scale)
        return {"sum": y, "pair": (keras.ops.tanh(y), tokens + 1)}


def test_nested_inputs_and_outputs_and_keywords_with_gradients(run):
    x = {"a": images(3, 5), "tokens": tf.constant([1, 2, 3])}
    scale = images(3, 4, seed=1)
    pair = []
    for flag in (True, False):
        keras.utils.set_random_seed(0)
        pair.append(Recompute(Mixes(), recompute=flag))
        pair[-1](x)

    def gradients(layer, a, scale):
        with tf.GradientTape() as tape:
            tape.watch([a, scale])
            y = layer({**x, "a": a}, scale=scale, training=True)
            loss = tf.reduce_sum(y["sum"] ** 2) + tf.reduce_sum(y["pair"][0])
        weights = [v.value for v in layer.trainable_variables]
        return [y["pair"][1], *tape.gradient(loss, [a, scale, *weights])]

    got, expected = (
        run(lambda a, s: gradients(layer, a, s))(x["a"], scale)  # noqa: B023
        for layer in pair
    )
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_masks_pass_through(run_in_every_mode):
    tokens = tf.constant([[3, 1, 0, 0], [2, 2, 5, 0]])

    def make(wrap):
        keras.utils.set_random_seed(0)
        x = keras.Input((4,), dtype="int32")
        y = wrap(layers.Embedding(9, 6, mask_zero=True))(x)
        y = wrap(layers.MultiHeadAttention(2, 3))(y, y)
        return keras.Model(x, wrap(layers.LSTM(5))(y))

    found = [
        run_in_every_mode(lambda t: loss_and_gradients_of(model, t))(tokens)  # noqa: B023
        for model in (make(Recompute), make(lambda layer: layer))
    ]
    assert_close(*found, rtol=1e-4, atol=1e-5)


def loss_and_gradients_of(model, tokens):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(3 * model(tokens, training=True)))
    weights = [v.value for v in model.trainable_variables]
    return [loss, *map(tf.convert_to_tensor, tape.gradient(loss, weights))]


def test_a_mixed_precision_layer_sees_what_it_sees_unwrapped():
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    layer = body()
    recomputed = Recompute(layer)
    x = images(2, 6, 6, 3)
    y, expected = recomputed(x), layer(x)
    assert y.dtype == expected.dtype == "bfloat16"
    np.testing.assert_array_equal(tf.cast(y, "float32"), tf.cast(expected, "float32"))


@pytest.mark.thorough
def test_layers_connect_with_reversible_blocks(run_in_every_mode):
    def make(flag):
        keras.utils.set_random_seed(0)
        x = keras.Input((8,))
        y = Recompute(layers.Dense(8, "tanh"), recompute=flag)(x)
        for _ in range(2):
            blocks = [RevBlock(layers.Dense(4, "tanh"), layers.Dense(4))]
            y = RevSequence(blocks, recompute=flag)(y)
            y = Recompute(layers.Dense(8, "tanh"), recompute=flag)(y)
        return keras.Model(x, y)

    x = images(4, 8)
    found = [
        run_in_every_mode(lambda x: loss_and_gradients(model, x))(x)  # noqa: B023
        for model in (make(True), make(False))
    ]
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_pair_of_a_block_and_of_a_recomputed_layer_has_the_sum_of_gradients():
    # The block does not reconstruct its first stream, which the pair's layer stores.
    def make(flag):
        keras.utils.set_random_seed(0)
        x = keras.Input((8,))
        halves = keras.Model(x, [layers.Dense(4)(x), layers.Dense(4)(x)])
        pair = Recompute(halves, recompute=flag)(x)
        y = RevBlock(layers.Dense(4), layers.Dense(4), recompute=flag)(pair)
        product = Recompute(layers.Multiply(), recompute=flag)(pair)
        return keras.Model(x, [product, *y])

    found = [
        tf.function(loss_and_gradients, autograph=False)(make(flag), images(4, 8))
        for flag in (True, False)
    ]
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_config_and_weights_survive_the_file(tmp_path):
    model = wrapped(Recompute)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = images(2, 6, 6, 3)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert [v.name for v in loaded.variables] == [v.name for v in model.variables]


def test_files_with_the_former_stem_load():
    config = {
        "module": None,
        "class_name": "Stem",
        "registered_name": "revnet_tf>Stem",
        "config": {
            "name": "stem",
            "trainable": True,
            "dtype": "float32",
            "recompute": False,
            "axis": -1,
            "layer": keras.saving.serialize_keras_object(layers.Dense(4)),
        },
        "build_config": {"input_shape": [None, 3]},
    }
    stem = keras.saving.deserialize_keras_object(config)
    assert isinstance(stem, Recompute) and stem.recompute is False
    assert stem(images(2, 3)).shape == (2, 4)


def test_a_recomputed_model_shares_layers_outputs_and_compile_state():
    model = whole()
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"], jit_compile=False)
    found = recompute(model, 2)
    assert found.get_layer("shared") is model.get_layer("shared")
    assert [id(v) for v in found.variables] == [id(v) for v in model.variables]
    assert found.optimizer is model.optimizer and found.loss == "mse"
    x = images(2, 6, 6, 3)
    np.testing.assert_array_equal(found(x), model(x))
    features = keras.Model(found.input, found.get_layer("shared").output)
    assert features(x).shape == (2, 6, 6, 6)
    found.trainable = False
    assert not model.get_layer("shared").trainable
    plain = recompute(found, 0)
    assert type(plain) is type(model) and plain.optimizer is model.optimizer
    assert recompute(model, 0) is model


def test_the_choice_of_segments_survives_the_file(tmp_path):
    model = recompute(whole(), 3)
    model.segments[1].recompute = False
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [s.recompute for s in loaded.segments] == [True, False, True]
    x = images(2, 6, 6, 3)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_a_recomputed_sequential_model_is_a_layer_of_another_model():
    base = keras.Sequential([keras.Input((3,)), *(layers.Dense(3) for _ in range(3))])
    found = recompute(base, np.int64(2))
    x = keras.Input((3,))
    outer = keras.Model(x, layers.Dense(1)(found(x)))
    assert outer(images(2, 3), training=True).shape == (2, 1)
    with pytest.raises(ValueError, match=f"{found.name} in {outer.name} is recomputed"):
        recompute(outer, 0)


def test_losses_of_a_segment_count_once():
    model, twin = recompute(whole(), 3), whole()
    twin.set_weights(model.get_weights())
    x = images(2, 6, 6, 3)
    for network in (model, twin):
        network(x, training=True)
    assert len(model.losses) == len(twin.losses) > 1


def test_intermediate_outputs_of_a_recomputed_model(run):
    inputs = keras.Input((5,))
    features, x = [], inputs
    for _ in range(4):
        x = layers.Dense(5, "tanh")(x)
        features.append(x)
    model = keras.Model(inputs, features)
    x = images(3, 5)
    found = [
        run(lambda x: loss_and_gradients(network, x))(x)  # noqa: B023
        for network in (recompute(model, 3), model)
    ]
    assert_close(*found, rtol=1e-5, atol=1e-5)


def test_models_that_cannot_be_recomputed_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    model = whole()
    with pytest.raises(ValueError, match="Own.*Recompute"):
        recompute(Own())
    with pytest.raises(ValueError, match="built"):
        recompute(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="no place"):
        recompute(keras.Sequential([keras.Input((3,)), layers.Dense(3)]))
    for segments in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="segments must be"):
            recompute(model, segments)
    with pytest.raises(ValueError, match="or fewer"):
        recompute(model, 1000)
    stateful = [layers.Dense(3), layers.LSTM(3, stateful=True), layers.Dense(3)]
    stateful = keras.Sequential([keras.Input((2, 3), 1), *stateful])
    with pytest.raises(ValueError, match="segment1 changes"):
        recompute(stateful, 1)(images(1, 2, 3), training=True)
    with pytest.raises(ValueError, match="recomputed already"):
        recompute(recompute(model))
    with pytest.raises(ValueError, match="must be a Keras layer"):
        Recompute(lambda x: x)
    with pytest.raises(ValueError, match="dtype"):
        Recompute(layers.Dense(1), dtype="float16")


def test_layers_that_cannot_be_repeated_are_refused(run):
    class Draws(layers.Layer):
        def call(self, x):
            return x * tf.random.uniform([])

    with pytest.raises(ValueError, match="repeated.*RandomUniform"):
        run(lambda x: Recompute(Draws())(x, training=True))(images(2, 3))


def deep(recomputed=True, width=64):
    x = inputs = keras.Input((16, 16, width))
    for _ in range(10):
        y = layers.Conv2D(width, 3, padding="same", activation="tanh")(x)
        y = layers.Conv2D(width, 3, padding="same", activation="tanh")(y)
        x = layers.Add()([x, y])
    outputs = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, outputs)
    return recompute(model) if recomputed else model


def test_segments_store_less_than_half_of_the_activations():
    found, ordinary = (
        memory.estimate(deep(flag), 32).activation_bytes for flag in (True, False)
    )
    assert found < 0.5 * ordinary


@pytest.mark.thorough
def test_with_xla_segments_store_less_than_two_thirds():
    found = []
    for flag in (True, False):
        model = deep(flag)
        model.compile("sgd", "mse", jit_compile=True)
        found.append(memory.estimate(model, 32).activation_bytes)
    assert found[0] < 2 / 3 * found[1]


@pytest.mark.thorough
def test_a_plan_chooses_segments_of_a_plain_model():
    model = deep(recomputed=False)
    most = round(1.16 * memory.estimate(model, 8).peak_bytes)
    planned = memory.plan(model, 8, most)
    assert [s.recompute for s in planned.segments] == [False] * len(planned.segments)
    least = round(1.16 * memory.estimate(deep(), 8).peak_bytes)
    tight = memory.plan(planned, 8, least)
    assert tight is planned
    assert any(s.recompute for s in planned.segments)
    assert 1.08 * memory.estimate(planned, 8).peak_bytes <= least


@pytest.mark.thorough
def test_the_largest_batch_is_within_the_budget_and_the_next_one_is_not():
    model = deep()
    budget = 60_000_000
    found = memory.max_batch_size(model, budget)
    assert 1.08 * memory.estimate(model, found).peak_bytes <= budget
    assert 1.08 * memory.estimate(model, found + 1).peak_bytes > budget


def test_budgets_that_are_none_are_refused():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(4)(layers.Dense(4)(x)))
    for call in (
        lambda budget: memory.max_batch_size(model, budget),
        lambda budget: memory.plan(model, 2, budget),
    ):
        with pytest.raises(TypeError, match="number of bytes.*'20MB'"):
            call("20MB")
        for budget in (0, -5, math.inf):
            with pytest.raises(ValueError, match="positive"):
                call(budget)
    with pytest.raises(ValueError, match="one sample"):
        memory.max_batch_size(model, 10)
    with pytest.raises(ValueError, match="input_shape"):
        x = keras.Input((None, None, 3))
        memory.max_batch_size(keras.Model(x, layers.Conv2D(3, 3)(x)), 10**9)


APPLICATIONS = (
    "ResNet50V2 EfficientNetV2B0 MobileNetV3Large DenseNet121 ConvNeXtTiny".split()
)


@pytest.mark.thorough
@pytest.mark.parametrize("name", APPLICATIONS)
def test_predictions_of_applications_are_the_same_bits(name):
    build = getattr(keras.applications, name)
    model = build(weights=None, input_shape=(64, 64, 3), classes=10)
    x = 100 * images(2, 64, 64, 3)
    found = recompute(model)
    np.testing.assert_array_equal(found(x), model(x))
    assert [v.path for v in found.variables] == [v.path for v in model.variables]


PLAIN = """
import sys, json, keras, numpy as np
assert "revnet_tf" not in sys.modules
model = keras.models.load_model(sys.argv[1])
assert "revnet_tf" not in sys.modules
x = np.load(sys.argv[2])
print(json.dumps(model.predict(x, verbose=0).tolist()))
"""


@pytest.mark.thorough
def test_a_pretrained_model_is_tuned_and_its_plain_form_needs_no_library(tmp_path):
    build = keras.applications.MobileNetV3Small
    base = build(weights=None, input_shape=(32, 32, 3), include_top=False)
    inputs = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(base(inputs))
    model = keras.Model(inputs, layers.Dense(3, "softmax")(x))
    model.save(tmp_path / "pretrained.keras")

    x = 255 * np.random.default_rng(0).random((8, 32, 32, 3), dtype="float32")
    tuned = recompute(keras.models.load_model(tmp_path / "pretrained.keras"))
    tuned.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    before = tuned.get_weights()
    tuned.fit(x, np.arange(8) % 3, epochs=2, batch_size=4, verbose=0)
    assert any(np.any(a != b) for a, b in zip(before, tuned.get_weights(), strict=True))
    recompute(tuned, 0).save(tmp_path / "tuned.keras")
    np.save(tmp_path / "x.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "tuned.keras", tmp_path / "x.npy"],
        cwd=pathlib.Path(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    got = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(got, tuned.predict(x, verbose=0), rtol=1e-5)


def test_a_revnet_keeps_its_reversible_layers_out_of_segments():
    model = models.RevNet((1, 1), (8, 8, 16), input_shape=(8, 8, 3))
    found = recompute(model, 1)
    inside = [layer for s in found.segments for layer in s.layer.layers]
    assert not any(hasattr(layer, "recompute") for layer in inside)
