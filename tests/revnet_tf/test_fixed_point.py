"""With fixed-point streams the recomputation equals the forward pass bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import images, loss_and_gradients, twins

from revnet_tf import RevBlock, RevSequence, _fixed_point, models, numerics
from revnet_tf._coupling import add, subtract

layers = keras.layers


@pytest.fixture
def same_sums():
    """Turns off the graph optimizer, which reorders sums in ordinary graphs."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def branch():
    return keras.Sequential(
        [
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(2, 3, padding="same", use_bias=False),
            layers.Dropout(0.2),
        ]
    )


def blocks(count, **options):
    return [RevBlock(branch(), branch(), **options) for _ in range(count)]


def stacked(count, formats, recompute):
    """Returns a model of blocks with alternating formats."""
    x = y = keras.Input((4, 4, 4))
    for i in range(count):
        (block,) = blocks(1, fraction_bits=formats[i % len(formats)])
        block.recompute = recompute
        y = block(y)
    return keras.Model(x, y)


def assert_same_bits(pair, x, mode):
    step = loss_and_gradients
    if mode == "graph":
        step = tf.function(step, autograph=False)
    for a, b in zip(*(tf.nest.flatten(step(layer, x)) for layer in pair), strict=True):
        np.testing.assert_array_equal(a, b)


def test_values_become_the_nearest_multiples_of_a_quarter():
    x = tf.constant([0.1, 0.125, 0.13, 0.375, -0.3, 5.0])
    expected = [0.0, 0.0, 0.25, 0.5, -0.25, 5.0]  # a half rounds to even
    for elementary in (True, False):
        quantized = _fixed_point.quantize(x, 2, elementary)
        np.testing.assert_array_equal(quantized, expected)


@pytest.mark.parametrize("elementary", [True, False])
def test_rounding_is_exact_and_its_gradient_one(elementary):
    x = tf.constant(np.random.default_rng(0).normal(size=10_000) * 3, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = _fixed_point.convert(x, 10, elementary)
    np.testing.assert_array_equal(y, np.rint(x * 2.0**10) / 2**10)
    np.testing.assert_array_equal(tape.gradient(y, x), np.ones(10_000))


def test_a_change_is_rounded_once_and_taken_back_to_the_last_bit(run):
    rng = np.random.default_rng(0)
    x, change = rng.normal(size=(2, 10_000)) * 1000  # the range ends at 16,384
    x = np.rint(x * 2**10) / 2**10
    change[::2] = (np.rint(change[::2]) + 0.5) / 2**10  # halves
    x, change = tf.constant(x, tf.float32), tf.constant(change, tf.float32)

    def there_and_back(x, change):
        with tf.GradientTape() as tape:
            tape.watch([x, change])
            y = add(x, change, 10)
        return y, subtract(y, change, 10), *tape.gradient(y, [x, change])

    y, back, *gradients = run(there_and_back)(x, change)
    nearest = np.rint(np.float64(change) * 2**10) / 2**10
    np.testing.assert_array_equal(y, x + nearest)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(gradients, np.ones((2, 10_000)))


def test_the_graph_optimizer_leaves_the_order_of_the_sums_alone():
    # Without `same_sums`, as in `model.fit`. Each branch ends with a sum of its own.
    def branch():
        x = keras.Input((8, 8, 2))
        y = layers.Conv2D(2, 3, padding="same", use_bias=False)(x)
        return keras.Model(x, layers.Add()([x, y]))

    x = y = keras.Input((8, 8, 4))
    for _ in range(4):
        y = RevBlock(branch(), branch(), fraction_bits=14)(y)
    errors = numerics.reconstruction_error(keras.Model(x, y), images(512, 8, 8, 4))
    assert list(errors.values()) == [(0.0, 0.0)] * 4


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_gradients_are_those_of_stored_activations_to_the_last_bit(
    policy, mode, count, same_sums
):
    keras.config.set_dtype_policy(policy)
    pair = twins(lambda: RevSequence(blocks(count), fraction_bits=14), (None, 4, 4, 4))
    assert_same_bits(pair, images(4, 4, 4, 4), mode)


NORMS = {
    "batch": layers.BatchNormalization,
    "group": lambda: layers.GroupNormalization(2),
    "layer": layers.LayerNormalization,
    "none": lambda: layers.Activation("linear"),
}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    "norm",
    [
        "batch",
        pytest.param("group", marks=pytest.mark.thorough),
        pytest.param("layer", marks=pytest.mark.thorough),
        "none",
    ],
)
def test_gradients_have_the_same_bits_with_every_normalization(norm, mode, same_sums):
    def branch():
        conv = layers.Conv2D(4, 3, padding="same", use_bias=False)
        return keras.Sequential([NORMS[norm](), layers.ReLU(), conv])

    def sequence():
        blocks = [RevBlock(branch(), branch()) for _ in range(12)]
        return RevSequence(blocks, fraction_bits=12)

    assert_same_bits(twins(sequence, (None, 8, 8, 8)), images(4, 8, 8, 8), mode)


def test_without_fixed_point_streams_the_gradients_differ(same_sums):
    pair = twins(lambda: RevSequence(blocks(5)), (None, 4, 4, 4))
    with pytest.raises(AssertionError):
        assert_same_bits(pair, images(4, 4, 4, 4), "eager")


@pytest.mark.thorough
@pytest.mark.parametrize("formats", [(12,), (12, None), (12, 14)])
def test_blocks_of_different_formats_do_not_spoil_each_other(formats, same_sums):
    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(0)
        model = stacked(6, formats, recompute)
        step = tf.function(loss_and_gradients, autograph=False)
        results.append(step(model, images(4, 4, 4, 4)))
    exact = None not in formats
    for a, b in zip(*results, strict=True):
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_inverse_returns_the_very_bits(run):
    layer = RevSequence(blocks(20), fraction_bits=10)
    x = _fixed_point.quantize(images(4, 4, 4, 4), 10)
    layer.build(x.shape)
    back = run(lambda x: layer.inverse(layer(x, training=False)))(x)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_pass_a_vectorized_map(recompute):
    dense = [RevBlock(layers.Dense(2), layers.Dense(2)) for _ in range(2)]
    layer = RevSequence(dense, fraction_bits=10, recompute=recompute)
    layer.build((1, 4))
    x = images(3, 4)

    def gradient(call):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(call(x) ** 2)
        return tape.gradient(loss, x)

    def each(x):
        return tf.vectorized_map(lambda t: layer(t[None], training=True), x)

    expected = gradient(lambda x: layer(x, training=True))
    np.testing.assert_allclose(gradient(each), expected, rtol=1e-5, atol=1e-5)


class Scale(layers.Layer):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return self.factor * x


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("factor", [100, -1e5, np.nan])
def test_leaving_the_range_is_an_error_and_nan_under_xla(
    run, request, recompute, factor
):
    layer = RevBlock(
        Scale(factor), Scale(factor), fraction_bits=14, recompute=recompute
    )
    x = np.ones((1, 2), np.float32)  # to 101 and 10,101. The range ends at 1,024.
    layer.build((1, 2))

    def call():
        return run(lambda x: layer(x, training=True))(x)

    if "xla" in request.node.callspec.id:
        assert np.isnan(call()).any()
    else:
        with pytest.raises(tf.errors.InvalidArgumentError, match="fraction_bits=14"):
            call()


@pytest.mark.parametrize("bits", [-1, 23, 1.5, True])
def test_impossible_fraction_bits_are_refused(bits):
    with pytest.raises(ValueError, match="fraction_bits="):
        RevBlock(branch(), branch(), fraction_bits=bits)


def test_streams_of_too_few_digits_are_refused():
    with pytest.raises(ValueError, match="streams in float32 or float64"):
        RevBlock(branch(), branch(), fraction_bits=4, dtype="bfloat16")


def test_sequence_gives_its_format_to_blocks_without_one_and_takes_theirs():
    assert RevSequence(blocks(2, fraction_bits=9)).fraction_bits == 9
    sequence = RevSequence(blocks(1, fraction_bits=8) + blocks(1), fraction_bits=8)
    assert sequence.fraction_bits == 8
    # The sequence does not change the blocks.
    assert [block.fraction_bits for block in sequence.blocks] == [8, None]


@pytest.mark.parametrize("given", [None, 8, 99])
def test_sequence_refuses_blocks_of_another_format_and_leaves_them_alone(given):
    mixed = blocks(1, fraction_bits=9) + blocks(1)
    with pytest.raises(ValueError, match="fraction_bits"):
        RevSequence(mixed, fraction_bits=given)
    assert [block.fraction_bits for block in mixed] == [9, None]


# TensorFlow reorders sums in a large graph that it does not reorder in a small one.
@pytest.mark.parametrize(
    "batch", [4, pytest.param(8000, marks=pytest.mark.thorough)], ids=["small", "large"]
)
def test_revnet_has_the_gradients_of_stored_activations_to_the_last_bit(
    batch, same_sums
):
    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(0)
        model = models.RevNet(
            (2, 2), (8, 8, 16), input_shape=(8, 8, 3), fraction_bits=14
        )
        for layer in model.layers:
            if isinstance(layer, RevSequence):
                layer.recompute = recompute
        step = tf.function(loss_and_gradients, autograph=False)
        results.append(step(model, images(batch, 8, 8, 3)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_thousand_blocks_are_reconstructed_without_an_error(policy):
    keras.config.set_dtype_policy(policy)
    x = keras.Input((4, 4, 4))
    model = keras.Model(x, RevSequence(blocks(1000), fraction_bits=14)(x))
    model.compile(run_eagerly=True)
    errors = numerics.reconstruction_error(model, images(4, 4, 4, 4))
    assert list(errors.values()) == [(0.0, 0.0)] * 1000
