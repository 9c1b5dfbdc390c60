"""What is measured of the reconstruction is what the gradient really used."""

import contextlib
import csv
import warnings

import keras
import numpy as np
import pytest
from twins import assert_same_state, conv_branch, images

from revnet_tf import RevBlock, RevSequence, models, numerics

layers = keras.layers
WIDTH = 4


class Scale(layers.Layer):
    """Multiplies by a number, without weights: what is rebuilt is worked out easily."""

    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, x):
        return self.scale * x


def dense_block(stddev=0.3, activation="tanh", dtype=None, **kwargs):
    """Streams of the scaled weights of linear layers grow, and drift when rebuilt."""

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


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_stacked_blocks_drift_together_but_not_in_eager_mode(mode):
    x, _ = batch()
    blocks = [dense_block() for _ in range(8)]
    model = model_of(blocks, "stacked", **compiled(mode))
    first, *_, last = numerics.reconstruction_error(model, x).values()
    # In eager mode each block finds its own output: one block of drift.
    assert (first.relative < 3 * last.relative) == (mode == "eager")


def test_fixed_point_streams_are_rebuilt_without_an_error():
    model = model_of([dense_block(fraction_bits=14) for _ in range(5)])
    errors = numerics.reconstruction_error(model, batch()[0])
    assert list(errors.values()) == [(0.0, 0.0)] * 5


def test_blocks_that_are_not_rebuilt_are_not_reported():
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


def test_a_layer_without_weights_yet_is_refused():
    with pytest.raises(ValueError, match="call or build it first"):
        numerics.reconstruction_error(dense_block(), batch()[0])


def test_angles_between_known_vectors():
    variables = [keras.Variable(np.zeros(2)) for _ in range(2)]
    a = [np.array([3.0, 0.0]), np.array([0.0, 4.0])]
    b = [np.array([0.0, 3.0]), np.array([0.0, 4.0])]
    angle = numerics._angle(a, b, variables)
    # cos = 16 / 25, and the first pair is at right angles
    assert angle.overall == pytest.approx(np.degrees(np.arccos(16 / 25)))
    assert list(angle.by_variable.values())[0] == pytest.approx(90)
    # An arc cosine would say 0 or 1.2e-6.
    assert numerics._degrees([(np.array([1, 0]), np.array([1, 1e-10]))]) == (
        pytest.approx(np.degrees(1e-10))
    )
    zero, one = np.zeros(1), np.ones(1)
    assert numerics._degrees([(zero, one)]) == 90
    assert numerics._degrees([(zero, zero)]) == 0
    assert numerics._degrees([(one * np.nan, one)]) == np.inf
    assert np.isnan(numerics._degrees([(one, one * np.inf)]))


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_angle_is_that_of_the_gradients_of_training_steps(mode):
    """SGD with a learning rate of 1 and no momentum shows the gradients."""
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
    # (with XLA the step is compiled as a whole, and rounds otherwise)
    tolerance = 0.3 if mode == "xla" else 1e-3
    expected = np.degrees(np.arccos(cosine))
    assert angle.overall == pytest.approx(expected, rel=tolerance)


def test_angle_needs_a_loss():
    x = keras.Input((2 * WIDTH,))
    with pytest.raises(ValueError, match="not compiled"):
        numerics.gradient_angle(keras.Model(x, dense_block()(x)), *batch())


def drifting_model(depth, mode):
    """Scaled weights and streams in bfloat16: what is rebuilt is soon of no use."""
    blocks = [dense_block(0.5, dtype="bfloat16") for _ in range(depth)]
    return model_of(blocks, **compiled(mode))


@pytest.mark.parametrize(
    "mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)]
)
def test_drift_is_reported_with_the_block_and_anchors_bring_it_back(mode):
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
    assert f"of the inputs of {blocks[0].path} differs" in str(warning.message)
    assert f"{len(anchors)} of 100 blocks are anchors" in str(warning.message)


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_training_goes_on_with_the_anchors_that_were_set(mode, anchor):
    trained = []
    for recompute in (True, False):
        keras.utils.set_random_seed(5)
        blocks = [dense_block(2.0, None, recompute=recompute) for _ in range(8)]
        model = model_of(blocks, **compiled(mode))
        model.optimizer.learning_rate = 0.0
        model.train_on_batch(*batch())  # traced before there were anchors
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
    # With all blocks anchors, the gradients are those of stored activations.
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


@pytest.mark.parametrize(
    "mode, policy",
    [
        ("eager", "float32"),
        ("graph", "mixed_float16"),
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
    # After a step weights differ: two halves of a batch add up in another order. What
    # is rounded then differs, and is of one size.
    for mirrored, single, tolerance in zip(*rows, (1e-6, 0.9), strict=True):
        for name in ("reconstruction_error", "gradient_angle"):
            assert mirrored[name] == pytest.approx(single[name], rel=tolerance)


def test_what_cannot_be_watched_is_refused_before_training():
    with pytest.raises(ValueError, match="every_steps=0"):
        numerics.ReversibilityMonitor(*batch(), every_steps=0)
    model = model_of([dense_block(recompute=False)])
    before = model.get_weights()
    with pytest.raises(ValueError, match="nothing to watch"):
        model.fit(*batch(), callbacks=[numerics.ReversibilityMonitor(*batch())])
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
