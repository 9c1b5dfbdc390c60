"""SavedModels that hold a training step or a forward pass with its gradient."""

import keras
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose as assert_close
from twins import images

from revnet_tf import RevBlock, RevSequence, models

layers = keras.layers


def dense_model():
    def branch():
        return keras.Sequential([layers.BatchNormalization(), layers.Dense(4, "tanh")])

    x = keras.Input((8,))
    y = RevSequence([RevBlock(branch(), branch()) for _ in range(2)])(x)
    return keras.Model(x, layers.Dense(1)(y))


class Trainer(tf.Module):
    """A model with the functions for its training on a device."""

    def __init__(self, model, jit_compile=None):
        super().__init__()
        self.model = model
        x = tf.TensorSpec((None, *model.inputs[0].shape[1:]))
        y = tf.TensorSpec((None, *model.outputs[0].shape[1:]))
        steps = tf.TensorSpec((), tf.int32)
        self.train = tf.function(self._train, [x, y], jit_compile=jit_compile)
        self.train_steps = tf.function(self._train_steps, [x, y, steps])
        self.forward = tf.function(self._forward, [x], autograph=False)
        self.input_gradient = tf.function(self._input_gradient, [x], autograph=False)

    def _forward(self, x):
        return self.model(x, training=True)

    def _input_gradient(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(self._forward(x) ** 2)
        return tape.gradient(loss, x)

    def _train(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self._forward(x) - y) ** 2)
        weights = self.model.trainable_variables
        for v, d in zip(weights, tape.gradient(loss, weights), strict=True):
            v.assign(v - 1e-2 * d)
        return {"loss": loss}

    def _train_steps(self, x, y, steps):
        loss = tf.constant(0.0)
        for _ in tf.range(steps):
            loss = self._train(x, y)["loss"]
        return loss


def losses(train, x, y):
    # Each loss depends on the weights after the steps before it.
    return [float(train(x=x, y=y)["loss"]) for _ in range(4)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A trainer and its loaded copy. A test trains both with equal steps."""
    trainer = Trainer(dense_model())
    path = str(tmp_path_factory.mktemp("model") / "1")
    tf.saved_model.save(trainer, path, {"train": trainer.train})
    return trainer, tf.saved_model.load(path)


def test_saved_training_step_trains_like_the_original(pair):
    trainer, module = pair
    x, y = images(6, 8), images(6, 1, seed=1)
    expected = losses(trainer.train, x, y)
    assert losses(module.signatures["train"], x, y) == expected
    assert expected[-1] < expected[0]


def test_saved_loop_of_training_steps_trains_like_the_original(pair):
    x, y = images(6, 8), images(6, 1, seed=1)
    got, expected = [
        [float(one.train_steps(x, y, tf.constant(3))) for _ in range(2)] for one in pair
    ]
    assert got == expected


def test_loaded_forward_pass_has_the_gradients_of_the_original(pair):
    x = images(6, 8)

    def gradients(function):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(function(x) ** 2)
        return tape.gradient(loss, [x, *tape.watched_variables()])

    expected, got = [gradients(one.forward) for one in pair]
    assert len(got) == 1 + len(pair[0].model.trainable_variables)
    assert_close(got[0], expected[0])
    # The loaded variables have another order.
    norms = [sorted(float(tf.norm(d)) for d in found) for found in (got, expected)]
    assert_close(*norms)


def test_second_derivative_of_a_loaded_gradient_is_refused(pair):
    x = images(6, 8)
    with tf.GradientTape() as tape:
        tape.watch(x)
        d = pair[1].input_gradient(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="recompute=False"):
        tape.gradient(d, x)


def test_loaded_training_step_is_saved_again(pair, tmp_path):
    trainer, module = pair
    x, y = images(6, 8), images(6, 1, seed=1)
    tf.saved_model.save(module, str(tmp_path / "2"), module.signatures)
    train = tf.saved_model.load(str(tmp_path / "2")).signatures["train"]
    assert losses(train, x, y) == losses(module.signatures["train"], x, y)
    losses(trainer.train, x, y)


@pytest.mark.thorough
def test_saved_training_step_of_a_revnet_under_xla_trains_without_warnings(
    tmp_path, caplog
):
    model = models.RevNet((1,), (4, 8), input_shape=(4, 4, 3), classes=2)
    module, trainer = tf.Module(), Trainer(model, jit_compile=True)
    module.model, module.train = model, trainer.train
    x, y = images(6, 4, 4, 3), images(6, 2, seed=1)
    tf.saved_model.save(module, str(tmp_path / "1"), {"train": module.train})
    train = tf.saved_model.load(str(tmp_path / "1")).signatures["train"]
    assert losses(train, x, y) == losses(trainer.train, x, y)
    # TensorFlow warns if the file lacks a custom gradient.
    assert "custom gradient" not in caplog.text


class Fitted(keras.Model):
    """A model with its own training step. `fit` traces it."""

    def __init__(self):
        super().__init__()
        self.block = RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh"))
        self.top = layers.Dense(1)

    def call(self, x, training=False):
        return self.top(self.block(x, training=training))

    @tf.function
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.trainable_variables
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"loss": loss}


def test_model_is_saved_after_fit(tmp_path):
    model = Fitted()
    model.compile("sgd", "mse")
    x = images(6, 8)
    model.fit(x, images(6, 1, seed=1), verbose=0)
    tf.saved_model.save(model, str(tmp_path / "1"))
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    assert_close(serve(x)["output_0"], model(x), rtol=1e-6)
