"""Cases of building, saving, cloning, extraction and export, E01 to E17.

The cases are reports of users of such layers; tests/CASES.md lists them. Other files
test some of them:

- E02, weights before any data, and E06, shared weights: `test_layers` and
  `test_coupling`;
- E13, no gradient operation in the exported graph: `test_export`;
- E17, further arguments of the branches: `test_functional`.
"""

import copy
import os
import pathlib
import pickle
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    assert_close,
    conv_branch,
    conv_sequence,
    images,
    loss_and_gradients,
)

import revnet_tf
from revnet_tf import RevBlock, RevSequence, models
from revnet_tf.export import export_saved_model
from revnet_tf.layers import (
    ChannelPadding,
    DownsamplingBlock,
    PoolingShortcut,
    SpaceToDepth,
)

layers = keras.layers

# Together they take longer than all other tests.


def dense_block(units=4, **kwargs):
    return RevBlock(layers.Dense(units, "tanh"), layers.Dense(units, "tanh"), **kwargs)


def dense_model(*blocks, units=8):
    return keras.Sequential([keras.Input((units,)), *blocks, layers.Dense(1)])


def conv_model(**kwargs):
    x = keras.Input((6, 6, 8))
    y = layers.GlobalAveragePooling2D()(conv_sequence(**kwargs)(x))
    return keras.Model(x, layers.Dense(2)(y))


def in_a_fresh_process(script, folder, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (
        environment
    )
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=120)


@keras.saving.register_keras_serializable("tests_cases")
class Affine(layers.Layer):
    """A branch of a user, with a weight, a counter and a constant table."""

    table = tf.constant([0.5, 2.0])  # A graph captures it as a constant.

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],), initializer="normal")
        self.calls = self.add_weight(shape=(), dtype="int32", trainable=False)

    def call(self, x, training=False):
        if training:
            self.calls.assign(self.calls + 1)
        return self.table[0] * x * self.w + self.table[1]


# E01


def sublayers(layer):
    return [x for x in layer._flatten_layers() if x is not layer]


@pytest.mark.parametrize("name", ["block", "sequence", "downsampling"])
def test_e01_build_builds_every_layer_inside(name):
    layer = {
        "block": lambda: RevBlock(conv_branch(8), keras.Sequential([Affine()])),
        "sequence": lambda: RevSequence(
            [RevBlock(Affine(), conv_branch(8)) for _ in "ab"]
        ),
        "downsampling": lambda: DownsamplingBlock(
            layers.Conv2D(8, 3, 2, padding="same"),
            conv_branch(8),
            PoolingShortcut(8, 2),
            PoolingShortcut(8, 2),
        ),
    }[name]()
    layer.build((None, 8, 8, 16))
    assert layer.built and len(sublayers(layer)) > 2
    assert all(inner.built for inner in sublayers(layer))


def test_e01_weight_files_load_in_a_fresh_process(tmp_path):
    script = """
import keras, numpy as np
from revnet_tf import RevBlock, RevSequence
L = keras.layers
branch = lambda: keras.Sequential([L.BatchNormalization(), L.Dense(4, "tanh")])
blocks = [RevBlock(branch(), branch()) for _ in "ab"]
model = keras.Sequential([keras.Input((8,)), RevSequence(blocks)])
"""
    here = {}
    exec(script, here)
    x = images(3, 8)
    here["model"](x, training=True)  # moves the statistics
    here["model"].save_weights(tmp_path / "model.weights.h5")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", here["model"](x))
    check = """
model.load_weights("model.weights.h5")
np.testing.assert_allclose(model(np.load("x.npy")), np.load("y.npy"), atol=1e-6)
"""
    checkout = str(pathlib.Path(revnet_tf.__file__).parents[1])
    in_a_fresh_process(script + check, tmp_path, PYTHONPATH=checkout)


# E03


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = RevSequence([dense_block(), dense_block()])
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.blocks(x))


def shown_total(model, **kwargs):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line), **kwargs)
    return int(
        re.search(r"Total params: ([\d,]+)", "\n".join(lines))[1].replace(",", "")
    )


@pytest.mark.parametrize("expand_nested", [False, True])
def test_e03_summary_counts_every_weight(expand_nested):
    subclassed = Subclassed()
    subclassed(images(2, 8))
    stage = models.RevNet((1, 2), (8, 8, 16), input_shape=(8, 8, 3))
    shared = layers.Dense(4)
    for model, expected in (
        (subclassed, 4 * (4 * 4 + 4) + 8 + 1),  # four branches and the head
        (dense_model(RevBlock(shared, shared)), 4 * 4 + 4 + 8 + 1),  # once
        (stage, sum(v.numpy().size for v in stage.variables)),
    ):
        assert shown_total(model, expand_nested=expand_nested) == expected
        assert model.count_params() == expected


# E04


def test_e04_unregistered_branch_is_named_when_a_file_is_loaded(tmp_path):
    class Unregistered(layers.Dense):
        pass

    def block():
        return RevBlock(Unregistered(4), keras.Sequential([Unregistered(4)]))

    model = dense_model(RevSequence([block(), block()]), block())
    model.save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match="Could not locate class 'Unregistered'"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"Unregistered": Unregistered}
    )
    x = images(3, 8)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_e04_registered_branch_survives_inside_wrappers_and_nested_models(tmp_path):
    inner = keras.Input((8,))
    sequence = RevSequence([RevBlock(Affine(), Affine()) for _ in "ab"])
    inner = keras.Model(inner, sequence(inner))
    x = keras.Input((3, 8))
    model = keras.Model(x, layers.TimeDistributed(inner)(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = images(2, 3, 8)
    np.testing.assert_array_equal(loaded(x), model(x))


# E05


def test_e05_training_a_clone_leaves_the_original_as_it_was():
    shared = layers.Dense(4, "tanh")
    blocks = [RevBlock(shared, layers.Dense(4)), RevBlock(shared, shared)]
    model = dense_model(RevSequence(blocks))
    before = model.get_weights()
    clone = keras.models.clone_model(model)
    clone.compile(keras.optimizers.SGD(0.1), "mse")
    clone.fit(images(8, 8), images(8, 1), verbose=0)
    for old, now, other in zip(
        before, model.get_weights(), clone.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(now, old)
        assert np.any(other != old)


def test_e05_a_clone_shares_what_the_layer_shares():
    # Within one layer. Keras documents that `clone_model` does not share between
    # layers.
    shared = layers.Dense(4, "tanh")
    blocks = [RevBlock(shared, layers.Dense(4)), RevBlock(shared, shared)]
    model = dense_model(RevSequence(blocks), RevBlock(shared, shared))
    sequence, block, _ = keras.models.clone_model(model).layers
    first, second = sequence.blocks
    assert first.f is second.f is second.g
    assert first.g is not first.f
    assert block.f is block.g
    assert first.f is not shared


# E06


def test_e06_norm_of_a_shared_branch_advances_once_for_each_use():
    # By hand: the batch means are 1 in block 1, and 3 in block 2, whose second stream
    # is 1 + g = 1 + 2. Momentum 0.5 from 0 gives 0.5 and then 0.5 * 0.5 + 1.5.
    norm = layers.BatchNormalization(momentum=0.5, beta_initializer="zeros")
    add_two = layers.Dense(2, kernel_initializer="zeros", bias_initializer=two)
    sequence = RevSequence([RevBlock(norm, add_two) for _ in "ab"])
    x = tf.ones((4, 4))
    loss_and_gradients(sequence, x)
    np.testing.assert_allclose(norm.moving_mean, [1.75, 1.75], rtol=1e-6)


def two(shape, dtype=None):
    return tf.fill(shape, tf.constant(2, dtype))


# E07


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_e07_a_half_frozen_model_loads_what_a_trainable_one_saved(suffix, tmp_path):
    model, other = (conv_model(dropout=0.0) for _ in "ab")
    sequence = next(x for x in other.layers if isinstance(x, RevSequence))
    sequence.blocks[0].f.trainable = False
    sequence.blocks[1].trainable = False
    x = images(3, 6, 6, 8)
    model(x, training=True)
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
    other.load_weights(path)
    np.testing.assert_array_equal(other(x), model(x))


def test_e07_frozen_parts_stay_frozen_in_a_file(tmp_path):
    model = conv_model(dropout=0.0)
    sequence = next(x for x in model.layers if isinstance(x, RevSequence))
    sequence.blocks[0].f.trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = images(3, 6, 6, 8)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert [v.shape for v in loaded.trainable_variables] == [
        v.shape for v in model.trainable_variables
    ]


# E08 and E09


@pytest.mark.thorough
def test_e08_keras_export_of_any_branch_needs_neither_library_nor_keras(tmp_path):
    def branch():
        parts = [Affine(), layers.BatchNormalization(), layers.Dropout(0.3), Affine()]
        return keras.Sequential(parts)

    blocks = [RevBlock(branch(), branch()) for _ in "ab"]
    model = dense_model(RevSequence(blocks), RevBlock(branch(), branch()))
    model(images(5, 8), training=True)  # moves statistics, counters and seeds
    model.export(tmp_path / "1", verbose=False)
    for n in (1, 7, 32):  # the batch size is open (E09)
        np.save(tmp_path / f"x{n}.npy", images(n, 8))
        np.save(tmp_path / f"y{n}.npy", model(images(n, 8)))
    script = """
import sys, numpy as np, tensorflow as tf
loaded = tf.saved_model.load("1")
for n in (1, 7, 32):
    y = loaded.serve(tf.constant(np.load(f"x{n}.npy")))
    np.testing.assert_allclose(y, np.load(f"y{n}.npy"), rtol=1e-5, atol=1e-6)
assert "revnet_tf" not in sys.modules
"""
    in_a_fresh_process(script, tmp_path)


def test_e09_a_signature_of_fixed_size_refuses_any_other(tmp_path):
    model = dense_model(dense_block())
    signature = [tf.TensorSpec((4, 8), tf.float32)]
    model.export(tmp_path / "1", verbose=False, input_signature=signature)
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    x = images(4, 8)
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises((ValueError, TypeError)):
        loaded.serve(images(3, 8))


@pytest.mark.thorough
def test_e09_open_sizes_of_an_image_stay_open(tmp_path):
    model = models.RevNet((1, 1), (8, 8, 16), include_top=False, pooling="avg")
    export_saved_model(model, tmp_path / "1")
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    serve = loaded.signatures["serving_default"]
    for shape in ((1, 8, 8, 3), (3, 16, 12, 3)):
        x = images(*shape)
        y = serve(inputs=x)["predictions"]
        np.testing.assert_allclose(y, model(x), rtol=1e-4, atol=1e-5)


# E10


@pytest.mark.thorough
def test_e10_export_under_a_strategy_is_the_one_device_model(two_replicas, tmp_path):
    with two_replicas.scope():
        model = conv_model()
        model.compile(keras.optimizers.SGD(0.1), "mse")
    data = tf.data.Dataset.from_tensor_slices((images(8, 6, 6, 8), images(8, 2)))
    model.fit(data.batch(4), shuffle=False, verbose=0)
    with two_replicas.scope():
        export_saved_model(model, tmp_path / "inside")
    export_saved_model(model, tmp_path / "outside")
    x = images(3, 6, 6, 8)
    for name in ("inside", "outside"):
        loaded = tf.saved_model.load(str(tmp_path / name))
        y = loaded.signatures["serving_default"](inputs=x)["predictions"]
        np.testing.assert_allclose(y, model(x), rtol=1e-4, atol=1e-5)


# E11


@pytest.mark.thorough
def test_e11_mixed_precision_model_is_exported_with_float32_outputs(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.Input((6, 6, 8))
    model = keras.Model(x, conv_sequence(num_blocks=1)(x))
    export_saved_model(model, tmp_path / "1")
    model.export(tmp_path / "2", verbose=False)
    x = images(2, 6, 6, 8)
    live = model(x)
    ours, keras_own = (tf.saved_model.load(str(tmp_path / n)) for n in "12")
    served = ours.signatures["serving_default"](inputs=x)["predictions"]
    for y in (served, keras_own.serve(x)):
        assert y.dtype == tf.float32
        error = np.linalg.norm(y - live) / np.linalg.norm(live)
        assert error < 1e-2


# E12 and E14


# TensorFlow's interpreter warns that it will be removed.
interpreter_warns = pytest.mark.filterwarnings(
    r"ignore:\s*Warning. tf.lite.Interpreter:UserWarning"
)


def interpreted(content, x):
    """Returns the output of a TFLite model for `x`, in the units of the float model."""
    interpreter = tf.lite.Interpreter(model_content=content)
    (inputs,), (outputs,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.resize_tensor_input(inputs["index"], x.shape)
    interpreter.allocate_tensors()
    x = np.asarray(x)
    if inputs["dtype"] == np.int8:
        scale, zero = inputs["quantization"]
        x = np.clip(np.round(x / scale + zero), -128, 127).astype(np.int8)
    interpreter.set_tensor(inputs["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(outputs["index"])
    if outputs["dtype"] == np.int8:
        scale, zero = outputs["quantization"]
        y = (y.astype("float32") - zero) * scale
    return y


@pytest.mark.thorough
@interpreter_warns
def test_e12_exported_network_converts_to_tflite_builtin_operations(tmp_path):
    # Without `SELECT_TF_OPS` the converter fails at any other operation.
    model = models.RevNet((1, 1), (8, 8, 16), True, input_shape=(8, 8, 3), classes=4)
    export_saved_model(model, tmp_path / "1")
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "1"))
    x = images(3, 8, 8, 3)
    np.testing.assert_allclose(interpreted(converter.convert(), x), model(x), atol=1e-4)


@pytest.mark.thorough
@interpreter_warns
def test_e14_int8_conversion_after_training_keeps_the_accuracy(tmp_path):
    # By the same converter as E12, without the tools that rewrite Keras layers.
    def striped(n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, n)
        patterns = np.random.default_rng(0).standard_normal((4, 8, 8, 3))
        noise = rng.standard_normal((n, 8, 8, 3))
        return (patterns[labels] + noise).astype("float32"), labels

    model = models.RevNet((1,), (8, 8), input_shape=(8, 8, 3), classes=4)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    x, labels = striped(512, 1)
    model.fit(x, labels, epochs=6, verbose=0)
    for norm in model._flatten_layers():
        if isinstance(norm, layers.BatchNormalization):
            norm.momentum = 0.0  # The statistics of the last batch; see below.
    model(x, training=True)
    export_saved_model(model, tmp_path / "1")

    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "1"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[i : i + 1]] for i in range(100))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    content = converter.convert()

    x, labels = striped(500, 2)
    accuracy = [
        np.mean(np.argmax(y, -1) == labels) for y in (model(x), interpreted(content, x))
    ]
    assert accuracy[0] > 0.9
    assert accuracy[0] - accuracy[1] < 0.02


# E15


def feature_networks():
    pair = []
    for recompute in (True, False):
        keras.utils.set_random_seed(1)
        net = models.RevNet(
            (1, 2, 1), (8, 8, 8, 8), input_shape=(8, 8, 3), recompute=recompute
        )
        outputs = [net.get_layer("stage2").output, net.output]
        pair.append((keras.Model(net.input, outputs), net))
    return pair


def test_e15_a_loss_on_features_and_logits_equals_autodiff():
    (layer, _), (twin, _) = feature_networks()
    x = images(2, 8, 8, 3)
    step = tf.function(loss_and_gradients, autograph=False)
    got, expected = step(layer, x), loss_and_gradients(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def kept_elements(model):
    """Returns the size of the activations that the gradient reads."""
    forward = {}

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            forward.update((op.name, op) for op in x.graph.get_operations())
            loss = sum(tf.reduce_sum(y**2) for y in tf.nest.flatten(outputs))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    graph = step.get_concrete_function(tf.TensorSpec((2, 8, 8, 3))).graph
    todo, seen, kept = [t.op for t in graph.outputs], set(), {}
    while todo:
        op = todo.pop()
        if op.name in seen or op.name in forward:
            continue
        seen.add(op.name)
        for t in op.inputs:
            if t.op.name in forward and t.shape.rank == 4 and t.shape[0] == 2:
                kept[t.name] = t.shape.num_elements()
            todo.append(t.op)
        todo += op.control_inputs
    return sum(kept.values())


@pytest.mark.thorough
def test_e15_features_as_outputs_store_no_more_than_themselves():
    (features, net), _ = feature_networks()
    extra = kept_elements(features) - kept_elements(net)
    assert extra <= np.prod([2, *features.outputs[0].shape[1:]])


# E16


@pytest.mark.parametrize("name", ["block", "sequence"])
def test_e16_a_trained_layer_is_inverted_also_after_a_file(name, tmp_path):
    layer = (
        conv_sequence() if name == "sequence" else RevBlock(*map(conv_branch, [4, 4]))
    )
    inputs = keras.Input((6, 6, 8))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(images(16, 6, 6, 8), images(16, 6, 6, 8, seed=1), epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").layers[-1]
    x = images(3, 6, 6, 8, seed=2)
    for trained in (layer, loaded):
        y = trained(x, training=False)
        np.testing.assert_allclose(trained.inverse(y), x, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(loaded(x), layer(x))


# All public layers


def small_branch(filters, strides=1):
    return keras.Sequential(
        [
            layers.BatchNormalization(momentum=0.9),
            layers.Conv2D(filters, 3, strides, padding="same", activation="tanh"),
        ]
    )


PUBLIC = {
    "block": lambda: RevBlock(small_branch(2), small_branch(2)),
    "sequence": lambda: RevSequence(
        [RevBlock(small_branch(2), small_branch(2)) for _ in "ab"]
    ),
    "downsampling": lambda: DownsamplingBlock(
        small_branch(4, 2),
        small_branch(4),
        PoolingShortcut(4, 2),
        layers.Conv2D(4, 1, 2),
    ),
    "pooling": lambda: PoolingShortcut(6, 2),
    "space_to_depth": lambda: SpaceToDepth(2),
    "padding": lambda: ChannelPadding(6),
}
SHAPE = (6, 6, 4)


def public_model(name):
    keras.utils.set_random_seed(3)
    x = keras.Input(SHAPE)
    y = layers.GlobalAveragePooling2D()(PUBLIC[name]()(x))
    return keras.Model(x, layers.Dense(2, dtype="float32")(y))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", PUBLIC)
def test_copies_of_a_layer_are_equal_and_independent(name, how):
    layer = PUBLIC[name]()
    layer.build((None, *SHAPE))
    other = COPIES[how](layer)
    assert type(other) is type(layer)
    x = images(3, *SHAPE)
    expected = layer(x)
    np.testing.assert_array_equal(other(x), expected)
    assert len(other.variables) == len(layer.variables)
    for v in other.variables:
        if not v.path.endswith("seed_generator_state"):
            v.assign(tf.ones_like(v.value) * 3)
    np.testing.assert_array_equal(layer(x), expected)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", PUBLIC)
def test_copies_of_a_layer_that_was_not_built_can_be_built(name, how):
    other = COPIES[how](PUBLIC[name]())
    assert not other.built
    other.build((None, *SHAPE))
    assert other(images(1, *SHAPE)).shape[0] == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_cloned_models_have_weights_of_their_own(name):
    model = public_model(name)
    clone = keras.models.clone_model(model)
    assert not {id(v) for v in clone.variables} & {id(v) for v in model.variables}
    clone.set_weights(model.get_weights())
    x = images(3, *SHAPE)
    np.testing.assert_array_equal(clone(x), model(x))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", PUBLIC)
def test_layers_under_a_mixed_policy_compute_close_to_float32(name, policy):
    x = images(3, *SHAPE)
    expected = public_model(name)(x)
    keras.config.set_dtype_policy(policy)
    model = public_model(name)
    layer = model.layers[1]
    # Streams are float32. A shortcut is a part of a block and computes in its own
    # dtype.
    compute = policy.removeprefix("mixed_") if name == "pooling" else "float32"
    assert layer(x).dtype == layer.compute_dtype == compute
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    error = np.linalg.norm(model(x) - expected) / np.linalg.norm(expected)
    assert error < 2e-2


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("name", PUBLIC)
def test_one_step_of_fit_is_that_of_ordinary_backpropagation(name, mode):
    x, target = images(4, *SHAPE), images(4, 2, seed=1)
    twin = public_model(name)
    twin.layers[1].recompute = False
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((twin(x, training=True) - target) ** 2)
    weights = twin.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.assign_sub(0.1 * gradient)

    model = public_model(name)
    how = {"run_eagerly": mode == "eager", "jit_compile": mode == "xla"}
    model.compile(keras.optimizers.SGD(0.1), "mse", **how)
    model.fit(x, target, verbose=0)
    assert_close(model.get_weights(), twin.get_weights(), rtol=1e-4, atol=1e-5)
