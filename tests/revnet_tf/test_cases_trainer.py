"""Cases of the trainer and the optimizer, on one device and on two replicas.

Accumulation, clipping, averages, several steps in one call, custom loops.
"""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, images

from revnet_tf import RevBlock, RevSequence

layers = keras.layers

# Together they take longer than all other tests.


@pytest.fixture(params=[1, 2], ids=["one_device", "two_replicas"])
def strategy(request):
    if request.param == 1:
        return tf.distribute.get_strategy()
    return request.getfixturevalue("two_replicas")


def branch(norm):
    norms = {"batch": [layers.BatchNormalization], "group": [group_norm], None: []}
    return keras.Sequential(
        [*(make() for make in norms[norm]), layers.Dense(4, "tanh")]
    )


def group_norm():
    return layers.GroupNormalization(2)


def network(recompute=True, norm=None, sgd=None, cls=keras.Model, **compile_args):
    """Returns a compiled model of two reversible blocks, always with equal weights."""
    sgd = {"learning_rate": 0.1, **(sgd or {})}
    keras.utils.set_random_seed(3)
    x = keras.Input((8,))
    blocks = [RevBlock(branch(norm), branch(norm)) for _ in range(2)]
    y = RevSequence(blocks, recompute=recompute)(x)
    model = cls(x, layers.Dense(1)(y))
    # An optimizer stores the strategy in whose scope it is made.
    model.compile(keras.optimizers.SGD(**sgd), "mse", **compile_args)
    return model


def examples(count):
    return images(count, 8, seed=1), images(count, 1, seed=2)


def batches(count, batch_size):
    data = tf.data.Dataset.from_tensor_slices(examples(count)).batch(batch_size)
    options = tf.data.Options()
    options.deterministic = True
    return data.with_options(options)


def fit(model, count, batch_size, **kwargs):
    return model.fit(batches(count, batch_size), shuffle=False, verbose=0, **kwargs)


def weights_after(strategy, count, batch_size, epochs=1, **kwargs):
    with strategy.scope():
        model = network(**kwargs)
    fit(model, count, batch_size, epochs=epochs)
    return model.get_weights()


def finishes(function, seconds=120):
    """Returns the result of `function`, or fails if it takes too long."""
    result = []

    def target():
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"still running after {seconds} seconds"
    value, error = result[0]
    if error is not None:
        raise error
    return value


@pytest.mark.thorough
def test_accumulated_gradients_equal_those_of_the_large_batch(strategy):
    # In float64, because float32 rounding would hide a difference.
    keras.config.set_dtype_policy("float64")
    replicas = strategy.num_replicas_in_sync
    small = {"momentum": 0.9, "gradient_accumulation_steps": 4}
    with strategy.scope():
        model = network(norm="group", sgd=small)
    if replicas > 1:
        # Keras 3.15 merges the gradients of the replicas inside the condition of the
        # update. TensorFlow refuses this for any model. The model must end with this
        # error, as the twin does, and not hang.
        with strategy.scope():
            twin = network(False, "group", small)
        for m in (model, twin):
            with pytest.raises(RuntimeError, match="merge_call"):
                finishes(lambda m=m: fit(m, 32, 2 * replicas))
        return
    fit(model, 32, 2, epochs=2)
    large = weights_after(strategy, 32, 8, 2, norm="group", sgd={"momentum": 0.9})
    assert_close(model.get_weights(), large, rtol=1e-9, atol=1e-9)


def test_moving_statistics_advance_once_for_every_accumulated_batch():
    results = []
    for recompute in (True, False):
        model = network(recompute, "batch", {"gradient_accumulation_steps": 4})
        first = model.layers[1].blocks[0].f.layers[0]
        expected = np.zeros(4)
        for x, y in batches(8, 2):
            model.train_on_batch(x, y)
            mean = np.mean(x[:, 4:], axis=0)
            expected = 0.99 * expected + 0.01 * mean
        np.testing.assert_allclose(first.moving_mean, expected, rtol=1e-5, atol=1e-7)
        results.append(model.get_weights())
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_clipped_update_is_that_of_the_twin_and_bounded_on_each_replica(strategy):
    # Keras clips on each replica before the sum, for any model. The bound is that of
    # one replica times the number of replicas.
    sgd = {"learning_rate": 0.5, "global_clipnorm": 0.1}
    updates = []
    for recompute in (True, False):
        with strategy.scope():
            model = network(recompute, sgd=sgd, loss_weights=[1e3])
        before = model.get_weights()
        fit(model, 8, 8)
        updates.append(
            [a - b for a, b in zip(model.get_weights(), before, strict=True)]
        )
    norm = np.sqrt(sum(np.sum(update**2) for update in updates[0]))
    replicas = strategy.num_replicas_in_sync
    assert norm <= 0.5 * 0.1 * replicas * (1 + 1e-5)
    if replicas == 1:
        assert norm == pytest.approx(0.5 * 0.1, rel=1e-5)
    assert_close(*updates, rtol=1e-4, atol=1e-6)


class Record(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([v.numpy() for v in self.model.trainable_variables])


def averages(steps, momentum=0.8):
    """Returns the exponential moving average of the weights after each step."""
    expected = steps[0]
    for weights in steps[1:]:
        expected = [
            momentum * mean + (1 - momentum) * w
            for mean, w in zip(expected, weights, strict=True)
        ]
    return expected


def test_averaged_weights_follow_the_textbook_and_swap_in_and_back(strategy):
    with strategy.scope():
        model = network(sgd={"use_ema": True, "ema_momentum": 0.8})
    record = Record()
    fit(model, 40, 8, callbacks=[record])
    assert len(record.weights) == 5
    # At the end of `fit`, Keras puts the averages into the model.
    expected = averages(record.weights)
    assert_close(model.get_weights(), expected, rtol=1e-5, atol=1e-6)


def test_averages_are_swapped_in_for_evaluation_and_out_again():
    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            self.evaluated = self.model.get_weights()

        def on_epoch_begin(self, epoch, logs=None):
            self.trained = self.model.get_weights()

    model = network(sgd={"use_ema": True, "ema_momentum": 0.8})
    record, look = Record(), Look()
    callbacks = [record, keras.callbacks.SwapEMAWeights(), look]
    arguments = {"callbacks": callbacks, "validation_data": batches(8, 8)}
    fit(model, 40, 8, epochs=2, **arguments)
    assert_close(look.evaluated, averages(record.weights), rtol=1e-5, atol=1e-6)
    # Keras swaps by additions, so the weights are equal up to rounding.
    assert_close(look.trained, record.weights[4], rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_several_steps_in_one_call_end_in_the_same_weights(strategy, tmp_path):
    results = []
    for steps in (1, 4):
        with strategy.scope():
            model = network(norm="batch", steps_per_execution=steps)
        folder = tmp_path / str(steps)
        folder.mkdir()
        save = keras.callbacks.ModelCheckpoint(
            folder / "{batch:02d}.weights.h5", save_weights_only=True, save_freq=8
        )
        fit(model, 17 * 4, 4, callbacks=[save])
        assert model.optimizer.iterations.numpy() == 17
        assert [p.name[:2] for p in sorted(folder.iterdir())] == ["08", "16"]
        at_16 = network(norm="batch")
        at_16.load_weights(folder / "16.weights.h5")
        results.append([*model.get_weights(), *at_16.get_weights()])
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [10, 11])
def test_smaller_last_batch_weighs_as_many_samples_as_it_has(strategy, count):
    with strategy.scope():
        model = network(sgd={"learning_rate": 0.0})
    x, y = examples(count)
    loss = np.mean((model(x, training=True) - y) ** 2)
    history = fit(model, count, 4)
    assert history.history["loss"][0] == pytest.approx(loss, rel=1e-5)
    evaluated = model.evaluate(batches(count, 4), verbose=0)
    assert evaluated == pytest.approx(loss, rel=1e-5)


def test_train_on_batch_under_a_strategy_equals_one_device(two_replicas):
    # Keras passes the whole batch to every replica. The step is that of one device.
    results = []
    for strategy in (two_replicas, tf.distribute.get_strategy()):
        with strategy.scope():
            model = network(norm="batch")
            losses = [model.train_on_batch(*examples(8)) for _ in range(3)]
        results.append([*map(np.asarray, losses), *model.get_weights()])
    assert_close(*results, rtol=1e-5, atol=1e-6)


class ExplicitTape(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss}


@pytest.mark.thorough
def test_train_step_with_its_own_tape_equals_the_stock_one(strategy):
    results = [
        weights_after(strategy, 24, 8, norm="group", cls=cls)
        for cls in (ExplicitTape, keras.Model)
    ]
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_custom_loop_with_a_keras_optimizer_finishes(two_replicas):
    def train(strategy, recompute):
        with strategy.scope():
            model = network(recompute, "group")
            optimizer = keras.optimizers.Adam(0.01)
            optimizer.build(model.trainable_variables)

        def replica_step(x, y):
            with tf.GradientTape() as tape:
                error = (model(x, training=True) - y) ** 2
                loss = tf.reduce_sum(error) / 8
            variables = model.trainable_variables
            gradients = tape.gradient(loss, [v.value for v in variables])
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return loss

        @tf.function
        def step(x, y):
            losses = strategy.run(replica_step, (x, y))
            return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

        data = strategy.experimental_distribute_dataset(batches(40, 8))
        losses = [step(x, y) for x, y in data]
        assert len(losses) == 5
        return [*losses, *model.get_weights()]

    one_device = tf.distribute.get_strategy()
    got = finishes(lambda: train(two_replicas, True))
    assert_close(got, train(one_device, True), rtol=1e-4, atol=1e-5)
    assert_close(got, train(one_device, False), rtol=1e-4, atol=1e-5)


def replica_gradients(strategy, make, x):
    """Returns, for each replica, the gradients of a block for its share of `x`."""
    with strategy.scope():
        keras.utils.set_random_seed(5)
        block = make()
        block.build((None, 8))

    def replica_step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(block(x, training=True)))
        variables = [v.value for v in block.trainable_variables]
        return tape.gradient(loss, [x, *variables])

    @tf.function(autograph=False)
    def step(x):
        return strategy.run(replica_step, (x,))

    data = tf.data.Dataset.from_tensors(x).unbatch().batch(len(x))
    (batch,) = strategy.experimental_distribute_dataset(data)
    results = [strategy.experimental_local_results(g) for g in step(batch)]
    return [list(gradients) for gradients in zip(*results, strict=True)]


class UsedByTheFirstReplica(layers.Layer):
    """A branch with a weight that only one replica uses."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],), initializer="ones")
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, x):
        x = tf.tanh(self.scale * x)
        context = tf.distribute.get_replica_context()  # none when Keras builds
        if context and tf.get_static_value(context.replica_id_in_sync_group) == 0:
            x = self.w * x
        return x


def test_weight_that_one_replica_does_not_use_gets_zeros_there(two_replicas):
    def make():
        return RevBlock(UsedByTheFirstReplica(), layers.Dense(4))

    first, second = finishes(
        lambda: replica_gradients(two_replicas, make, images(4, 8))
    )
    assert all(g is not None for g in (*first, *second))
    assert np.all(first[1] != 0)
    np.testing.assert_array_equal(second[1], np.zeros(4))


def test_replicas_that_use_different_weights_train_without_waiting(two_replicas):
    # There is no twin to compare with: it has a gradient on one replica only, and Keras
    # drops the variable on the other replica.
    with two_replicas.scope():
        x = keras.Input((8,))
        y = RevBlock(UsedByTheFirstReplica(), layers.Dense(4))(x)
        model = keras.Model(x, layers.Dense(1)(y))
        model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.layers[1].f.w.numpy()
    finishes(lambda: fit(model, 16, 8))
    assert np.all(model.layers[1].f.w.numpy() != before)


def test_each_replica_has_the_gradients_of_its_own_data(two_replicas):
    def make():
        return RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh"))

    x = images(6, 8)
    got = replica_gradients(two_replicas, make, x)
    one_device = tf.distribute.get_strategy()
    for gradients, share in zip(got, (x[:3], x[3:]), strict=True):
        (expected,) = replica_gradients(one_device, make, share)
        assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        assert all(np.any(g != 0) for g in gradients)
    assert all(np.any(a != b) for a, b in zip(*got, strict=True))
