"""i-RevNets: counts, the published formula, inverses, gradients, memory, errors."""

import os
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import MODES
from twins import assert_close, images, loss_and_gradients

from revnet_tf import _executor, export, memory, models

SMALL = dict(num_blocks=(2, 4, 2), channels=(8, 32, 128), strides=(1, 2, 2))
SHAPE = (8, 8, 3)


def small(**kwargs):
    arguments = {**SMALL, "input_shape": SHAPE, **kwargs}
    return models.iRevNet(**arguments)


def randomized(model):
    """Returns the model with random values for all weights and statistics."""
    rng = np.random.default_rng(1)
    for v in model.variables:
        if v.path.endswith(("gamma", "moving_variance")):
            v.assign(rng.uniform(0.5, 1.5, v.shape))
        elif v.path.endswith(("beta", "bias", "moving_mean")):
            v.assign(rng.normal(0, 0.3, v.shape))
    return model


def num_parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make, count",
    [
        (models.iRevNet163, 6_274_826),
        (lambda: models.iRevNet163(classes=100), 6_320_996),
        (models.iRevNet301, 125_120_356),
        (lambda: models.iRevNet301(bottleneck=True), 29_201_092),
    ],
)
def test_parameter_counts_are_the_papers(make, count):
    model = make()
    assert num_parameters(model) == count
    # The number in the name counts three layers a block, and the classifier.
    depth = 1 + sum(
        v.path.endswith("kernel") for v in model.get_layer("body").variables
    )
    assert str(depth) in model.name
    # Nothing is lost: the features have at least as many values as the image.
    features = model.get_layer("body").output.shape[1:]
    assert np.prod(features) >= np.prod(model.input_shape[1:])


def formula(model, x, strides):
    """Returns logits by the published formula of each block, with plain operations."""
    weights = {v.path: tf.convert_to_tensor(v) for v in model.variables}

    def weight(layer, name):
        (found,) = [w for k, w in weights.items() if k.endswith(f"{layer}/{name}")]
        return found

    def norm_relu(layer, x):
        mean, variance, gamma, beta = (
            weight(layer, name)
            for name in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return tf.nn.relu((x - mean) / tf.sqrt(variance + 1e-5) * gamma + beta)

    def conv(layer, x, stride=1):
        padded = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        return tf.nn.conv2d(padded, weight(layer, "kernel"), stride, "VALID")

    def branch(name, x, stride):
        if name != "stage1_block1":
            x = norm_relu(f"{name}/bn1", x)
        x = conv(f"{name}/conv1", x, stride)
        x = conv(f"{name}/conv2", norm_relu(f"{name}/bn2", x))
        return conv(f"{name}/conv3", norm_relu(f"{name}/bn3", x))

    x1, x2 = tf.split(tf.pad(x, [[0, 0]] * 3 + [[0, 13]]), 2, -1)
    for stage, stride in enumerate(strides, 1):
        for i in range(1, SMALL["num_blocks"][stage - 1] + 1):
            stride_ = stride if i == 1 else 1
            fx = branch(f"stage{stage}_block{i}", x2, stride_)
            if stride_ == 2:
                x1, x2 = (tf.nn.space_to_depth(s, 2) for s in (x1, x2))
            x1, x2 = x2, fx + x1
    features = tf.concat([x1, x2], -1)
    x = tf.reduce_mean(norm_relu("final_bn", features), (1, 2))
    logits = x @ weight("predictions", "kernel") + weight("predictions", "bias")
    return features, logits


def test_two_published_blocks_are_one_reversible_block():
    model = randomized(small(classifier_activation=None))
    x = images(3, *SHAPE)
    features, logits = formula(model, x, SMALL["strides"])
    body = model.get_layer("body")
    assert_close([body(x), model(x)], [features, logits], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(body.inverse(features), x, atol=1e-4)


def test_strided_first_stage_acts_on_the_streams_of_the_first_space_to_depth():
    model = models.iRevNet((2,), (24,), (2,), first_block_size=2, input_shape=SHAPE)
    for v in model.trainable_variables:
        if "conv3" in v.path:
            v.assign(tf.zeros_like(v))  # The branches return zeros.
    x = images(2, *SHAPE)
    x1, x2 = tf.split(tf.nn.space_to_depth(x, 2), 2, -1)
    expected = tf.concat([tf.nn.space_to_depth(s, 2) for s in (x1, x2)], -1)
    body = model.get_layer("body")
    np.testing.assert_array_equal(body(x), expected)
    np.testing.assert_array_equal(body.inverse(expected), x)


def trained(steps, **kwargs):
    """Returns a network after some training steps, and its images in [0, 1]."""
    model = small(classifier_activation=None, **kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, 0.9), loss, jit_compile=False)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, *SHAPE), np.uint8)
    labels = np.arange(64) % 10
    if steps:
        model.fit(pixels / np.float32(255), labels, 16, epochs=steps // 4, verbose=0)
    return model, pixels


@pytest.mark.thorough
def test_trained_body_returns_its_images():
    model, pixels = trained(steps=20)
    x, body = pixels / np.float32(255), model.get_layer("body")

    def there_and_back(x):
        return body.inverse(body(x, training=False))

    for mode in MODES.values():
        np.testing.assert_allclose(mode(there_and_back)(x), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [0, pytest.param(20, marks=pytest.mark.thorough)])
def test_fixed_point_body_returns_every_bit(steps):
    model, pixels = trained(steps, num_blocks=(2, 2, 2), fraction_bits=14)
    if not steps:
        randomized(model)
    body = model.get_layer("body")

    def there_and_back(pixels):
        x = (tf.cast(pixels, tf.float32) / 255 - 0.5) / 0.25
        back = body.inverse(body(x, training=False))
        return tf.cast(tf.round((back * 0.25 + 0.5) * 255), tf.uint8)

    for mode in ("eager", "graph"):
        np.testing.assert_array_equal(MODES[mode](there_and_back)(pixels), pixels)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4)])
def test_gradients_equal_ordinary_backpropagation(run_in_every_mode, dtype, tolerance):
    keras.config.set_dtype_policy(dtype)
    kwargs = dict(num_blocks=(2, 2, 2), dropout=0.3, classifier_activation=None)
    found = []
    for recompute in (True, False):
        keras.utils.set_random_seed(5)
        model = small(recompute=recompute, **kwargs)
        x = images(4, *SHAPE, dtype=dtype)
        found.append(run_in_every_mode(lambda x, m=model: loss_and_gradients(m, x))(x))
        found[-1] += [tf.convert_to_tensor(v) for v in model.non_trainable_variables]
    assert_close(*found, rtol=tolerance, atol=tolerance)


def estimated(stages, blocks, batch_size, **kwargs):
    """Returns the estimate for networks with equal sizes of all outputs."""
    model = models.iRevNet(
        (blocks,) * stages,
        (16, 64, 256)[:stages],
        (1, 2, 2)[:stages],
        input_shape=(16, 16, 3),
        classifier_activation=None,
    )
    for layer in memory.recomputing_layers(model):
        layer.recompute = kwargs.get("recompute", True)
    if kwargs.get("xla"):
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    return memory.estimate(model, batch_size)


def bytes_per_image(*depth, **kwargs):
    small, large = (estimated(*depth, n, **kwargs).activation_bytes for n in (16, 80))
    return (large - small) / 64


OUTPUT_BYTES = 16 * 16 * 32 * 4


@pytest.mark.thorough
def test_body_stores_its_output_only():
    kept = {stage.name: stage.kept_bytes for stage in estimated(3, 2, 64).stages}
    assert 1 <= kept["body"] / (64 * OUTPUT_BYTES) < 1.01


@pytest.mark.thorough
def test_memory_is_flat_in_stages_and_blocks(monkeypatch):
    # Two threads decide the order of operations, and so the peak, by up to two streams.
    # The waste of chunks depends on the order, too.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(_executor, "_MAX_WASTE", 0)
    depths = (1, 6), (2, 6), (3, 2), (3, 6)
    found = [bytes_per_image(*depth) for depth in depths]
    # The estimate counts a quarter of a stream more for space to depth.
    assert max(found) < 1.035 * min(found)
    assert bytes_per_image(3, 6, recompute=False) > 2 * max(found)


@pytest.mark.thorough
def test_xla_temporaries_are_flat_in_stages_and_blocks():
    # One stage of two blocks is one `RevBlock`, which has less to reconstruct.
    found = [bytes_per_image(*depth, xla=True) for depth in ((1, 6), (3, 2))]
    assert max(found) < 1.03 * min(found)


@pytest.mark.thorough
def test_body_of_irevnet163_stores_its_output_only():
    estimated = memory.estimate(models.iRevNet163(), 8)
    kept = {stage.name: stage.kept_bytes for stage in estimated.stages}
    assert 1 <= kept["body"] / (8 * 8 * 8 * 512 * 4) < 1.01


@pytest.mark.parametrize("blocks, near", [(1, "2"), (3, "2 or 4"), (7, "6 or 8")])
def test_odd_number_of_blocks_is_refused_with_both_neighbours(blocks, near):
    with pytest.raises(ValueError, match=rf"got {blocks} in .* Use {near}\."):
        small(num_blocks=(2, blocks, 2))


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(channels=(8, 32)), "one entry for each stage"),
        (dict(strides=(1, 2, 0)), "strides of at least 1"),
        (dict(channels=(8, 32, 64)), "Expected 128 channels in stage 3"),
        (dict(strides=(1, 2, 1)), "Expected 32 channels in stage 3"),
        (dict(channels=(1, 4, 16)), "Expected at least 2.* channels in stage 1"),
        (dict(input_shape=(8, 6, 3)), "block_size=2 divides"),
        (dict(pooling="sum"), "pooling must be"),
        (dict(weights="missing.weights.h5"), "path of a file"),
    ],
)
def test_arguments_that_are_no_irevnet_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        small(**arguments)


def test_names_tell_the_stage_and_the_block_of_each_weight():
    model = small()
    body = model.get_layer("body")
    found = {re.search(r"stage(\d)_block(\d+)/", v.path).groups() for v in body.weights}
    expected = {
        (str(stage), str(i))
        for stage, count in enumerate(SMALL["num_blocks"], 1)
        for i in range(1, count + 1)
    }
    assert found == expected
    assert len({v.path for v in model.weights}) == len(model.weights)


def test_published_constants():
    model = small(dropout=0.1)
    norms = [
        x
        for x in model._flatten_layers()
        if isinstance(x, keras.layers.BatchNormalization)
    ]
    assert {(x.momentum, x.epsilon) for x in norms[:-1]} == {(0.9, 1e-5)}
    assert (norms[-1].momentum, norms[-1].epsilon) == (0.1, 1e-5)
    assert len(norms) == 3 * 8 - 1 + 1  # none before the first convolution
    convs = [x for x in model._flatten_layers() if isinstance(x, keras.layers.Conv2D)]
    assert not any(x.use_bias for x in convs)
    rates = [x.rate for x in model._flatten_layers() if hasattr(x, "rate")]
    assert rates == [0.1] * 8


def test_regularizers_reach_every_weight():
    regularizer = keras.regularizers.L2(0.1)
    model = small(kernel_regularizer=regularizer, bias_regularizer=regularizer)
    assert all(v.regularizer is not None for v in model.trainable_variables)
    model = small(kernel_regularizer=regularizer)
    assert all(
        (v.regularizer is not None) == v.path.endswith("kernel")
        for v in model.trainable_variables
    )


@pytest.mark.thorough
def test_network_without_top_takes_every_divisible_size(tmp_path):
    model = randomized(small(include_top=False, input_shape=None))
    body = model.get_layer("body")
    for size in (8, 12):
        x = images(2, size, size, 3)
        y = model(x)
        assert y.shape == (2, size // 4, size // 4, 256)
        np.testing.assert_allclose(body.inverse(body(x)), x, atol=1e-4)
    with pytest.raises(ValueError, match="Resize, crop or pad"):
        model(images(2, 10, 10, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), y)
    np.testing.assert_array_equal(
        loaded.get_layer("body").inverse(body(x)), body.inverse(body(x))
    )


@pytest.mark.thorough
@pytest.mark.parametrize("fraction_bits", [None, 14])
def test_clone_file_and_saved_model_return_the_values_of_the_network(
    tmp_path, fraction_bits
):
    model = randomized(small(dropout=0.1, fraction_bits=fraction_bits))
    x = images(4, *SHAPE)
    expected = model(x)
    body = model.get_layer("body")
    features = body(x)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for copy in (clone, loaded):
        np.testing.assert_array_equal(copy(x), expected)
        np.testing.assert_array_equal(
            copy.get_layer("body").inverse(features), body.inverse(features)
        )
    export.export_saved_model(clone, tmp_path / "1")
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    served = serve(inputs=x)["predictions"]
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_replicas_of_a_strategy_train_like_one_device(two_replicas):
    x, y = images(8, *SHAPE), np.arange(8)

    def fit(**kwargs):
        keras.utils.set_random_seed(3)
        model = small(num_blocks=(2, 2, 2), **kwargs)
        for layer in model._flatten_layers():
            # Each replica has batch statistics of its own.
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        loss = "sparse_categorical_crossentropy"
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    with two_replicas.scope():
        got = fit()
    assert_close(got, fit(recompute=False), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_streams_of_a_mixed_policy_are_float32(policy):
    x = images(2, *SHAPE)
    keras.utils.set_random_seed(3)
    expected = small(classifier_activation=None)(x)
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(3)
    model = small(classifier_activation=None)
    body = model.get_layer("body")
    assert body(x).dtype == body.inverse(body(x)).dtype == "float32"
    error = np.linalg.norm(model(x) - expected) / np.linalg.norm(expected)
    assert error < 2e-2
