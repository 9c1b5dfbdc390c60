"""The reversible U-Net: counts, gradients, sizes, memory, options."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, images

from revnet_tf import RevSequence, memory, models
from revnet_tf.models._levels import LinearUpsampling

SIZES = {1: (24,), 2: (8, 12), 3: (8, 4, 12)}


def small(rank=2, channels=(8, 12), **kwargs):
    """Returns a network with the same weights in each call."""
    keras.utils.set_random_seed(1)
    kwargs = {"input_shape": (*SIZES[rank], 2), "classes": 3, **kwargs}
    return models.RevUNet(channels, 2, 1, **kwargs)


def results(model, x, run):
    """Returns a loss, its gradients, and the state after the step."""

    @run
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = tf.nest.flatten(model(x, training=True))
            loss = tf.add_n([tf.reduce_sum(tf.sin(3 * y)) for y in outputs])
        weights = [v.value for v in model.trainable_variables]
        return [loss, *tape.gradient(loss, [x, *weights])]

    return [*step(x), *(v.value for v in model.non_trainable_variables)]


def assert_same_gradients(run, rtol, aux=(), sizes=None, **kwargs):
    found = []
    for recompute in (True, False):
        model = small(recompute=recompute, **kwargs)
        layers = [model.get_layer(name).output for name in aux]
        model = keras.Model(model.input, [model.output, *layers])
        dtype = model.dtype_policy.variable_dtype
        x = images(2, *(sizes or SIZES[kwargs["rank"]]), 2, dtype=dtype)
        found.append(results(model, x, run))
    assert_close(*found, rtol=rtol, atol=rtol)


# Float32 tolerances are those of sums of thousands of values.
def test_gradients_of_a_volume_of_any_size_equal_ordinary_backpropagation():
    shape = (None, None, None, 2)
    kwargs = dict(rank=3, channels=(4, 8), input_shape=shape, norm="instance")
    assert_same_gradients(tf.function, 1e-4, sizes=(37, 41, 29), **kwargs)


NORMS = "group", "instance", "batch", keras.layers.LayerNormalization


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("run_in_every_mode", "rank", "norm"),
    [
        *(("graph", 3, norm) for norm in NORMS),
        ("graph", 1, "group"),
        ("eager", 3, "instance"),
        ("xla", 3, "instance"),
        ("xla", 3, "batch"),
    ],
    indirect=["run_in_every_mode"],
)
def test_gradients_equal_ordinary_backpropagation(run_in_every_mode, rank, norm):
    assert_same_gradients(run_in_every_mode, 1e-4, rank=rank, norm=norm)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("run_in_every_mode", "rank", "norm"),
    [
        *(("graph", 2, norm) for norm in NORMS),
        ("graph", 3, "instance"),
        ("eager", 2, "group"),
        ("xla", 2, "group"),
        ("xla", 3, "instance"),
    ],
    indirect=["run_in_every_mode"],
)
def test_gradients_are_exact_in_float64(run_in_every_mode, rank, norm):
    keras.config.set_dtype_policy("float64")
    assert_same_gradients(run_in_every_mode, 1e-9, rank=rank, norm=norm)


@pytest.mark.thorough
@pytest.mark.parametrize("aux", [["encoder1"], ["encoder2", "decoder2", "up1"]])
def test_gradients_of_intermediate_outputs_count(aux):
    keras.config.set_dtype_policy("float64")
    assert_same_gradients(tf.function, 1e-9, aux, rank=2)


@pytest.mark.thorough
def test_fixed_point_gradients_equal_those_of_stored_activations():
    assert_same_gradients(tf.function, 1e-6, rank=2, norm="batch", fraction_bits=12)


@pytest.mark.parametrize(
    ("blocks", "count"),
    [(1, 12_365_283), pytest.param(2, 18_248_403, marks=pytest.mark.thorough)],
)
def test_parameter_counts_are_the_papers(blocks, count):
    model = models.RevUNet(
        encoder_blocks=blocks,
        input_shape=(None, None, None, 4),
        classes=3,
        classifier_activation="sigmoid",
    )
    assert model.count_params() == count


def test_volumes_of_odd_sizes_are_padded_and_cut():
    model = small(3, (8, 8, 8), input_shape=(None, None, None, 2))
    x = images(1, 9, 6, 7, 2)
    y = model(x)
    assert y.shape == (1, 9, 6, 7, 3)
    np.testing.assert_allclose(tf.reduce_sum(y, -1), np.ones(y.shape[:-1]), rtol=1e-5)
    # The padding consists of zeros after the end.
    padded = tf.pad(x, [[0, 0], [0, 3], [0, 2], [0, 1], [0, 0]])
    np.testing.assert_allclose(model(padded)[:, :9, :6, :7], y, atol=1e-6)


def test_known_sizes_that_the_levels_divide_need_no_padding():
    names = {layer.name for layer in small(input_shape=(18, 8, 2)).layers}
    assert not {"padding", "cut"} & names
    assert {"padding", "cut"} <= {x.name for x in small(input_shape=(18, 7, 2)).layers}


def test_layers_of_the_levels_have_stable_names_and_sizes():
    model = small(3, (8, 8, 16), input_shape=(16, 8, 24, 2))
    for prefix in ("encoder", "decoder"):
        for level, channels in enumerate((8, 8, 16)):
            layer = model.get_layer(f"{prefix}{level + 1}")
            assert isinstance(layer, RevSequence)
            sizes = [size // 2**level for size in (16, 8, 24)]
            assert layer.output.shape == (None, *sizes, channels)
    assert model.get_layer("predictions").output is model.output
    assert len(model.get_layer("encoder2").blocks) == 2
    assert len(model.get_layer("decoder2").blocks) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 1)])
def test_bilinear_upsampling_is_that_of_tensorflow(size, run):
    x = images(2, *size, 3)
    expected = tf.image.resize(x, [2 * s for s in size], "bilinear")

    def step(x, upsample):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = upsample(x)
            loss = tf.reduce_sum(tf.sin(y))
        return y, tape.gradient(loss, x)

    ours = run(lambda x: step(x, LinearUpsampling()))(x)
    theirs = step(x, lambda x: tf.image.resize(x, [2 * s for s in size], "bilinear"))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours[0].shape == expected.shape


def test_trilinear_upsampling_is_bilinear_in_each_plane():
    x = images(2, 3, 4, 5, 2)
    # The axes are interpolated one after the other, in any order.
    planes = tf.reshape(x, [6, 4, 5, 2])
    planes = tf.reshape(tf.image.resize(planes, [8, 10]), [2, 3, 80, 2])
    expected = tf.reshape(tf.image.resize(planes, [6, 80]), [2, 6, 8, 10, 2])
    step = tf.function(
        LinearUpsampling(), input_signature=[tf.TensorSpec([None] * 4 + [2])]
    )
    np.testing.assert_allclose(step(x), expected, atol=1e-6)


def test_the_encoder_stores_no_activations():
    model = small(channels=(8, 16), input_shape=(128, 128, 1), norm="batch")
    estimate = memory.estimate(model, 1)
    values = 128 * 128 * 4  # the bytes of a channel of level 1
    # The input, the outputs of both levels of the decoder, and the output.
    stored = values * (1 + 8 + 16 / 4 + 3)
    kept = estimate.activation_bytes - estimate.working_set_bytes
    assert stored <= kept < 1.05 * stored


@pytest.mark.thorough
def test_a_saved_network_computes_the_same(tmp_path):
    model = small(3, input_shape=(None, None, None, 2), kernel_regularizer="l2")
    x = images(1, 9, 10, 11, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    model.save_weights(tmp_path / "some.weights.h5")
    again = models.RevUNet(
        (8, 12),
        2,
        input_shape=(None, None, None, 2),
        classes=3,
        weights=tmp_path / "some.weights.h5",
    )
    np.testing.assert_array_equal(again(x), model(x))


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_predictions_and_streams_are_float32_under_a_mixed_policy(policy):
    keras.config.set_dtype_policy(policy)
    model = small(3, input_shape=(9, 8, 8, 2))
    model.compile("sgd", "categorical_crossentropy")
    assert model.get_layer("encoder2").output.dtype == "float32"
    x = images(1, 9, 8, 8, 2)
    y = model(x)
    assert y.dtype == tf.float32
    np.testing.assert_allclose(tf.reduce_sum(y, -1), np.ones(y.shape[:-1]), rtol=1e-5)
    assert np.isfinite(model.train_on_batch(x, tf.one_hot(tf.argmax(y, -1), 3)))


def test_norm_groups_are_the_largest_divisor_up_to_30():
    def groups(channels, norm):
        model = models.RevUNet((channels,), input_shape=(4, 4, 1), classes=2, norm=norm)
        return model.get_layer("encoder1").blocks[0].f.layers[0].groups

    assert groups(60, "group") == 30
    assert groups(64, "group") == 16
    assert groups(128, "instance") == 64


def test_input_tensor_is_used():
    x = keras.Input((8, 8, 2))
    scaled = keras.layers.Rescaling(1 / 255)(x)
    assert small(input_tensor=scaled).input is x


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(channels=(8, 7)), r"\[7\] cannot be split"),
        (dict(channels=()), "at least one level"),
        (dict(encoder_blocks=(1, 2, 3)), r"encoder_blocks=\(1, 2, 3\)"),
        (dict(decoder_blocks=0), r"decoder_blocks=\(0, 0\)"),
        (dict(input_shape=(8,)), "Use .depth, height, width, channels. for volumes"),
        (dict(input_shape=(8, 8, 8, 8, 1)), "one, two or three sizes"),
        (dict(input_shape=(8, 8, None)), "Only sizes may be None"),
        (dict(classes=0), "classes=0"),
        (dict(norm="layer"), "norm='layer'"),
        (dict(weights="imagenet"), "weights="),
        (dict(fraction_bits=40), "fraction_bits=40"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, message):
    arguments = {"channels": (8, 8), "input_shape": (8, 8, 1), "classes": 2} | arguments
    with pytest.raises(ValueError, match=message):
        models.RevUNet(**arguments)
