"""Cases of norms, dropout, losses and masks, C03 to C20.

The cases are reports from users of other libraries. tests/CASES.md lists them, and
names the tests of cases that are in other files.
"""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    assert_close,
    assert_same_state,
    images,
    loss_and_gradients,
    twins,
)

from revnet_tf import RevBlock, RevSequence, models

layers = keras.layers

# Together they take longer than all other tests.


def norm_branch(dropout=0.0, **kwargs):
    stack = [
        layers.BatchNormalization(momentum=0.9, **kwargs),
        layers.Dense(4, "tanh"),
    ]
    if dropout:
        stack.append(layers.Dropout(dropout, seed=1))
    return keras.Sequential(stack)


def norm_sequence(num_blocks=2, **kwargs):
    return RevSequence(
        [
            RevBlock(norm_branch(**kwargs), norm_branch(**kwargs))
            for _ in range(num_blocks)
        ]
    )


def compiled(make, recompute, learning_rate=0.1, **kwargs):
    """Returns a model of one reversible layer and a head, always with equal weights."""
    keras.utils.set_random_seed(2)
    layer = make()
    layer.recompute = recompute
    model = keras.Sequential([keras.Input((8,)), layer, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(learning_rate), "mse", **kwargs)
    return model


def batches(num_samples, batch_size):
    data = images(num_samples, 8), images(num_samples, 1, seed=1)
    return tf.data.Dataset.from_tensor_slices(data).batch(batch_size)


def trained(make, recompute, scope, data, **kwargs):
    """Returns all weights, with the state, after an epoch."""
    with scope.scope():
        model = compiled(make, recompute, **kwargs)
    model.fit(data, verbose=0, shuffle=False)
    return model.get_weights()


def test_c03_c11_replicas_with_dropout_have_the_gradients_of_the_twin(two_replicas):
    # The second batch has two samples, and starts from changed statistics and seeds.
    with two_replicas.scope():
        pair = twins(lambda: norm_sequence(1, dropout=0.5), (None, 8))
    results = []
    for layer in pair:

        @tf.function(autograph=False)
        def step(x, layer=layer):
            return two_replicas.run(loss_and_gradients, (layer, x))

        rows = []
        for x, _ in two_replicas.experimental_distribute_dataset(batches(10, 8)):
            values = map(two_replicas.experimental_local_results, step(x))
            rows += [value for replicas in values for value in replicas]
        assert len(rows) == 2 * 2 * (2 + len(layer.trainable_variables))
        results.append(rows)
    assert_close(*results, rtol=1e-4, atol=1e-5)
    assert_same_state(*pair)


@pytest.mark.parametrize("num_samples", [10, 9], ids=["uneven", "missing"])
def test_c03_c11_fit_with_dropout_and_a_small_last_batch_equals_the_twin(
    two_replicas, num_samples
):
    # The second replica gets none of the last batch of 9 samples. Its statistics become
    # NaN, those of the twin, too.
    results = [
        trained(
            lambda: norm_sequence(1, dropout=0.5),
            recompute,
            two_replicas,
            batches(num_samples, 8),
        )
        for recompute in (True, False)
    ]
    assert_close(*results, rtol=1e-4, atol=1e-5)
    if num_samples == 10:
        assert all(np.all(np.isfinite(w)) for w in results[0])


def test_c04_another_trace_does_not_move_the_random_stream():
    losses = []
    for traced_again in (False, True):
        keras.utils.set_random_seed(2)
        layer = norm_sequence(dropout=0.5)
        step = tf.function(loss_and_gradients, autograph=False)
        layer.build((None, 8))
        row = [step(layer, images(4, 8))[0]]
        if traced_again:
            step.get_concrete_function(layer, tf.TensorSpec((7, 8)))
        row += [step(layer, images(4, 8))[0] for _ in range(2)]
        losses.append([float(value) for value in row])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_c05_a_saved_model_goes_on_with_the_same_masks(tmp_path):
    # Keras leaves the state of a `SeedGenerator` out of its files, also without this
    # library. The test restores the state itself.
    data = images(8, 8), images(8, 1, seed=1)
    results = []
    for recompute in (True, False):
        model = compiled(lambda: norm_sequence(dropout=0.5), recompute)
        for _ in range(2):
            model.train_on_batch(*data)
        model.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
        for v, w in zip(resumed.variables, model.variables, strict=True):
            if "seed_generator" in v.path:
                v.assign(w)
        assert_same_state(resumed, model)
        results.append([m.train_on_batch(*data) for m in (model, resumed)])
        model.reset_metrics()
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


@pytest.mark.parametrize(
    "argument",
    [
        dict(axis=1),
        dict(recompute=False),
        dict(dtype="float64"),
        dict(trainable=False),
        dict(name="other"),
        dict(activity_regularizer=keras.regularizers.L2(0.5)),
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_c06_every_argument_of_a_block_survives_the_config(argument):
    block = RevBlock(layers.Dense(4), layers.Dense(4, "tanh"), **argument)
    clone = RevBlock.from_config(block.get_config())
    (name,) = argument
    if name == "dtype":
        assert clone.dtype_policy == block.dtype_policy
        assert clone.compute_dtype == "float64"
    elif name == "activity_regularizer":
        assert clone.activity_regularizer.get_config() == {"l2": 0.5}
    else:
        assert getattr(clone, name) == getattr(block, name) == argument[name]
    assert clone.g.activation is block.g.activation


@pytest.mark.thorough
def test_c07_c08_synchronized_norms_on_two_replicas_train_like_one_device(two_replicas):
    # The two sums round in different ways, and 50 steps amplify the difference.
    def make():
        return norm_sequence(synchronized=True)

    data = batches(8, 8).repeat(50)
    one_device = tf.distribute.get_strategy()
    expected = trained(make, False, one_device, data, learning_rate=0.02)
    got = trained(make, True, two_replicas, data, learning_rate=0.02)
    assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_c08_one_step_of_synchronized_norms_is_that_of_the_global_batch(two_replicas):
    def make():
        return norm_sequence(synchronized=True)

    expected = trained(make, False, tf.distribute.get_strategy(), batches(8, 8))
    got = trained(make, True, two_replicas, batches(8, 8))
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_c09_convolutions_with_synchronized_norms_train_in_mixed_precision(
    two_replicas,
):
    keras.config.set_dtype_policy("mixed_float16")

    def branch():
        norm = layers.BatchNormalization(momentum=0.9, synchronized=True)
        return keras.Sequential([norm, layers.Conv2D(2, 3, padding="same")])

    def losses(recompute):
        keras.utils.set_random_seed(2)
        with two_replicas.scope():
            block = RevBlock(branch(), branch(), recompute=recompute)
            model = keras.Sequential(
                [
                    keras.Input((6, 6, 4)),
                    block,
                    layers.GlobalAveragePooling2D(dtype="float32"),
                ]
            )
            model.compile(keras.optimizers.SGD(0.1), "mse")
        data = images(8, 6, 6, 4), images(8, 4)
        return model.fit(*data, epochs=2, batch_size=8, verbose=0).history["loss"]

    expected = losses(False)
    # 2^-10 is the spacing of float16 values.
    np.testing.assert_allclose(losses(True), expected, rtol=2**-9)


def test_c10_statistics_over_one_element_are_finite(run):
    def branch():
        norm = layers.BatchNormalization(momentum=0.9)
        return keras.Sequential([norm, layers.Conv2D(4, 1)])

    layer, twin = twins(lambda: RevBlock(branch(), branch()), (None, 1, 1, 8))
    x = images(1, 1, 1, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert_same_state(layer, twin)
    assert all(np.all(np.isfinite(v.numpy())) for v in layer.variables)


def test_c10_a_single_image_trains_a_net_down_to_one_pixel():
    model = models.RevNet((1, 1, 1, 1, 1, 1), (4,) * 7, input_shape=(32, 32, 3))
    assert model.get_layer("stage6").output.shape == (None, 1, 1, 4)
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    for _ in range(2):
        assert np.isfinite(model.train_on_batch(images(1, 32, 32, 3), np.zeros(1)))
    assert all(np.all(np.isfinite(v.numpy())) for v in model.variables)


def test_c12_a_model_trained_on_two_replicas_is_saved_like_the_twin(
    two_replicas, tmp_path
):
    # Keras has moving statistics for each replica, also without this library. A file
    # and a call outside of a replica read those of the first replica. `evaluate` on two
    # replicas therefore differs from the file.
    x = images(6, 8)
    predictions = []
    for recompute in (True, False):
        with two_replicas.scope():
            model = compiled(norm_sequence, recompute)
        model.fit(batches(16, 8), verbose=0, shuffle=False)
        norm = model.layers[0].blocks[0].f.layers[0]
        means = two_replicas.experimental_local_results(norm.moving_mean.value)
        assert not np.array_equal(*means)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        saved = loaded.layers[0].blocks[0].f.layers[0].moving_mean
        np.testing.assert_array_equal(saved.numpy(), means[0].numpy())
        predictions.append(loaded(x))
        np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5, atol=1e-6)
    assert_close(*[[y] for y in predictions], rtol=1e-4, atol=1e-5)


def test_c13_a_frozen_block_does_not_change_until_it_is_trainable():
    data = images(24, 8), images(24, 1, seed=1)
    results = []
    for recompute in (True, False):
        model = compiled(norm_sequence, recompute)
        frozen = model.layers[0].blocks[1]
        frozen.trainable = False
        model.compile(keras.optimizers.SGD(0.1), "mse")
        before = [v.numpy() for v in frozen.variables]
        model.fit(*data, batch_size=8, verbose=0, shuffle=False)
        for v, old in zip(frozen.variables, before, strict=True):
            np.testing.assert_array_equal(v.numpy(), old, err_msg=v.path)
        results.append(model.get_weights())
        frozen.trainable = True
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(*data, batch_size=8, verbose=0, shuffle=False)
        for v, old in zip(frozen.variables, before, strict=True):
            assert not np.array_equal(v.numpy(), old), v.path
        results.append(model.get_weights())
    for got, expected in zip(results[:2], results[2:], strict=True):
        assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Flag(layers.Layer):
    """A branch that records the `training` of its calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flags = []

    def call(self, x, training=None):
        if not isinstance(x, keras.KerasTensor):
            self.flags.append(training)
        return 0.5 * x

    def compute_output_shape(self, input_shape):
        return input_shape


@pytest.mark.parametrize("eagerly", [True, False])
def test_c14_branches_are_told_training_in_fit_and_not_in_evaluate(eagerly):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
    block = RevBlock(Flag(), Flag())
    model.add(block)
    model.compile("sgd", "mse", run_eagerly=eagerly)
    data = images(4, 8), images(4, 8)

    def flags(call):
        block.f.flags.clear()
        block.g.flags.clear()
        call()
        assert block.f.flags == block.g.flags
        return {*block.f.flags}

    assert flags(lambda: model.fit(*data, verbose=0)) == {True}
    assert flags(lambda: model.evaluate(*data, verbose=0)) == {False}
    assert flags(lambda: model.predict(data[0], verbose=0)) == {False}


def test_c14_inference_under_a_tape_is_inference_in_the_gradient(run):
    block = RevBlock(Flag(), keras.Sequential([layers.BatchNormalization(), Flag()]))
    block.build((None, 8))
    before = [v.numpy() for v in block.variables]

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = block(x, training=False)
        return tape.gradient(y, x)

    d = run(gradient)(images(3, 8))
    assert {*block.f.flags} == {*block.g.layers[1].flags} == {False}
    # With the initial statistics, 0 and 1: y1 = x1 + x2 / 2 and y2 = x2 + c y1.
    c = 0.5 / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(d[:, :4], 1 + c, rtol=1e-5)
    np.testing.assert_allclose(d[:, 4:], 0.5 * (1 + c) + 1, rtol=1e-5)
    for v, old in zip(block.variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), old)


def test_c15_a_weight_is_regularized_once_however_often_the_model_is_called():
    shared = layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.5))
    block = RevBlock(shared, shared)
    model = keras.Sequential([keras.Input((8,)), RevSequence([block, block])])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = images(4, 8)

    def check():
        (loss,) = model.losses
        np.testing.assert_allclose(loss, 0.5 * np.sum(shared.kernel.numpy() ** 2), 1e-5)

    check()
    for _ in range(5):
        model(x, training=True)
        check()
    # The gradient of 0.5 w^2 is w. Without another loss a step takes a tenth of w.
    before = shared.kernel.numpy()
    y = model(x)
    model.train_on_batch(x, y)
    check()
    changed = shared.kernel.numpy()
    np.testing.assert_allclose(changed, 0.9 * before, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("eagerly", [True, False])
def test_c16_losses_of_the_branches_train_a_model_like_the_twin(eagerly):
    class AddsLoss(layers.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(shape=(input_shape[-1],), initializer="ones")

        def call(self, x):
            y = tf.tanh(self.w * x)
            self.add_loss(0.1 * tf.reduce_mean(y**2))
            return y

    def make():
        return RevBlock(layers.Dense(4, activity_regularizer="l2"), AddsLoss())

    results = []
    for recompute in (True, False):
        model = compiled(make, recompute, run_eagerly=eagerly)
        losses = [
            model.train_on_batch(images(8, 8), images(8, 1, seed=1)) for _ in range(3)
        ]
        results.append([np.asarray(losses), *model.get_weights()])
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_c18_all_branches_start_different_and_a_seed_brings_them_back():
    def kernels():
        keras.utils.set_random_seed(3)
        blocks = [RevBlock(layers.Dense(4), layers.Dense(4)) for _ in range(4)]
        sequence = RevSequence(blocks)
        sequence.build((None, 8))
        return [v.numpy() for v in sequence.variables if v.name == "kernel"]

    first = kernels()
    assert len({k.tobytes() for k in first}) == len(first) == 8
    for a, b in zip(kernels(), first, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["pair", "tensor"])
def test_c19_streams_swapped_between_blocks_have_the_gradients_of_the_twin(run, kind):
    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(7)
        blocks = [
            RevBlock(norm_branch(), norm_branch(), recompute=recompute) for _ in "abc"
        ]
        x = [images(5, 4), images(5, 4, seed=1)]
        if kind == "tensor":
            x = tf.concat(x, -1)

        def gradients(x, blocks=blocks, kind=kind):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = x
                for block in blocks:
                    y = block(y, training=True)
                    if kind == "pair":
                        y = y[::-1]  # the tensors that the block returned
                    else:
                        y = tf.concat([y[:, 4:], y[:, :4]], -1)
                loss = tf.reduce_sum(tf.sin(1.5 * tf.concat(y, -1)))
            weights = [v.value for b in blocks for v in b.trainable_variables]
            return tf.nest.flatten(tape.gradient(loss, [x, weights]))

        for block in blocks:
            block(x)
        results.append(run(gradients)(x))
    assert_close(*results, rtol=1e-4, atol=1e-5)


class StepCounter(layers.Layer):
    """A branch that counts its calls in training in an integer variable."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))
        self.count = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )

    def call(self, x, training=False):
        if training:
            self.count.assign(self.count + 1)
        return self.w * x


@pytest.mark.parametrize("replicas", [1, 2])
def test_c20_an_integer_counter_counts_a_step_once_without_warnings(
    two_replicas, replicas
):
    scope = two_replicas if replicas == 2 else tf.distribute.get_strategy()
    with scope.scope():
        f, g = StepCounter(), StepCounter()
        block = RevBlock(f, g)
        model = keras.Sequential([keras.Input((8,)), block])
        model.compile("sgd", "mse")
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        data = tf.data.Dataset.from_tensors((images(4, 8), images(4, 8))).repeat(3)
        model.fit(data, verbose=0, shuffle=False)
    finally:
        tf.get_logger().removeHandler(handler)
    assert int(f.count.numpy()) == int(g.count.numpy()) == 3
    assert not messages
