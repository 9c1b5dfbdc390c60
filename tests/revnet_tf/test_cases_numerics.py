"""Cases of shapes, channel layouts, dtypes and numerics, D01 to D14.

The cases are reports of users of such layers; tests/CASES.md lists them. `test_layers`
tests D01, odd widths, and D04, branches that change the shape.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    assert_close,
    assert_same_state,
    conv_branch,
    conv_sequence,
    images,
    loss_and_gradients,
    twins,
)

from revnet_tf import RevBlock, RevSequence, models
from revnet_tf.layers import DownsamplingBlock, PoolingShortcut

layers = keras.layers

# Together they take longer than all other tests.


@pytest.fixture
def channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


def dense_block(units=4, **kwargs):
    return RevBlock(layers.Dense(units, "tanh"), layers.Dense(units, "tanh"), **kwargs)


def relative_errors(got, expected):
    return [
        np.linalg.norm(np.asarray(a, "float64") - b) / max(1e-6, np.linalg.norm(b))
        for a, b in zip(got, expected, strict=True)
    ]


# D02


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((3, 6, 5), 1),
        ((3, 5, 6), -1),
        ((3, 6, 4, 5), 1),
        ((3, 4, 6, 5), -2),
        ((3, 4, 5, 6), -1),
        ((3, 6, 2, 4, 5), 1),
        ((3, 2, 4, 5, 6), -1),
    ],
)
def test_d02_gradients_equal_autodiff_on_any_axis(shape, axis):
    def branch():
        norm = layers.BatchNormalization(axis, momentum=0.9)
        return keras.Sequential([norm, layers.Dense(shape[-1] // inner, "tanh")])

    inner = 2 if axis == -1 else 1
    layer, twin = twins(lambda: RevBlock(branch(), branch(), axis=axis), shape)
    x = images(*shape)
    step = tf.function(loss_and_gradients, autograph=False)
    assert_close(step(layer, x), step(twin, x), rtol=1e-4, atol=1e-5)
    assert_same_state(layer, twin)


# D03


def test_d03_channels_first_norm_and_dense_branches_equal_autodiff():
    def branch():
        return keras.Sequential(
            [
                layers.BatchNormalization(axis=1, momentum=0.9),
                layers.GroupNormalization(2, axis=1),
                layers.Dense(5, "tanh"),
            ]
        )

    shape = (3, 8, 5, 5)
    layer, twin = twins(lambda: RevBlock(branch(), branch(), axis=1), shape)
    x = images(*shape)
    got, expected = loss_and_gradients(layer, x), loss_and_gradients(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_d03_channels_first_convolution_works_or_fails_as_the_twin(rank):
    # TensorFlow's build decides whether the kernel exists on a CPU. The block must give
    # the same result, or the same error.
    conv = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}[rank]

    def make():
        f, g = (conv(2, 3, padding="same", data_format="channels_first") for _ in "fg")
        return RevBlock(f, g, axis=1)

    def outcome(layer):
        try:
            return loss_and_gradients(layer, x)
        except tf.errors.OpError as error:
            return type(error)

    shape = (2, 4, *[5] * rank)
    x = images(*shape)
    layer, twin = twins(make, shape)
    got, expected = outcome(layer), outcome(twin)
    if isinstance(expected, type):
        assert got is expected
    else:
        assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: layers.Conv2D(4, 3, padding="same", groups=2),
        lambda: layers.Conv1D(4, 3, padding="same", groups=4),
    ],
    ids=["2d", "1d"],
)
def test_d03_convolution_that_keras_compiles_by_itself_equals_autodiff(conv):
    # For groups, and for three dimensions with channels first, Keras's layer wraps the
    # operation in a new `tf.function` in every call.
    shape = (2, 5, 5, 8) if conv().rank == 2 else (2, 5, 8)
    layer, twin = twins(lambda: RevBlock(conv(), conv()), shape)
    x = images(*shape)
    expected = loss_and_gradients(twin, x)
    assert_close(loss_and_gradients(layer, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [models.RevNet, models.ResNet])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_d03_networks_are_channels_last_whatever_the_keras_default(
    network, bottleneck, channels_first
):
    # Their docstrings say: images are (batch, height, width, channels).
    arguments = dict(input_shape=(8, 8, 3), classes=4)
    model = network((1, 1), (8, 8, 16), bottleneck, **arguments)
    keras.config.set_image_data_format("channels_last")
    expected = network((1, 1), (8, 8, 16), bottleneck, **arguments)
    expected.set_weights(model.get_weights())
    x = images(2, 8, 8, 3)
    np.testing.assert_allclose(model(x), expected(x), rtol=1e-5, atol=1e-6)


# D05


@pytest.mark.thorough
def test_d05_batches_of_different_sizes_train_under_two_replicas(two_replicas):
    sizes = [(32, 32), (48, 40), (33, 35)]

    def batches():
        for i, size in enumerate(sizes):
            yield images(4, *size, 3, seed=i), images(4, 1, seed=i)

    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((None, None, None, 3)),
            tf.TensorSpec((None, 1)),
        ),
    ).apply(tf.data.experimental.assert_cardinality(len(sizes)))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    data = data.with_options(options)

    def conv():  # No batch statistics: those are of one replica.
        return layers.Conv2D(4, 3, padding="same", activation="tanh")

    weights = []
    for strategy in (two_replicas, tf.distribute.get_strategy()):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            x = keras.Input((None, None, 3))
            y = layers.Conv2D(8, 1)(x)
            y = RevSequence([RevBlock(conv(), conv()) for _ in "ab"])(y)
            y = layers.Dense(1)(layers.GlobalAveragePooling2D()(y))
            model = keras.Model(x, y)
            model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(data, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_d05_bottleneck_network_takes_odd_sizes():
    model = models.RevNet((1, 1), (8, 8, 16), True, include_top=False, pooling="avg")
    for size in ((8, 8), (9, 7)):
        assert model(images(2, *size, 3), training=True).shape == (2, 64)


def test_d05_networks_of_the_paper_take_odd_sizes():
    gradients = []
    for recompute in (True, False):
        keras.utils.set_random_seed(0)
        model = models.RevNet(
            (1, 1), (8, 8, 16), include_top=False, recompute=recompute
        )
        gradients.append(loss_and_gradients(model, images(2, 9, 7, 3)))
    assert model(images(2, 33, 35, 3)).shape == (2, 17, 18, 16)
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


# D06


def kept_and_open():
    return {
        "block": RevBlock(conv_branch(8), conv_branch(8)),
        "sequence": conv_sequence(channels=16),
        "downsampling": DownsamplingBlock(
            layers.Conv2D(8, 3, 2, padding="same"),
            conv_branch(8),
            PoolingShortcut(8, 2),
            PoolingShortcut(8, 2),
        ),
        "pooling": PoolingShortcut(16, 2),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", kept_and_open())
def test_d06_channels_stay_known_in_a_function_of_open_sizes(name, training):
    layer = kept_and_open()[name]
    shapes = []

    @tf.function(autograph=False)
    def function(x):
        y = layer(x, training=training) if takes_training else layer(x)
        shapes.append(y.shape.as_list())
        return y

    takes_training = name != "pooling"
    layer.build((None, None, None, 16))
    function.get_concrete_function(tf.TensorSpec((None, None, None, 16)))
    assert shapes == [[None, None, None, 16]]


@pytest.mark.parametrize("name", kept_and_open())
def test_d06_computed_output_shape_is_that_of_the_output(name):
    layer = kept_and_open()[name]
    y = layer(images(3, 8, 6, 16))
    assert tuple(layer.compute_output_shape((3, 8, 6, 16))) == tuple(y.shape)


# D07 (blocks: test_coupling, inverse: test_layers)


@pytest.mark.thorough
def test_d07_network_in_float64_equals_autodiff_to_its_precision():
    keras.config.set_dtype_policy("float64")
    nets = []
    for recompute in (True, False):
        keras.utils.set_random_seed(1)
        nets.append(
            models.RevNet(
                (2, 2), (8, 8, 16), input_shape=(8, 8, 3), recompute=recompute
            )
        )
    x = images(4, 8, 8, 3, dtype="float64")
    step = tf.function(loss_and_gradients, autograph=False)
    got, expected = (step(net, x) for net in nets)
    assert all(value.dtype == tf.float64 for value in got)
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_d07_reconstruction_in_float64_is_exact_to_a_few_last_places():
    sequence = conv_sequence(num_blocks=4, dropout=0.0, dtype="float64")
    x = images(3, 6, 6, 8, dtype="float64")
    y = sequence(x, training=True)
    np.testing.assert_allclose(sequence.inverse(y, training=True), x, atol=1e-13)


# D08


def test_d08_float16_with_one_large_bright_image_never_makes_a_weight_nan():
    keras.config.set_dtype_policy("mixed_float16")

    def branch():
        return keras.Sequential(
            [layers.BatchNormalization(), layers.ReLU(), layers.Dense(2)]
        )

    x = keras.Input((256, 256, 4))
    y = RevSequence([RevBlock(branch(), branch()) for _ in "ab"])(x)
    y = layers.Dense(1, dtype="float32")(layers.GlobalAveragePooling2D()(y))
    model = keras.Model(x, y)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    x = 100 * images(1, 256, 256, 4)
    model.fit(x, images(1, 1), epochs=3, verbose=0)
    assert all(np.all(np.isfinite(v.numpy())) for v in model.variables)


def test_d08_steps_that_overflow_in_float16_are_skipped():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential(
        [keras.Input((8,)), dense_block(), layers.Dense(1, dtype="float32")]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**40
    )
    model.compile(optimizer, "mse")
    before = model.get_weights()
    model.fit(images(4, 8), images(4, 1), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(optimizer.dynamic_scale) == 2.0**39


# D09


class DtypeRecorder(layers.Layer):
    def __init__(self, seen):
        super().__init__()
        self.record = seen.append

    def call(self, x):
        self.record(x.dtype.name)
        return x


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_d09_forward_pass_and_recomputation_compute_in_one_dtype(compute, mode):
    keras.config.set_dtype_policy(f"mixed_{compute}")
    seen = []
    block = RevBlock(
        *(keras.Sequential([DtypeRecorder(seen), layers.Dense(4)]) for _ in "fg")
    )
    block.build((None, 8))
    block(images(3, 8), training=True)  # The first call also traces it.
    seen.clear()
    step = loss_and_gradients
    if mode == "graph":
        step = tf.function(step, autograph=False)
    step(block, images(3, 8))
    assert seen == [compute] * 4  # f and g, in both evaluations


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_d09_mixed_gradients_are_near_those_of_float32(compute):
    nets = []
    for policy in (f"mixed_{compute}", "float32"):
        keras.config.set_dtype_policy(policy)
        nets.append(twins(lambda: conv_sequence(dropout=0.0), (None, 6, 6, 8)))
    x = images(4, 6, 6, 8)
    got = loss_and_gradients(nets[0][0], x)
    expected = loss_and_gradients(nets[1][1], x)

    def flat(gradients):  # All together: for a bias before a norm it is only noise.
        return np.concatenate([np.ravel(gradient) for gradient in gradients])

    errors = relative_errors(
        [*got[:2], flat(got[2:])], [*expected[:2], flat(expected[2:])]
    )
    assert max(errors) < 2e-2


# D10


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_d10_a_model_trains_under_any_policy_without_a_change(policy):
    keras.config.set_dtype_policy(policy)
    x = keras.Input((8,))
    y = RevSequence([dense_block(), dense_block()])(dense_block()(x))
    model = keras.Model(x, layers.Dense(1, dtype="float32")(y))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x = images(32, 8)
    history = model.fit(x, x[:, :1], epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


@pytest.mark.parametrize(
    "policy, f_dtype",
    [
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "mixed_float16"),
        ("float32", "mixed_float16"),
        ("float32", "float64"),
    ],
)
def test_d10_a_dtype_of_the_branch_alone_equals_autodiff(policy, f_dtype):
    keras.config.set_dtype_policy(policy)

    def make():
        return RevBlock(layers.Dense(4, "tanh", dtype=f_dtype), layers.Dense(4, "tanh"))

    layer, twin = twins(make, (None, 8))
    x = images(5, 8)
    assert layer(x, training=True).dtype == tf.float32
    step = tf.function(loss_and_gradients, autograph=False)
    # One block. The streams of both evaluations differ in float32's last places.
    tolerance = 2**-7 if "bfloat16" in policy else 2**-10
    assert max(relative_errors(step(layer, x), step(twin, x))) < tolerance


# D11


def test_d11_resizing_branch_in_mixed_precision_compiles_and_equals_autodiff():
    keras.config.set_dtype_policy("mixed_float16")

    def branch():
        return keras.Sequential(
            [
                layers.Conv2D(2, 3, padding="same"),
                layers.UpSampling2D(2, interpolation="bilinear"),
                layers.AveragePooling2D(2),
            ]
        )

    shape = (2, 6, 6, 4)
    layer, twin = twins(lambda: RevBlock(branch(), branch()), shape)
    x = images(*shape)
    step = tf.function(loss_and_gradients, autograph=False, jit_compile=True)
    got = step(layer, x)
    assert all(value.dtype == tf.float32 for value in got)
    # Where the streams differ, a value may round to the next float16 value.
    assert max(relative_errors(got, step(twin, x))) < 2**-10


# D12


def deep_sequence(depth, scale=1, policy="float32"):
    """Returns blocks with norms. Their weights are `scale` times the usual ones."""
    keras.config.set_dtype_policy(policy)

    def block():
        kernel = keras.initializers.VarianceScaling(scale**2, "fan_avg", "uniform")
        dense = layers.Dense(4, "relu", kernel_initializer=kernel)
        return RevBlock(
            keras.Sequential([layers.BatchNormalization(), dense]),
            layers.BatchNormalization(),
        )

    return RevSequence([block() for _ in range(depth)])


@pytest.mark.parametrize(
    "depth, scale, policy, bound",
    [
        pytest.param(100, 1, "float32", 1e-3, marks=pytest.mark.thorough),
        (10, 3, "float32", 1e-3),
        # Some values of a branch round to another bfloat16 value: a difference of 2^-8.
        (10, 3, "mixed_bfloat16", 2e-2),
    ],
)
def test_d12_drift_of_a_deep_stack_in_training_is_bounded(depth, scale, policy, bound):
    sequence = deep_sequence(depth, scale, policy)
    x = images(16, 8)
    y = sequence(x, training=True)
    (error,) = relative_errors([sequence.inverse(y, training=True)], [x])
    assert error < bound


@pytest.mark.thorough
@pytest.mark.parametrize(
    "dtype, bound",
    # Without norms, the blocks before a block amplify its error.
    [("float64", 1e-9), ("float32", 1e-2)],
)
def test_d12_gradient_through_a_hundred_blocks_equals_autodiff(dtype, bound):
    keras.config.set_dtype_policy(dtype)
    layer, twin = twins(
        lambda: RevSequence([dense_block() for _ in range(100)]), (None, 8)
    )
    x = images(16, 8, dtype=dtype)
    got, expected = loss_and_gradients(layer, x), loss_and_gradients(twin, x)
    assert max(relative_errors(got, expected)) < bound


# D13


def test_d13_an_empty_batch_gives_zero_gradients(run):
    layer, _ = twins(
        lambda: RevSequence([dense_block(8), dense_block(8)]), (None, 8, 8, 16)
    )
    loss, *gradients = run(loss_and_gradients)(layer, images(0, 8, 8, 16))
    assert float(loss) == 0
    assert gradients[0].shape == (0, 8, 8, 16)
    for gradient in gradients[1:]:
        assert not np.any(gradient)


def test_d13_an_empty_batch_through_batch_norm_gives_the_values_of_the_twin():
    # Keras's layer divides by the number of samples: its statistics become NaN.
    layer, twin = twins(lambda: conv_sequence(dropout=0.0), (None, 6, 6, 8))
    x = images(0, 6, 6, 8)
    got, expected = loss_and_gradients(layer, x), loss_and_gradients(twin, x)
    assert_close(got, expected, rtol=0, atol=0)
    assert_same_state(layer, twin)


def test_d13_a_replica_without_samples_changes_nothing_else(two_replicas):
    # 9 samples in batches of 8. The last batch is empty on one replica.
    data = tf.data.Dataset.from_tensor_slices((images(9, 8), images(9, 1)))
    weights = []
    for recompute in (True, False):
        keras.utils.set_random_seed(1)
        with two_replicas.scope():
            x = keras.Input((8,))
            y = RevSequence([dense_block(), dense_block()], recompute=recompute)(x)
            model = keras.Model(x, layers.Dense(1)(y))
            model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(data.batch(8), epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert all(np.all(np.isfinite(w)) for w in weights[0])
    assert_close(*weights, rtol=1e-4, atol=1e-5)


# D14


class LayerScale(layers.Layer):
    """A branch with a weight that Keras casts, and one that Keras does not cast."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones")
        self.gain = self.add_weight(shape=(), initializer="ones", autocast=False)

    def call(self, x):
        return x * self.scale * tf.cast(self.gain, x.dtype)


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_d14_a_scale_of_the_branch_is_cast_in_both_passes(compute):
    keras.config.set_dtype_policy(f"mixed_{compute}")

    def branch():
        return keras.Sequential([layers.Dense(4, "tanh"), LayerScale()])

    layer, twin = twins(lambda: RevBlock(branch(), branch()), (None, 8))
    x = images(5, 8)
    step = tf.function(loss_and_gradients, autograph=False)
    got, expected = step(layer, x), step(twin, x)
    assert all(value.dtype == tf.float32 for value in got)
    tolerance = 2**-10 if compute == "float16" else 2**-7
    assert max(relative_errors(got, expected)) < tolerance
    assert all(np.any(gradient) for gradient in got)
