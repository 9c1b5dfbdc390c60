"""The gradient by reconstruction: right, computed once, and without stored tensors."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    Recorder,
    assert_close,
    assert_same_state,
    conv_branch,
    conv_sequence,
    images,
    loss_and_gradients,
    twins,
)

from revnet_tf import RevBlock, RevSequence, _run
from revnet_tf._coupling import Coupling
from revnet_tf._layer import Observer
from revnet_tf._pair import Pair
from revnet_tf._run import Step

layers = keras.layers

# Rounding of the reconstruction: a few units in the last place for each block.
TOLERANCE = {
    "float64": dict(rtol=1e-9, atol=1e-9),
    "float32": dict(rtol=1e-4, atol=1e-5),
}


@pytest.mark.parametrize(
    "run_in_every_mode, dtype",
    [
        ("eager", "float64"),
        ("graph", "float64"),
        ("xla", "float32"),
        pytest.param("eager", "float32", marks=pytest.mark.thorough),
        pytest.param("graph", "float32", marks=pytest.mark.thorough),
        pytest.param("xla", "float64", marks=pytest.mark.thorough),
    ],
    indirect=["run_in_every_mode"],
)
def test_gradients_equal_autodiff_and_state_advances_once(run_in_every_mode, dtype):
    recomputed, stored = twins(lambda: conv_sequence(dtype=dtype), (None, 6, 6, 8))
    x = images(5, 6, 6, 8, dtype=dtype)
    step = run_in_every_mode(loss_and_gradients)
    other = run_in_every_mode(loss_and_gradients)
    for _ in range(2):  # The second step starts from changed statistics.
        got, expected = step(recomputed, x), other(stored, x)
    assert_close(got, expected, **TOLERANCE[dtype])
    assert_same_state(recomputed, stored)


def test_moving_mean_after_one_step_is_a_tenth_of_the_batch_mean():
    # By hand: momentum 0.9 from 0. A second update would give 0.19.
    block = RevBlock(conv_branch(4), conv_branch(4))
    x = images(8, 6, 6, 8) + 3.0
    loss_and_gradients(block, x)
    for branch, stream in ((block.f, x[..., 4:]), (block.g, None)):
        norm = branch.layers[0]
        if stream is not None:
            expected = 0.1 * tf.reduce_mean(stream, [0, 1, 2])
            np.testing.assert_allclose(norm.moving_mean, expected, rtol=1e-5)
        assert np.all(norm.moving_mean.numpy() != 0)


def test_dropout_mask_is_replayed_and_moves_on_with_the_next_step(run):
    def make():
        return RevBlock(layers.Dropout(0.5, seed=1), layers.Dropout(0.5, seed=2))

    recomputed, stored = twins(make, (None, 64))
    x = images(4, 64)
    step = run(loss_and_gradients)
    first = step(recomputed, x)
    assert_close(first, run(loss_and_gradients)(stored, x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(first[1], step(recomputed, x)[1])


class Counter(layers.Layer):
    """A branch that records in Python the mode of each call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def call(self, x, training=False):
        if not isinstance(x, keras.KerasTensor):
            self.calls.append(training)
        return 0.5 * x

    def compute_output_shape(self, input_shape):
        return input_shape


def test_branches_run_twice_in_a_training_step_and_once_in_a_prediction(run):
    block = RevBlock(Counter(), Counter())
    x = images(2, 8)
    block(x, training=True)  # The first call also traces the branches.
    block.f.calls.clear()
    block.g.calls.clear()
    run(loss_and_gradients)(block, x)
    assert block.f.calls == block.g.calls == [True, True]
    block.f.calls.clear()
    run(lambda x: block(x, training=False))(x)
    assert block.f.calls == [False]


def test_two_losses_of_one_forward_pass_both_differentiate():
    layer, twin = twins(conv_sequence, (None, 6, 6, 8))
    x = images(3, 6, 6, 8)

    def gradients(layer):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=True)
            a, b = tf.reduce_sum(y[..., :4] ** 2), tf.reduce_sum(tf.sin(y[..., 4:]))
            both = a + b
        return [tape.gradient(loss, x) for loss in (a, b, both, a)]

    got, expected = gradients(layer), gradients(twin)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[0] + got[1], got[2], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got[0], got[3])
    assert_same_state(layer, twin)


def test_gradient_sees_the_weights_of_its_forward_pass():
    block = RevBlock(layers.Dense(2), layers.Dense(2))
    x = images(3, 4)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.reduce_sum(block(x, training=True) ** 2)
    before = tape.gradient(y, x)
    for v in block.trainable_variables:
        v.assign(v + 1.0)
    np.testing.assert_array_equal(tape.gradient(y, x), before)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_stream_only(run, used):
    layer, twin = twins(
        lambda: RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh")),
        ((None, 4), (None, 4)),
    )
    x = images(5, 4), images(5, 4, seed=1)

    def gradients(layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True)[used] ** 2)
        weights = [v.value for v in layer.trainable_variables]
        return tape.gradient(loss, [*x, *weights], unconnected_gradients="zero")

    got, expected = run(gradients)(layer), run(gradients)(twin)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_losses_made_by_branches_count_once_with_their_gradient(run):
    def make():
        return RevBlock(
            layers.Dense(4, activity_regularizer="l2", kernel_regularizer="l2"),
            layers.Dense(4, activity_regularizer="l1"),
        )

    layer, twin = twins(make, (None, 8))
    x = images(5, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    layer(x, training=True)
    twin(x, training=True)
    assert len(layer.losses) == len(twin.losses) == 3
    np.testing.assert_allclose(
        sorted(map(float, layer.losses)), sorted(map(float, twin.losses)), rtol=1e-5
    )


def test_a_branch_shared_by_all_blocks_gets_the_sum_and_its_state_in_order(run):
    def make():
        shared = conv_branch(4, dropout=0.3)
        return RevSequence([RevBlock(shared, shared) for _ in range(3)])

    layer, twin = twins(make, (None, 6, 6, 8))
    assert len(layer.trainable_variables) == 8  # 2 norms, 2 convolutions
    x = images(3, 6, 6, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert_same_state(layer, twin)


def test_frozen_branch_stays_as_it_is_and_passes_the_gradient_on(run):
    def make():
        sequence = conv_sequence(num_blocks=2)
        sequence.blocks[1].f.trainable = False
        return sequence

    layer, twin = twins(make, (None, 6, 6, 8))
    frozen = layer.blocks[1].f
    before = [v.numpy() for v in frozen.variables]
    x = images(3, 6, 6, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for v, old in zip(frozen.variables, before, strict=True):
        if "seed" not in v.path:
            np.testing.assert_array_equal(v.numpy(), old)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_float32_streams_and_equal_casts(policy):
    keras.config.set_dtype_policy(policy)
    layer, twin = twins(lambda: conv_sequence(dropout=0.0), (None, 6, 6, 8))
    x = images(4, 6, 6, 8)
    y = layer(x, training=True)
    assert y.dtype == tf.float32
    assert layer.blocks[0].f.layers[-1].compute_dtype == policy.removeprefix("mixed_")
    step = tf.function(loss_and_gradients, autograph=False)
    got, expected = step(layer, x), step(twin, x)
    assert all(g.dtype == tf.float32 for g in got)
    # The reconstructed streams differ in float32's last places. Some values therefore
    # round to the next float16 or bfloat16 value.
    step_size = 2**-10 if policy == "mixed_float16" else 2**-7
    for a, b in zip(got, expected, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < step_size


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_second_derivative_is_refused(mode):
    block = RevBlock(layers.Dense(2, "tanh"), layers.Dense(2, "tanh"))
    x = images(3, 4)
    block.build(x.shape)

    def linear_loss():  # dy does not depend on x. Only the guard connects them.
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(block(x, training=True))
            gradient = inner.gradient(loss, x)
        return outer.gradient(gradient, x)

    def weights():
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(block(x, training=True))
            gradient = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(gradient, block.trainable_variables[0].value)

    for function in (linear_loss, weights):
        if mode == "graph":
            function = tf.function(function, autograph=False)
        with pytest.raises(NotImplementedError, match="recompute=False"):
            function()
    block.recompute = False
    assert linear_loss() is not None


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_forward_mode_is_refused(mode):
    block = RevBlock(layers.Dense(2, "tanh"), layers.Dense(2, "tanh"))
    x = images(3, 4)
    block.build(x.shape)

    def jvp():
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            y = block(x, training=True)
        return accumulator.jvp(y)

    with pytest.raises(NotImplementedError, match="recompute=False"):
        (jvp if mode == "eager" else tf.function(jvp, autograph=False))()


def test_batch_jacobian_equals_autodiff():
    layer, twin = twins(
        lambda: RevBlock(layers.Dense(2, "tanh"), layers.Dense(2, "tanh")), (None, 4)
    )
    x = images(3, 4)

    def jacobian(layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.batch_jacobian(y, x)

    np.testing.assert_allclose(jacobian(layer), jacobian(twin), rtol=1e-4, atol=1e-5)


def test_gradient_agrees_with_finite_differences():
    def branch():
        return layers.Dense(3, "tanh", dtype="float64")

    layer = RevSequence(
        [RevBlock(branch(), branch(), dtype="float64") for _ in "ab"], dtype="float64"
    )
    x = images(2, 6, dtype="float64")
    theoretical, numerical = tf.test.compute_gradient(
        lambda x: tf.reduce_sum(tf.sin(layer(x, training=True))), [x], delta=1e-5
    )
    np.testing.assert_allclose(theoretical[0], numerical[0], rtol=1e-5, atol=1e-7)


def hidden_tensors_alive(num_blocks, recompute):
    made = []
    sequence = RevSequence(
        [RevBlock(Recorder(made), Recorder(made)) for _ in range(num_blocks)],
        recompute=recompute,
    )
    x = images(2, 8)
    sequence.build(x.shape)
    sequence(x, training=True)
    made.clear()
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = sequence(x, training=True)
        gc.collect()
        alive = sum(reference() is not None for reference in made)
        assert len(made) == 2 * num_blocks
    assert tape.gradient(y, x) is not None
    return alive


def test_no_hidden_tensor_stays_alive_in_eager_mode():
    assert hidden_tensors_alive(6, recompute=True) == 0
    assert hidden_tensors_alive(6, recompute=False) == 12  # So the test can fail.


def traced_step(function, weights, *shape):
    """Returns the operations of the forward pass, and the others of the gradient."""
    forward = []

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            forward.extend(op.name for op in y.graph.get_operations())
        return tape.gradient(y, [x, *weights])

    graph = step.get_concrete_function(tf.TensorSpec(shape)).graph
    needed = [o for t in graph.outputs for o in (t.op, *ancestors(t.op))]
    backward = [o for o in needed if o.name not in forward]
    return [graph.get_operation_by_name(name) for name in forward], backward


class Scaled(layers.Layer):
    """A branch with a weight and an operation whose type identifies it in a graph."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))

    def call(self, x):
        return self.w * self.operation(x)


def test_recomputation_waits_for_all_gradients_of_the_branch_that_follows():
    # Every branch has an operation of its own type. Before its second evaluation, the
    # backward pass must compute two values of the following branch. They are its
    # derivative, and the gradient for its weight, a sum over the batch.
    kinds = ["Erf", "Lgamma", "Atan", "Asinh"]
    operations = [tf.math.erf, tf.math.lgamma, tf.atan, tf.asinh]
    derivative = {"Lgamma": "Digamma", "Atan": "Reciprocal", "Asinh": "Cosh"}
    branches = [Scaled(operation) for operation in operations]
    sequence = RevSequence([RevBlock(*branches[:2]), RevBlock(*branches[2:])])
    sequence.build((2, 8))
    weights = [v.value for v in sequence.trainable_variables]
    _, backward = traced_step(lambda x: sequence(x, training=True), weights, 2, 8)
    again = {o.type: o for o in backward if o.type in kinds}
    for kind, following in zip(kinds, kinds[1:], strict=False):
        before = ancestors(again[kind])
        assert {following, derivative[following]} <= {op.type for op in before}
        sums = [op for op in before if op.type == "Sum"]
        assert any(again[following] in ancestors(op) for op in sums)


def test_unused_input_is_not_reconstructed():
    # A linear branch has two matrix products for its gradients. One more reconstructs
    # a stream, except for the first stream of the first block.
    sequence = RevSequence(
        [RevBlock(layers.Dense(4), layers.Dense(4)) for _ in range(2)]
    )
    sequence.build((2, 8))
    weights = [v.value for v in sequence.trainable_variables]
    _, backward = traced_step(lambda x: sequence(x, training=True), weights, 2, 8)
    products = {op.name for op in backward if op.type == "MatMul"}
    assert len(products) == 4 * 2 + 3


def ancestors(op):
    """Returns all operations that must have run before `op` runs."""
    seen, todo = {}, [op]
    while todo:
        for before in [t.op for t in todo[-1].inputs] + list(todo.pop().control_inputs):
            if before.name not in seen:
                seen[before.name] = before
                todo.append(before)
    return seen.values()


def test_stacked_blocks_do_not_read_their_own_outputs_again():
    # TensorFlow stores the tensors of the forward pass that the backward pass reads.
    blocks = [RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh")) for _ in "abc"]
    for block in blocks:
        block.build((None, 8))

    def stack(x, factor=None):
        for block in blocks:
            x = block(x if factor is None else factor * x, training=True)
        return x

    def kept(function):
        forward, backward = traced_step(function, [], 2, 8)
        names = {o.name for o in forward}
        read = [t for o in backward for t in o.inputs if t.op.name in names]
        return {t.name for t in read if t.shape.as_list() in ([2, 4], [2, 8])}

    # The output of the last block. With other layers between them, that of each block.
    assert len(kept(stack)) == 1
    assert len(kept(lambda x: stack(x, 2.0))) == 3


def test_blocks_with_another_consumer_between_them_have_right_gradients(run):
    def make():
        return [
            RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh")) for _ in "ab"
        ]

    def gradients(blocks, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            h = blocks[0](x, training=True)
            swapped = tf.concat([h[:, 4:], h[:, :4]], 1)
            y = blocks[1](swapped, training=True) + blocks[1](h, training=True)
            loss = tf.reduce_sum(y**2) + tf.reduce_sum(tf.sin(h))
        weights = [v.value for b in blocks for v in b.trainable_variables]
        return tape.gradient(loss, [x, *weights])

    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(3)
        blocks = make()
        for block in blocks:
            block.recompute = recompute
            block.build((None, 8))
        results.append(run(gradients)(blocks, images(5, 8)))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_inner_functions_and_two_gradients_of_them_are_right():
    blocks = [RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh")) for _ in "ab"]
    for block in blocks:
        block.build((None, 8))
    inner = tf.function(lambda x: blocks[1](blocks[0](x, training=True), training=True))
    x = images(5, 8)

    def gradients():
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = inner(x)
            a, b = tf.reduce_sum(y**2), tf.reduce_sum(tf.sin(y))
        return tape.gradient(a, x), tape.gradient(b, x)

    got = gradients(), tf.function(gradients, autograph=False)()
    for block in blocks:
        block.recompute = False
    inner = tf.function(lambda x: blocks[1](blocks[0](x, training=True), training=True))
    expected = gradients()
    for pair in got:
        assert_close(pair, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_equal_shape_get_their_own_gradients(run):
    def make():
        def branch():
            return keras.Sequential([layers.Dense(4, "tanh") for _ in range(3)])

        return RevBlock(branch(), branch())

    layer, twin = twins(make, (None, 8))
    x = images(5, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unused_weight_gets_a_zero_gradient():
    class Unused(layers.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(shape=(3,))

        def call(self, x):
            return 0.5 * x

    block = RevBlock(Unused(), layers.Dense(4))
    gradients = loss_and_gradients(block, images(2, 8))
    np.testing.assert_array_equal(gradients[2], np.zeros(3))


def test_run_refuses_a_branch_with_another_number_of_states():
    def branch(weights, state, inputs):
        return inputs, [], []

    step = Step(Coupling(branch, branch), state=[0])
    x, state = images(2, 4), [tf.zeros([])]
    with pytest.raises(ValueError, match="zip"):
        _run.run([step], [x, x], Pair(), Pair(), state=state)


def drifting_sequence(anchors):
    """Returns blocks of scaled weights. Streams grow, so reconstruction fails."""

    def branch():
        kernel = keras.initializers.RandomNormal(stddev=2.0)
        return layers.Dense(4, kernel_initializer=kernel)

    return RevSequence(
        [RevBlock(branch(), branch(), anchor=i in anchors) for i in range(10)]
    )


@pytest.mark.parametrize(
    "anchors, right", [(range(10), True), (range(0, 10, 2), True), ((), False)]
)
def test_anchors_make_gradients_right_where_reconstruction_fails(run, anchors, right):
    pair = twins(lambda: drifting_sequence(anchors), (None, 8))
    x = images(16, 8)

    def step(layer, x):
        with tf.GradientTape() as tape:
            y = tf.math.asinh(layer(x, training=True))
        return tape.gradient(y, [v.value for v in layer.trainable_variables])

    recomputed, stored = (
        np.concatenate([*map(np.ravel, run(step)(layer, x))]) for layer in pair
    )
    error = np.linalg.norm(recomputed - stored) / np.linalg.norm(stored)
    # The reconstruction of one block loses some digits, that of ten loses all.
    assert error < 1e-3 if right else error > 0.1


def test_an_anchor_hands_its_true_inputs_on_to_the_block_before(run):
    layer = RevBlock(layers.Dense(2), layers.Dense(2))
    layer.build((None, 4))
    told = []
    observer = Observer()
    observer.reconstructed = lambda *args: told.append(args[1:])

    def step(x):
        for anchor in (False, True):
            layer.anchor = anchor
            with observer:
                with tf.GradientTape() as tape:
                    y = 1e4 * layer(100 * x, training=True)
                tape.gradient(y, layer.trainable_variables[0].value)
        return told

    told[:] = run(step)(images(64, 4))
    (inputs, rebuilt), (inputs_kept, kept) = told
    assert np.abs(np.subtract(rebuilt, inputs)).max() > 0
    np.testing.assert_array_equal(kept, inputs_kept)
