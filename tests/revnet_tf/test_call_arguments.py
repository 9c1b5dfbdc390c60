"""Layers take the arguments that Keras layers take, such as `training=None`."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, images, loss_and_gradients, twins

from revnet_tf import DownsamplingBlock, RevBlock, RevSequence, models

layers = keras.layers


def dense_block():
    return RevBlock(layers.Dense(4), layers.Dense(4))


def sequence():
    return RevSequence([dense_block() for _ in range(2)])


def downsampling():
    return DownsamplingBlock(*(layers.Dense(2) for _ in range(4)))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """The most common form of a subclassed model."""

    def __init__(self, make=dense_block, **kwargs):
        super().__init__(**kwargs)
        self.block = make()
        self.norm = layers.BatchNormalization()
        self.top = layers.Dense(1)

    def call(self, x, training=None):
        x = self.norm(self.block(x, training=training), training=training)
        return self.top(x)

    def get_config(self):
        return {}


@pytest.mark.parametrize("make", [dense_block, sequence, downsampling])
def test_training_none_is_inference_for_every_layer(make, run):
    layer, x = make(), images(3, 8)
    layer.build(x.shape)
    expected = layer(x, training=False)
    assert_close(
        [run(lambda x: layer(x, training=None))(x), run(lambda x: layer(x))(x)],
        [expected] * 2,
        rtol=1e-5,
        atol=1e-6,
    )


def test_training_none_takes_the_mode_of_the_calling_model():
    modes = []

    class Branch(layers.Layer):
        def call(self, x, training=None):
            modes.append(training)
            return 0.5 * x

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = RevBlock(Branch(), Branch())

        def call(self, x, training=None):
            return self.block(x)

    model, x = Model(), images(3, 8)
    model(x, training=False)
    modes.clear()
    for training in (True, False, None):
        model(x, training=training)
    assert set(modes[:2]) == {True} and modes[-4:] == [False] * 4


def test_subclassed_model_comes_back_from_a_file_with_all_weights(tmp_path):
    model, x = Subclassed(), images(4, 8)
    model.compile("sgd", "mse")
    model.fit(x, images(4, 1), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights) == 10
    np.testing.assert_array_equal(loaded(x), model(x))


def test_subclassed_model_is_a_layer_of_a_functional_one_and_exports(tmp_path):
    inner = Subclassed()
    x = keras.Input((8,))
    model = keras.Model(x, inner(x))
    model.export(tmp_path / "1", verbose=False)
    batch = images(3, 8)
    served = tf.saved_model.load(tmp_path / "1")
    np.testing.assert_allclose(served.serve(batch), model(batch), rtol=1e-5)


def test_symbolic_training_is_refused():
    block = dense_block()
    block.build((2, 8))
    call = tf.function(lambda x, training: block(x, training=training))
    with pytest.raises(ValueError, match="Pass a Python bool"):
        call(images(2, 8), tf.constant(True))


@keras.saving.register_keras_serializable("tests")
class GraphConvolution(layers.Layer):
    """A branch with the adjacency matrix of a graph, sparse or dense."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units)

    def build(self, x_shape, adjacency_shape=None):
        self.dense.build(x_shape)

    def call(self, x, adjacency):
        return tf.tanh(keras.ops.matmul(adjacency, self.dense(x)))

    def compute_output_shape(self, x_shape, adjacency_shape=None):
        return x_shape

    def get_config(self):
        return {**super().get_config(), "units": self.units}


ADJACENCY = tf.sparse.from_dense(np.eye(5, k=1, dtype="float32") + 0.5 * np.eye(5))


def graph_sequence():
    blocks = [RevBlock(GraphConvolution(4), GraphConvolution(4)) for _ in range(2)]
    return RevSequence(blocks)


@pytest.mark.parametrize(
    "sparse, run",
    [
        (True, lambda f: f),
        (True, tf.function),
        (False, tf.function),
        # XLA has no sparse operations.
        (False, lambda f: tf.function(f, jit_compile=True)),
    ],
    ids=["sparse-eager", "sparse-graph", "dense-graph", "dense-xla"],
)
def test_argument_that_both_branches_use_gets_its_whole_gradient(sparse, run):
    x = images(5, 8)

    def gradients(layer, x, values):
        with tf.GradientTape() as tape:
            tape.watch([x, values])
            matrix = tf.SparseTensor(ADJACENCY.indices, values, ADJACENCY.dense_shape)
            matrix = matrix if sparse else tf.sparse.to_dense(matrix)
            y = layer(x, training=True, adjacency=matrix)
            loss = tf.reduce_sum(tf.sin(y))
        weights = [v.value for v in layer.trainable_variables]
        return tape.gradient(loss, [x, values, *weights])

    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(0)
        layer = graph_sequence()
        layer.recompute = recompute
        layer(x, adjacency=ADJACENCY)
        step = run(lambda x, values: gradients(layer, x, values))  # noqa: B023
        results.append(step(x, ADJACENCY.values))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_sparse_input_of_a_functional_model_trains_and_comes_back(tmp_path):
    x, adjacency = keras.Input((8,)), keras.Input((5,), sparse=True)
    model = keras.Model([x, adjacency], graph_sequence()(x, adjacency=adjacency))
    model.compile("sgd", "mse")
    batch = [images(5, 8), ADJACENCY]
    before = model(batch)
    model.train_on_batch(batch, images(5, 8, seed=1))
    assert np.any(model(batch) != before)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(batch), model(batch))


@pytest.mark.parametrize("run", [lambda f: f, tf.function], ids=["eager", "graph"])
def test_ragged_argument_gets_its_gradient(run):
    class Weighted(layers.Layer):
        def call(self, x, scores):
            return tf.tanh(x) * tf.reduce_sum(scores, 1, keepdims=True)

        def compute_output_shape(self, x_shape, scores_shape=None):
            return x_shape

    lengths = tf.constant([2, 1, 0, 3])

    def gradients(layer, x, values):
        with tf.GradientTape() as tape:
            tape.watch([x, values])
            scores = tf.RaggedTensor.from_row_lengths(values, lengths)
            loss = tf.reduce_sum(tf.sin(layer(x, training=True, scores=scores)))
        return tape.gradient(loss, [x, values])

    results = []
    for recompute in (True, False):
        block = RevBlock(Weighted(), Weighted(), recompute=recompute)
        step = run(lambda x, values: gradients(block, x, values))  # noqa: B023
        results.append(step(images(4, 8), images(6)))
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_nested_argument_of_tensors_reaches_the_branches(run):
    class Film(layers.Layer):
        def call(self, x, film):
            return film["scale"] * tf.tanh(x) + film["shifts"][0]

        def compute_output_shape(self, x_shape, film_shape=None):
            return x_shape

    def gradients(layer, x, scale, shift):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, shift])
            film = {"scale": scale, "shifts": [shift]}
            loss = tf.reduce_sum(tf.sin(layer(x, training=True, film=film)))
        return tape.gradient(loss, [x, scale, shift])

    results = []
    for recompute in (True, False):
        block = RevBlock(Film(), Film(), recompute=recompute)
        step = run(lambda *args: gradients(block, *args))  # noqa: B023
        results.append(step(images(4, 8), images(4, seed=1), images(4, seed=2)))
        config = block.get_build_config()
        other = RevBlock(Film(), Film())
        other.build_from_config(json.loads(json.dumps(config)))
        assert json.dumps(other.get_build_config()) == json.dumps(config)
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [dense_block, sequence, downsampling])
def test_complex_inputs_are_refused(make):
    with pytest.raises(ValueError, match="real numbers"):
        make()(tf.complex(images(2, 8), images(2, 8)))


def test_inverse_of_a_symbolic_tensor_is_refused():
    block, x = dense_block(), keras.Input((8,))
    y = block(x)
    with pytest.raises(ValueError, match="in the `call` of a layer of your own"):
        block.inverse(y)


def test_branch_with_state_that_it_does_not_list_is_refused_by_its_name():
    block = RevBlock(
        layers.GRU(4, return_sequences=True, stateful=True), layers.Dense(4)
    )
    with pytest.raises(ValueError, match="The states of a stateful RNN are not"):
        loss_and_gradients(block, images(2, 3, 8))
    stored, _ = twins(lambda: block, (2, 3, 8))
    stored.recompute = False
    assert np.isfinite(loss_and_gradients(stored, images(2, 3, 8))[0])


@pytest.mark.thorough
@pytest.mark.parametrize("size", [30, 31, 33])
def test_networks_without_top_take_images_of_any_size(size):
    half = -(-size // 2)
    for network in (models.RevNet, models.ResNet):
        model = network((1, 1, 1), (8, 8, 16, 16), include_top=False)
        x = images(1, size, size, 3)
        y = model(x, training=True)
        assert y.shape == (1, -(-half // 2), -(-half // 2), 16)
        fixed = network(
            (1, 1, 1), (8, 8, 16, 16), include_top=False, input_shape=x.shape[1:]
        )
        assert fixed.output_shape[1:] == y.shape[1:]
