"""Cases of gradients, memory and recomputation, A01 to B11.

The cases are reports from users of other libraries. tests/CASES.md lists them, and
names the tests of cases that are in other files.
"""

import gc
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    Recorder,
    assert_close,
    assert_same_state,
    images,
    loss_and_gradients,
    twins,
)

from benchmarks.memory import xla_temporary_bytes
from revnet_tf import RevBlock, RevSequence, _run
from revnet_tf._coupling import Coupling
from revnet_tf._functional import Function
from revnet_tf._pair import Pair
from revnet_tf._run import Step

layers = keras.layers

# Together they take longer than all other tests.


def graph(function):
    return tf.function(function, autograph=False)


def dense_block(units=4, **kwargs):
    return RevBlock(layers.Dense(units, "tanh"), layers.Dense(units, "tanh"), **kwargs)


class Probe(layers.Layer):
    """A branch that records in Python its calls and its inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []
        inputs = []
        self.inputs = lambda: inputs  # Keras would track an attribute.

    def call(self, x, training=False):
        if not isinstance(x, keras.KerasTensor):
            self.calls.append(training)
            self.inputs().append(x)
        return 0.5 * x

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a01_inputs_by_keyword_are_recomputed_like_inputs_by_position(run):
    x = images(2, 8)
    results = []
    for by_keyword in (False, True):
        block = RevBlock(Probe(), Probe())

        def gradient(x, block=block, by_keyword=by_keyword):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = (
                    block(inputs=x, training=True)
                    if by_keyword
                    else block(x, training=True)
                )
            return tape.gradient(y, x)

        block(x, training=True)  # The first call also traces the branches.
        block.f.calls.clear()
        block.g.calls.clear()
        results.append(run(gradient)(x))
        assert block.f.calls == block.g.calls == [True, True]
    np.testing.assert_array_equal(*results)


@keras.saving.register_keras_serializable("tests")
class Gated(layers.Layer):
    """A branch with `training` and a keyword of its own."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, x, training=False, gate=None):
        y = tf.tanh(self.w * x) * gate
        return y if training else 2.0 * y


def test_a02_keywords_of_the_branches_train_alike_in_eager_and_graph_mode():
    losses = []
    for recompute in (True, False):
        for eagerly in (True, False):
            keras.utils.set_random_seed(1)
            x, gate = keras.Input((8,)), keras.Input((4,))
            block = RevBlock(Gated(), layers.Dense(4), recompute=recompute)
            model = keras.Model([x, gate], block(x, gate=gate))
            model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eagerly)
            data = [images(4, 8), images(4, 4, seed=1)], images(4, 8, seed=2)
            losses.append([model.train_on_batch(*data) for _ in range(3)])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a03_pairing_of_weights_and_gradients_does_not_depend_on_chance(mode):
    # TensorFlow's own pairing follows addresses in eager mode, and names that collide
    # in a graph. Each try therefore uses new objects.
    def make():
        def branch():
            return keras.Sequential([layers.Dense(3, use_bias=False) for _ in "abc"])

        return RevBlock(branch(), branch())

    x = images(4, 6)
    kept = []  # Else the next layers get the same addresses.
    for _ in range(20 if mode == "eager" else 5):
        pair = twins(make, (None, 6))
        kept.append(pair)
        step = graph(loss_and_gradients) if mode == "graph" else loss_and_gradients
        assert_close(*(step(layer, x) for layer in pair), rtol=1e-4, atol=1e-5)


def norm_block(units=4, dropout=0.3):
    def branch():
        stack = [layers.BatchNormalization(momentum=0.9), layers.Dense(units, "tanh")]
        return keras.Sequential([*stack, layers.Dropout(dropout, seed=1)])

    return RevBlock(branch(), branch())


def test_a04_branches_without_weights_yet_are_built_by_a_first_call_in_a_graph(run):
    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(7)
        layer = norm_block()
        layer.recompute = recompute
        step = run(lambda x, layer=layer: loss_and_gradients(layer, x))
        results.append(step(images(3, 8)))
        assert len(layer.trainable_variables) == len(results[-1]) - 2 == 2 * 4
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_a04_branches_without_weights_yet_are_built_in_a_strategy_scope(two_replicas):
    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(7)
        with two_replicas.scope():
            layer = norm_block()
            layer.recompute = recompute
            layer(images(3, 8), training=True)
        assert len(layer.trainable_variables) == 2 * 4

        @tf.function(autograph=False)
        def step(x, layer=layer):
            return two_replicas.run(loss_and_gradients, (layer, x))

        values = map(two_replicas.experimental_local_results, step(images(3, 8)))
        results.append([value for replicas in values for value in replicas])
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("read", [[], [True, True]], ids=["too_few", "too_many"])
def test_a05_a_branch_with_another_number_of_gradients_is_refused(read):
    # The run has one gradient for each weight. A branch that reports more or fewer
    # weights than it has is an error.
    weight = tf.constant(2.0)

    class Branch:
        def __call__(self, weights, state, inputs):
            return self.trace(weights, state, inputs)[:3]

        def trace(self, weights, state, inputs):
            return [weights[0] * inputs[0]], [], [], read

        check = Function("branch", None).check

    branch = Branch()
    x = images(2, 4)
    step = Step(Coupling(branch, branch), weights=[0])
    with pytest.raises(ValueError, match="zip"), tf.GradientTape() as tape:
        tape.watch(x)
        result = _run.run([step], [x, x], Pair(), Pair(), [weight])
        tape.gradient(result.outputs, x)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a06_a_pair_has_the_values_and_gradients_of_one_tensor(run, kind):
    block = dense_block()
    x = images(5, 8)
    block.build(x.shape)
    weights = [v.value for v in block.trainable_variables]

    def of_tensor(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = block(x, training=True)
            loss = tf.reduce_sum(tf.sin(y))
        return [y, *tape.gradient(loss, [x, *weights])]

    def of_pair(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.concat(block(kind(tf.split(x, 2, -1)), training=True), -1)
            loss = tf.reduce_sum(tf.sin(y))
        return [y, *tape.gradient(loss, [x, *weights])]

    assert_close(run(of_pair)(x), run(of_tensor)(x), rtol=1e-6, atol=1e-6)


def test_a06_a_dict_of_streams_is_refused():
    streams = {"x1": images(2, 4), "x2": images(2, 4)}
    with pytest.raises(ValueError, match=r"takes one tensor or a pair \(x1, x2\)"):
        dense_block()(streams)


def test_a07_symbolic_call_with_an_unknown_length_trains():
    x = keras.Input((None, 16))
    y = RevBlock(*(layers.Conv1D(8, 3, padding="same") for _ in "fg"))(x)
    assert y.shape == (None, None, 16)
    model = keras.Model(x, y)
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.fit(images(4, 5, 16), images(4, 5, 16), verbose=0)
    assert not np.array_equal(model.get_weights()[0], before[0])


def test_a07_an_image_of_unknown_size_with_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="3 entries on axis=-1"):
        dense_block()(keras.Input((None, None, 3)))


class Penalized(keras.Model):
    """A model whose loss includes the squared norm of the gradient for the input."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = self.compute_loss(x, y, self(x, training=True))
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            total = loss + penalty
        weights = self.trainable_variables
        gradients = outer.gradient(total, [v.value for v in weights])
        self.optimizer.apply(gradients, weights)
        return {"total": total}


@pytest.mark.thorough
@pytest.mark.parametrize("eagerly", [True, False])
def test_a09_a_gradient_penalty_is_refused_and_trains_without_recomputation(eagerly):
    x = keras.Input((4, 4, 4))
    f = keras.Sequential([layers.BatchNormalization(), layers.Conv2D(2, 1)])
    block = RevBlock(f, layers.Conv2D(2, 1, activation="tanh"))
    model = Penalized(x, block(x))
    data = images(4, 4, 4, 4), images(4, 4, 4, 4, seed=1)
    compiled = dict(optimizer=keras.optimizers.SGD(0.01), loss="mse")
    model.compile(**compiled, run_eagerly=eagerly)
    before = model.get_weights()
    with pytest.raises(NotImplementedError, match="recompute=False"):
        model.fit(*data, verbose=0)
    block.recompute = False
    model.set_weights(before)
    compiled["optimizer"] = keras.optimizers.SGD(0.01)
    model.compile(**compiled, run_eagerly=eagerly)
    losses = model.fit(*data, epochs=8, verbose=0, shuffle=False).history["total"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("pfor", [True, False])
def test_a10_repeated_gradients_are_equal_and_change_no_state(pfor):
    # Dropout draws its mask from a state. If a gradient changed it, the next would
    # differ.
    def make():
        def branch():
            norm = layers.BatchNormalization(momentum=0.9)
            drop = layers.Dropout(0.3, seed=1)
            return keras.Sequential([norm, layers.Dense(2, "tanh"), drop])

        return RevBlock(branch(), branch())

    layer, twin = twins(make, (None, 4))
    x = images(5, 4)

    def derivatives(layer):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=True)
        state = [v.numpy() for v in layer.non_trainable_variables]
        first, second = tape.gradient(y, x), tape.gradient(y, x)
        np.testing.assert_array_equal(first, second)
        jacobian = tape.batch_jacobian(y, x, experimental_use_pfor=pfor)
        np.testing.assert_array_equal(tape.gradient(y, x), first)
        for v, old in zip(layer.non_trainable_variables, state, strict=True):
            np.testing.assert_array_equal(v.numpy(), old, err_msg=v.path)
        return first, jacobian

    assert_close(derivatives(layer), derivatives(twin), rtol=1e-4, atol=1e-5)
    assert_same_state(layer, twin)


def test_a14_a_step_in_a_wrapped_function_of_tensorflow_1_equals_autodiff():
    pair = twins(norm_block, (None, 8))
    x = images(3, 8)
    results = []
    for layer in pair:
        step = tf.compat.v1.wrap_function(
            lambda x, layer=layer: loss_and_gradients(layer, x),
            [tf.TensorSpec(x.shape)],
        )
        results.append(step(x))
    assert_close(*results, rtol=1e-4, atol=1e-5)
    assert_same_state(*pair)


def test_a14_a_step_in_a_graph_of_tensorflow_1_equals_autodiff():
    results = []
    data = images(3, 8).numpy()
    for recompute in (True, False):
        keras.utils.set_random_seed(7)
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            layer = norm_block()
            layer.recompute = recompute
            layer.build((None, 8))
            x = tf.compat.v1.placeholder(tf.float32, data.shape)
            step = loss_and_gradients(layer, x)
            session.run(tf.compat.v1.global_variables_initializer())
            results.append(session.run(step, {x: data}))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a16_a_block_made_in_a_remat_scope_recomputes_once(run):
    def make():
        f, g = (keras.Sequential([Probe(), layers.Dense(4, "tanh")]) for _ in "fg")
        return RevBlock(f, g)

    def make_in_scope():
        f, g = (keras.Sequential([Probe(), layers.Dense(4, "tanh")]) for _ in "fg")
        with keras.RematScope(mode="full"):
            return RevBlock(f, g)

    layer, _ = twins(make_in_scope, (None, 8))
    _, twin = twins(make, (None, 8))
    x = images(5, 8)
    layer(x, training=True)  # The first call also traces the branches.
    calls = layer.f.layers[0].calls
    calls.clear()
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert calls == [True, True]
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a16_branches_made_in_a_remat_scope_are_refused(mode):
    # `keras.remat` cannot call a layer with `training` in a graph, also without this
    # library. The block therefore promises an error, and no missing gradient.
    with keras.RematScope(mode="full"):
        f, g = layers.Dense(4), layers.Dense(4)
    block = RevBlock(f, g)
    block.build((None, 8))
    step = graph(loss_and_gradients) if mode == "graph" else loss_and_gradients
    with pytest.raises(ValueError):
        step(block, images(2, 8))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 64])
def test_b04_recomputation_never_takes_more_than_ordinary_backpropagation(batch_size):
    ordinary = xla_temporary_bytes("ordinary", 8, batch_size)
    for network in ("sequence", "functional"):
        assert xla_temporary_bytes(network, 8, batch_size) < ordinary


def live_bytes():
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o).__name__ == "EagerTensor"]
    return sum(t.shape.num_elements() * t.dtype.size for t in tensors)


@pytest.mark.thorough
def test_b05_no_tensor_is_left_over_from_an_eager_step():
    x = keras.Input((64,))
    y = RevSequence([norm_block(32), norm_block(32)])(x)
    model = keras.Model(x, y)
    model.compile(keras.optimizers.Adam(), "mse", run_eagerly=True)
    data = images(32, 64), images(32, 64)
    found = []
    for _ in range(3):
        for _ in range(5):
            model.train_on_batch(*data)
        found.append(live_bytes())
    assert found[0] > 0  # The weights at least: the count finds tensors.
    assert found[1] == found[2]


@pytest.mark.thorough
def test_b05_resident_memory_is_flat_after_warming_up():
    sequence = RevSequence([dense_block(128) for _ in range(3)])
    model = keras.Sequential([keras.Input((256,)), sequence])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = images(256, 256)

    def resident_after(steps):
        for _ in range(steps):
            model.train_on_batch(x, x)
        gc.collect()
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    # One pair of streams stored for each step would be 256 KiB, 37 MiB in 150 steps.
    first, last = resident_after(50), resident_after(150)
    assert last - first < 8 * 1024


@pytest.mark.parametrize("recompute, alive", [(True, 0), (False, 2 * 2 * 4)])
def test_b06_no_replica_stores_hidden_tensors(two_replicas, recompute, alive):
    made, found = [], []
    with two_replicas.scope():
        blocks = [RevBlock(Recorder(made), Recorder(made)) for _ in range(4)]
        sequence = RevSequence(blocks, recompute=recompute)
        sequence(images(2, 8), training=True)

    def forward():
        x = images(2, 8)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = sequence(x, training=True)
        return y, tape

    made.clear()
    tapes = two_replicas.run(forward)
    gc.collect()
    found = sum(reference() is not None for reference in made)
    assert len(made) == 2 * 2 * 4
    assert found == alive
    del tapes


# A training step on one device or on two, with a batch size for each device.
REPLICA_STEP = """
import json, pathlib, re, sys
import numpy as np, tensorflow as tf
replicas, batch_size = map(int, sys.argv[1:])
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
from benchmarks import networks
strategy = tf.distribute.get_strategy()
if replicas == 2:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = networks.build("functional", 8)
size = replicas * batch_size
x = np.random.default_rng(0).standard_normal((size, 32, 32, 64), dtype="float32")
data = tf.data.Dataset.from_tensors((x, np.zeros(size, "int32"))).repeat(2)
model.fit(data, verbose=0)
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1))))
"""


@pytest.mark.slow
def test_b06_a_replica_needs_what_a_single_device_needs():
    def peak(replicas, batch_size):
        done = subprocess.run(
            [sys.executable, "-c", REPLICA_STEP, str(replicas), str(batch_size)],
            cwd=pathlib.Path(__file__).parents[2],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    def per_sample(replicas):
        small, large = (peak(replicas, n) for n in (8, 40))
        return (large - small) / (32 * replicas)

    # At worst, two replicas reach their peaks at the same time.
    assert per_sample(2) < 1.15 * per_sample(1)


def test_b08_reconstructed_streams_equal_those_of_the_forward_pass():
    # Each branch records its input: x2 (f) and y1 (g) of each of ten blocks.
    def branch():
        stack = [Probe(), layers.BatchNormalization(), layers.Dense(4, "tanh")]
        return keras.Sequential([*stack, layers.Dropout(0.3, seed=1)])

    sequence = RevSequence([RevBlock(branch(), branch()) for _ in range(10)])
    x = images(16, 8)
    sequence(x, training=True)
    probes = [b.layers[0] for b in sequence.branches()]
    for probe in probes:
        probe.inputs().clear()
    loss_and_gradients(sequence, x)
    for probe in probes:
        forward, rebuilt = probe.inputs()
        np.testing.assert_allclose(rebuilt, forward, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["stacked", "sequence"])
def test_b09_the_traced_step_grows_linearly_with_depth(kind):
    def nodes(num_blocks):
        def branch():
            return keras.Sequential([layers.BatchNormalization(), layers.Dense(4)])

        blocks = [RevBlock(branch(), branch()) for _ in range(num_blocks)]
        parts = blocks if kind == "stacked" else [RevSequence(blocks)]
        model = keras.Sequential([keras.Input((8,)), *parts])
        step = graph(lambda x: loss_and_gradients(model, x))
        traced = step.get_concrete_function(tf.TensorSpec((4, 8))).graph.as_graph_def()
        library = sum(len(f.node_def) for f in traced.library.function)
        return len(traced.node) + library

    two, three, five = (nodes(n) for n in (2, 3, 5))
    assert five - three == 2 * (three - two)


@pytest.mark.parametrize("shape", [(0,), (8, 8, 0)])
def test_b10_a_model_without_channels_is_refused(shape):
    with pytest.raises(ValueError, match="0 entries on axis=-1"):
        dense_block()(keras.Input(shape))


def test_b11_image_sizes_are_traced_together():
    # After a trace for other sizes, Keras relaxes the shapes of the step.
    probe = Probe()
    f = keras.Sequential([probe, layers.Conv2D(4, 3, padding="same")])
    x = keras.Input((None, None, 8))
    y = RevBlock(f, layers.Conv2D(4, 3, padding="same"))(x)
    model = keras.Model(x, layers.GlobalAveragePooling2D()(y))
    model.compile("sgd", "mse", jit_compile=False)
    counts = []
    for size in range(4, 16):
        model.train_on_batch(images(2, size, size + 1, 8), images(2, 8))
        counts.append(len(probe.calls))
    assert counts[2:] == [counts[2]] * 10
