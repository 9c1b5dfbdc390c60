"""The measured reconstruction is the one that the gradient uses."""

import contextlib
import csv
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_same_state, conv_branch, images

from revnet_tf import RevBlock, RevSequence, _probe, models, numerics

MODES = ["eager", "graph", pytest.param("xla", marks=pytest.mark.thorough)]

layers = keras.layers
WIDTH = 4


class Scale(layers.Layer):
    """A branch without weights, whose reconstruction NumPy can compute."""

    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, x):
        return self.scale * x


def dense_block(stddev=0.3, activation="tanh", dtype=None, **kwargs):
    """Returns a block of dense layers. Large weights make its reconstruction drift."""

    def branch():
        kernel = keras.initializers.RandomNormal(stddev=stddev)
        return layers.Dense(WIDTH, activation, kernel_initializer=kernel, dtype=dtype)

    return RevBlock(branch(), branch(), dtype=dtype, **kwargs)


def model_of(blocks, kind="sequence", **compile_options):
    x = y = keras.Input((2 * WIDTH,))
    for layer in [RevSequence(blocks)] if kind == "sequence" else blocks:
        y = layer(y)
    model = keras.Model(x, layers.Dense(3)(y))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, **compile_options)
    return model


def batch(size=16):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, 2 * WIDTH), dtype="float32")
    return x, rng.integers(0, 3, size)


def compiled(mode):
    return {"run_eagerly": mode == "eager", "jit_compile": mode == "xla"}


def rebuilt_by_numpy(x1, x2, scale, blocks):
    """Returns the errors of the coupling's arithmetic, by block, in forward order."""
    scale, true = x1.dtype.type(scale), []
    for _ in range(blocks):
        true.append((x1, x2))
        x1 = x1 + scale * x2
        x2 = x2 + scale * x1
    errors = []
    for true1, true2 in reversed(true):
        x2 = x2 - scale * x1
        x1 = x1 - scale * x2
        pairs = [
            (np.float64(true1), np.float64(x1)),
            (np.float64(true2), np.float64(x2)),
        ]
        difference = np.concatenate([got - want for want, got in pairs])
        norm = np.linalg.norm(np.concatenate([want for want, _ in pairs]))
        errors.append((np.linalg.norm(difference) / norm, np.abs(difference).max()))
    return errors[::-1]


@pytest.mark.parametrize("kind", ["sequence", "stacked"])
def test_errors_are_those_of_the_same_arithmetic_in_numpy(kind):
    blocks = [RevBlock(Scale(0.7), Scale(0.7)) for _ in range(6)]
    layer = RevSequence(blocks) if kind == "sequence" else keras.Sequential(blocks)
    x, _ = batch()
    layer(x)
    found = numerics.reconstruction_error(layer, x)
    assert list(found) == [block.path for block in blocks]
    expected = rebuilt_by_numpy(x[:, :WIDTH].ravel(), x[:, WIDTH:].ravel(), 0.7, 6)
    assert expected[0][0] > 0
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_stacked_blocks_drift_together_but_not_in_eager_mode(mode):
    x, _ = batch()
    blocks = [dense_block() for _ in range(8)]
    model = model_of(blocks, "stacked", **compiled(mode))
    first, *_, last = numerics.reconstruction_error(model, x).values()
    # In eager mode each block uses its own output, so it has the drift of one block.
    assert (first.relative < 3 * last.relative) == (mode == "eager")


def test_fixed_point_streams_are_reconstructed_without_an_error():
    model = model_of([dense_block(fraction_bits=14) for _ in range(5)])
    errors = numerics.reconstruction_error(model, batch()[0])
    assert list(errors.values()) == [(0.0, 0.0)] * 5


def test_blocks_without_recomputation_are_not_reported():
    blocks = [dense_block(recompute=i != 1) for i in range(3)]
    errors = numerics.reconstruction_error(model_of(blocks), batch()[0])
    assert list(errors) == [blocks[0].path, blocks[2].path]


def test_a_block_called_twice_is_reported_with_the_larger_error():
    block = dense_block()
    x = keras.Input((2 * WIDTH,))
    model = keras.Model(x, block(block(block(x))))
    alone = keras.Model(x, block(x))
    (thrice,) = numerics.reconstruction_error(model, batch()[0]).values()
    (once,) = numerics.reconstruction_error(alone, batch()[0]).values()
    assert thrice.relative > once.relative


def test_blocks_of_nested_models_and_of_the_papers_networks_are_found():
    network = models.RevNet((2, 3), (8, 8, 16), input_shape=(8, 8, 3))
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, network(x))
    expected = [
        block.path
        for layer in network.layers
        if isinstance(layer, RevSequence)
        for block in layer.blocks
    ]
    found = numerics.reconstruction_error(model, images(2, 8, 8, 3))
    assert list(found) == expected and len(found) == 4


class TwoOfOneName(keras.Model):
    """A model with two blocks to which Keras gives the same paths."""

    def __init__(self, make, names=("block", "block")):
        super().__init__(name="model")
        self.blocks = [make(name=name) for name in names]
        self.top = layers.Dense(3)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x, training=training)
        return self.top(x)


def compiled_of_one_name(*args, **kwargs):
    model = TwoOfOneName(*args, **kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    model(batch()[0])
    return model


def test_blocks_and_variables_of_one_name_are_reported_apart():
    def make(name):
        return RevBlock(
            layers.Dense(WIDTH, "tanh", name="f"),
            layers.Dense(WIDTH, "tanh", name="g"),
            name=name,
        )

    model = compiled_of_one_name(make)
    x, y = batch()
    errors = numerics.reconstruction_error(model, x)
    assert list(errors) == ["model/block", "model/block_1"]
    # The first block is reconstructed from the inputs of the second.
    assert errors["model/block"].relative > errors["model/block_1"].relative > 0
    angles = numerics.gradient_angle(model, x, y).by_variable
    assert len(angles) == len(model.trainable_variables) == 10
    assert {"model/block/f/kernel", "model/block/f/kernel_1"} < set(angles)


def test_number_of_a_repeated_name_is_not_taken_by_another_block():
    model = compiled_of_one_name(dense_block, names=["b", "b_1", "b", "b"])
    errors = numerics.reconstruction_error(model, batch()[0])
    assert list(errors) == ["model/b", "model/b_1", "model/b_2", "model/b_3"]


def test_blocks_of_one_name_in_a_sequence_are_reported_apart():
    layer = RevSequence([dense_block(name="b") for _ in range(3)], name="s")
    layer.build((None, 2 * WIDTH))
    errors = numerics.reconstruction_error(layer, batch()[0])
    assert list(errors) == ["s/b", "s/b_1", "s/b_2"]


def test_anchors_are_set_on_all_blocks_of_one_name():
    model = compiled_of_one_name(dense_block)
    anchors = numerics.set_anchors(model, *batch(), max_error=0)
    assert anchors == ["model/block", "model/block_1"]
    assert all(block.anchor for block in model.blocks)


def test_a_layer_without_weights_yet_is_refused():
    with pytest.raises(ValueError, match="Call or build it first"):
        numerics.reconstruction_error(dense_block(), batch()[0])


def test_angles_between_known_vectors():
    variables = [keras.Variable(np.zeros(2)) for _ in range(2)]
    a = [np.array([3.0, 0.0]), np.array([0.0, 4.0])]
    b = [np.array([0.0, 3.0]), np.array([0.0, 4.0])]
    angle = _probe.angle(a, b, variables)
    # The cosine is 16 / 25. The first pair is at right angles.
    assert angle.overall == pytest.approx(np.degrees(np.arccos(16 / 25)))
    assert list(angle.by_variable.values())[0] == pytest.approx(90)
    # An arc cosine would return 0 or 1.2e-6.
    assert _probe.degrees([(np.array([1, 0]), np.array([1, 1e-10]))]) == (
        pytest.approx(np.degrees(1e-10))
    )
    zero, one = np.zeros(1), np.ones(1)
    assert _probe.degrees([(zero, one)]) == 90
    assert _probe.degrees([(zero, zero)]) == 0
    assert _probe.degrees([(one * np.nan, one)]) == np.inf
    assert np.isnan(_probe.degrees([(one, one * np.inf)]))


@pytest.mark.parametrize("mode", MODES)
def test_angle_is_that_of_the_gradients_of_training_steps(mode):
    """Reads the gradients from the weights after a step of SGD with a rate of 1."""
    x, y = batch()
    steps = []
    for recompute in (True, False):
        keras.utils.set_random_seed(3)
        blocks = [dense_block(2.0, None, recompute=recompute) for _ in range(7)]
        model = model_of(blocks, **compiled(mode))
        model.optimizer.learning_rate = 1.0
        if recompute:
            angle = numerics.gradient_angle(model, x, y)
        before = [v.numpy() for v in model.trainable_variables]
        model.train_on_batch(x, y)
        after = [v.numpy() for v in model.trainable_variables]
        steps.append(
            np.concatenate(
                [np.ravel(v) - np.ravel(w) for v, w in zip(before, after, strict=True)]
            )
        )
    a, b = map(np.float64, steps)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert angle.overall > 1
    # XLA compiles the whole step, and rounds in another way.
    tolerance = 0.3 if mode == "xla" else 1e-3
    expected = np.degrees(np.arccos(cosine))
    assert angle.overall == pytest.approx(expected, rel=tolerance)


def test_angle_needs_a_loss():
    x = keras.Input((2 * WIDTH,))
    with pytest.raises(ValueError, match="not compiled"):
        numerics.gradient_angle(keras.Model(x, dense_block()(x)), *batch())


def drifting_model(depth, mode):
    """Returns a model whose reconstruction fails: scaled weights, bfloat16 streams."""
    blocks = [dense_block(0.5, dtype="bfloat16") for _ in range(depth)]
    return model_of(blocks, **compiled(mode))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)]
)
def test_drift_is_reported_with_the_block_and_anchors_bound_it(mode):
    model = drifting_model(100, mode)
    blocks = model.layers[1].blocks
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=2, anchor=True)
    with pytest.warns(UserWarning) as caught:
        model.fit(*batch(), verbose=0, callbacks=[monitor])
    before, after = monitor.rows
    assert (before["step"], after["step"], before["block"]) == (0, 0, blocks[0].path)
    assert before["reconstruction_error"] > 1 and before["gradient_angle"] > 45
    assert after["reconstruction_error"] < numerics.MAX_ERROR
    assert after["gradient_angle"] < numerics.MAX_ANGLE
    anchors = [block.path for block in blocks if block.anchor]
    assert 2 <= len(anchors) <= 20
    (warning,) = caught
    assert f"reconstructed inputs of {blocks[0].path} differ" in str(warning.message)
    assert f"{len(anchors)} of 100 blocks are anchors" in str(warning.message)


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_with_the_anchors_that_were_set(mode, anchor):
    trained = []
    for recompute in (True, False):
        keras.utils.set_random_seed(5)
        blocks = [dense_block(2.0, None, recompute=recompute) for _ in range(8)]
        model = model_of(blocks, **compiled(mode))
        model.optimizer.learning_rate = 0.0
        model.train_on_batch(*batch())  # traced without anchors
        model.optimizer.learning_rate = 1.0
        callbacks = []
        if recompute and anchor:
            monitor = numerics.ReversibilityMonitor(*batch(), max_angle=0, anchor=True)
            callbacks.append(monitor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.fit(*batch(), verbose=0, callbacks=callbacks, shuffle=False)
        trained.append(np.concatenate([*map(np.ravel, model.get_weights())]))
    error = np.linalg.norm(trained[0] - trained[1]) / np.linalg.norm(trained[1])
    # If all blocks are anchors, the gradients are those of stored activations.
    assert error < 1e-4 if anchor else error > 1e-2


def conv_model(**compile_options):
    keras.utils.set_random_seed(4)
    x = keras.Input((6, 6, 8))
    blocks = [RevBlock(conv_branch(4, 0.3), conv_branch(4, 0.3)) for _ in range(2)]
    y = layers.Flatten()(layers.Dropout(0.2)(RevSequence(blocks)(x)))
    kernel = keras.regularizers.L2(0.01)
    model = keras.Model(x, layers.Dense(3, kernel_regularizer=kernel)(y))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], **compile_options
    )
    return model


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mode, policy",
    [
        ("eager", "float32"),
        pytest.param("graph", "mixed_float16", marks=pytest.mark.thorough),
        pytest.param("xla", "float32", marks=pytest.mark.slow),
    ],
)
def test_training_with_the_monitor_ends_in_the_same_bits(mode, policy):
    keras.config.set_dtype_policy(policy)
    x, y = images(12, 6, 6, 8).numpy(), np.arange(12) % 3
    models_, histories = [], []
    for watched in (False, True):
        model = conv_model(**compiled(mode))
        callbacks = []
        if watched:
            callbacks = [numerics.ReversibilityMonitor(x[:6], y[:6], every_steps=1)]
        history = model.fit(x, y, 4, epochs=2, verbose=0, callbacks=callbacks)
        models_.append(model)
        histories.append(history.history)
    assert_same_state(*models_)
    assert_same_state(*(model.optimizer for model in models_))
    plain, logged = histories
    assert {k: logged[k] for k in plain} == plain
    assert set(logged) - set(plain) == {"reconstruction_error", "gradient_angle"}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # CSVLogger's
def test_values_reach_the_csv_file_and_the_plot(tmp_path):
    model = model_of([dense_block()])
    monitor = numerics.ReversibilityMonitor(
        *batch(), every_steps=2, plot=tmp_path / "drift.png"
    )
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    model.fit(*batch(), 4, epochs=2, verbose=0, callbacks=[monitor, logger])
    assert [row["step"] for row in monitor.rows] == [0, 2, 4, 6, 8]
    with open(tmp_path / "log.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    for name in ("reconstruction_error", "gradient_angle"):
        values = [row[name] for row in monitor.rows]
        expected = [max(values[:3]), max(values[3:])]
        assert [float(row[name]) for row in logged] == expected
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("part-*"))


def test_epochs_without_a_measurement_repeat_the_last_one():
    model = model_of([dense_block()])
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=3)
    logs = model.fit(*batch(), epochs=4, verbose=0, callbacks=[monitor]).history
    assert [row["step"] for row in monitor.rows] == [0, 3]
    a, b = (row["gradient_angle"] for row in monitor.rows)
    assert logs["gradient_angle"] == [a, a, b, b]


def custom_loop(model, monitor, steps=4, begin=True, epoch_logs=None):
    """Trains with its own optimizer, and calls the monitor as `fit` does."""
    x, y = batch()
    weights = [v.value for v in model.trainable_variables]
    if begin:
        monitor.on_train_begin()
    for i in range(steps):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        for v, d in zip(weights, tape.gradient(loss, weights), strict=True):
            v.assign_sub(0.01 * d)
        monitor.on_train_batch_end(i, None)
    monitor.on_epoch_end(0, epoch_logs)


@pytest.mark.parametrize("begin", [True, False])
def test_custom_loop_is_watched_without_logs(begin, tmp_path):
    plot = tmp_path / "drift.png"
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=2, plot=plot)
    model = model_of([dense_block()])
    monitor.set_model(model)
    custom_loop(model, monitor, begin=begin)
    # Without `on_train_begin`, the first call makes the first measurement.
    assert [row["step"] for row in monitor.rows] == [0, 2, 4]
    assert plot.exists()


def test_custom_loop_finds_the_values_in_its_logs():
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=1)
    monitor.set_model(model_of([dense_block()]))
    logs = {}
    custom_loop(monitor.model, monitor, epoch_logs=logs)
    values = [row["gradient_angle"] for row in monitor.rows]
    assert len(values) == 5 and logs["gradient_angle"] == max(values)


def test_model_without_an_optimizer_is_watched():
    model = model_of([dense_block()])
    model.compile(None, model.loss)
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=4)
    monitor.set_model(model)
    custom_loop(model, monitor)
    assert [row["step"] for row in monitor.rows] == [0, 4]


def test_monitor_follows_another_model():
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=4)
    for _ in range(2):
        model = model_of([dense_block()])
        monitor.set_model(model)
        custom_loop(model, monitor, begin=False)
    names = [row["block"] for row in monitor.rows]
    assert names[0] == names[1] != names[2] == names[3]


def test_monitor_without_a_model_says_what_is_missing():
    monitor = numerics.ReversibilityMonitor(*batch())
    for call in (
        monitor.on_train_begin,
        lambda: monitor.on_train_batch_end(0),
        lambda: monitor.on_epoch_end(0),
    ):
        with pytest.raises(ValueError, match=r"monitor\.set_model\(model\)"):
            call()


def test_bounds_are_warned_of_once_with_what_to_do():
    blocks = [dense_block(), dense_block()]
    model = model_of(blocks)
    monitor = numerics.ReversibilityMonitor(*batch(), every_steps=1, max_error=0)
    with pytest.warns(UserWarning, match=blocks[0].path) as caught:
        model.fit(*batch(), 4, verbose=0, callbacks=[monitor])
    (warning,) = caught
    assert "max_error=0" in str(warning.message)
    for remedy in ("anchor=True", "fraction_bits", "float32"):
        assert remedy in str(warning.message)


def test_mirrored_replicas_are_watched_like_one_device(two_replicas):
    rows = []
    for scope in (two_replicas.scope, contextlib.nullcontext):
        keras.utils.set_random_seed(6)
        with scope():
            model = model_of([dense_block() for _ in range(3)])
            monitor = numerics.ReversibilityMonitor(*batch(), every_steps=1)
            model.fit(*batch(), verbose=0, callbacks=[monitor])
        rows.append(monitor.rows)
    assert [row["step"] for row in rows[0]] == [0, 1]
    # After a step the weights differ, because the sum over two halves of a batch has
    # another order. The errors then differ, but are of the same size.
    for mirrored, single, tolerance in zip(*rows, (1e-6, 0.9), strict=True):
        for name in ("reconstruction_error", "gradient_angle"):
            assert mirrored[name] == pytest.approx(single[name], rel=tolerance)


def test_monitor_refuses_models_that_it_cannot_watch_before_training():
    with pytest.raises(ValueError, match="every_steps=0"):
        numerics.ReversibilityMonitor(*batch(), every_steps=0)
    model = model_of([dense_block(recompute=False)])
    before = model.get_weights()
    with pytest.raises(ValueError, match="nothing to watch"):
        model.fit(*batch(), callbacks=[numerics.ReversibilityMonitor(*batch())])
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
