"""Branches: their effects, their arguments, and the refused ones."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, images, loss_and_gradients, twins

from revnet_tf import DownsamplingBlock, RevBlock, RevSequence, _functional, models
from revnet_tf._layer import promise_alike

layers = keras.layers


class AssignsItsWeight(layers.Layer):
    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))

    def call(self, x):
        self.w.assign(self.w * 0.5)
        return x * self.w


class AssignsItsSecondWeight(layers.Layer):
    """A branch that assigns its second weight, of another shape than the first."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], input_shape[-1]))
        self.bias = self.add_weight(shape=(input_shape[-1],))

    def call(self, x):
        self.bias.assign(self.bias * 0.5)
        return x @ self.kernel + self.bias


class DrawsFromTheGlobalSeed(layers.Layer):
    def call(self, x):
        return x + keras.random.normal((4,))


class ForeignLayer(layers.Layer):
    def __init__(self):
        super().__init__()
        other = layers.Dense(4)
        other.build((None, 4))
        self.hide = lambda: other

    def call(self, x):
        return self.hide()(x)


class ForeignVariable(layers.Layer):
    def __init__(self):
        super().__init__()
        variable = tf.Variable(2.0)
        self.hide = lambda: variable

    def call(self, x):
        return x * self.hide()


class TensorFlowRandom(layers.Layer):
    def call(self, x):
        return x * tf.random.uniform((4,))


class TensorFlowDropout(layers.Layer):
    def call(self, x, training=False):
        return tf.nn.dropout(x, 0.5) if training else x


class Counts(layers.Layer):
    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0, trainable=False)

    def call(self, x):
        self.count.assign_add(1)
        return 0.5 * x


class HiddenRandom(layers.Layer):
    """A branch whose random operation is in the function library of the graph."""

    def call(self, x):
        return tf.function(lambda x: x * tf.random.normal((4,)))(x)


class Rematerialized(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return keras.remat(self.dense)(x)


class Decorated(layers.Layer):
    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))

    @tf.function
    def call(self, x, training=False):
        return x * self.w


class ChangesStateInCond(layers.Layer):
    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, x, training=False):
        return tf.cond(
            tf.reduce_sum(x) > 1e9, lambda: self.norm(x, training=training), lambda: x
        )


REFUSED = [
    (AssignsItsWeight, "assigns its own trainable weight"),
    (AssignsItsSecondWeight, "assigns its own trainable weight"),
    (lambda: layers.SpectralNormalization(layers.Dense(4)), "assigns its own"),
    (DrawsFromTheGlobalSeed, "SeedGenerator"),
    (ForeignLayer, "its own trainable variables"),
    (ForeignVariable, "its own trainable variables"),
    (TensorFlowRandom, "RandomUniform"),
    (TensorFlowDropout, "RandomUniform"),
    (HiddenRandom, "RandomStandardNormal"),
    (Counts, "AssignAddVariableOp"),
    (Rematerialized, "no gradient reaches it"),
]


@pytest.mark.parametrize("branch, message", REFUSED)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_branch_that_recomputation_cannot_follow_is_refused(branch, message, mode):
    block = RevBlock(branch(), layers.Dense(4))
    x = images(2, 8)
    block.build(x.shape)
    step = loss_and_gradients
    if mode == "graph":
        step = tf.function(step, autograph=False)
    with pytest.raises(ValueError, match=message):
        step(block, x)
    block.recompute = False
    assert np.isfinite(loss_and_gradients(block, x)[0])


def test_branch_that_is_a_function_of_its_own_is_refused():
    block = RevBlock(Decorated(), layers.Dense(4))
    x = images(2, 8)
    with pytest.raises(ValueError, match="Remove the decorator"):
        for _ in range(2):  # TensorFlow traces the first two calls.
            loss_and_gradients(block, x)


def test_state_that_cannot_leave_a_control_flow_graph_is_refused():
    block = RevBlock(ChangesStateInCond(), layers.Dense(4))
    x = images(2, 8)
    block.build(x.shape)
    with pytest.raises(ValueError, match="from where the new value cannot leave"):
        tf.function(loss_and_gradients, autograph=False)(block, x)


@pytest.mark.parametrize("step", [DownsamplingBlock, RevSequence])
def test_every_layer_refuses_the_branches_that_a_block_refuses(step):
    if step is RevSequence:
        layer = RevSequence([RevBlock(layers.Dense(4), TensorFlowRandom())])
    else:
        parts = [layers.Dense(4) for _ in range(3)]
        layer = DownsamplingBlock(TensorFlowRandom(), *parts)
    with pytest.raises(ValueError, match="RandomUniform"):
        loss_and_gradients(layer, images(2, 8))


class InControlFlow(layers.Layer):
    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))

    def call(self, x):
        x = tf.cond(tf.reduce_sum(x) > 0, lambda: x * self.w, lambda: tf.sin(x))
        return tf.while_loop(
            lambda i, x: i < 3, lambda i, x: (i + 1, tf.tanh(x * self.w)), (0, x)
        )[1]


class Attention(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization()
        self.attention = layers.MultiHeadAttention(2, 4, dropout=0.3, seed=1)

    def build(self, input_shape):
        self.norm.build(input_shape)
        self.attention.build(input_shape, input_shape)

    def call(self, x, training=False):
        x = self.norm(x)
        return self.attention(x, x, training=training)


def feed_forward():
    return keras.Sequential([layers.Dense(16, "gelu"), layers.Dense(8)])


BRANCHES = {
    "control_flow": (lambda: (InControlFlow(), InControlFlow()), (3, 8)),
    "attention": (lambda: (Attention(), feed_forward()), (2, 5, 16)),
    "layer_norm": (lambda: (layers.LayerNormalization(), layers.Dense(4)), (3, 8)),
    "group_norm": (
        lambda: (layers.GroupNormalization(2), layers.Conv2D(4, 1)),
        (2, 4, 4, 8),
    ),
    "renorm": (
        lambda: [layers.BatchNormalization(renorm=True) for _ in "fg"],
        (6, 8),
    ),
    "conv1d": (lambda: [layers.Conv1D(4, 3, padding="same") for _ in "fg"], (2, 5, 8)),
    "conv3d": (
        lambda: [layers.Conv3D(2, 3, padding="same") for _ in "fg"],
        (2, 3, 4, 3, 4),
    ),
    "recurrent": (
        lambda: [
            layers.GRU(4, return_sequences=True, dropout=0.2, seed=1) for _ in "fg"
        ],
        (2, 5, 8),
    ),
    "nested": (
        lambda: (RevBlock(layers.Dense(2), layers.Dense(2)), layers.Dense(4)),
        (3, 8),
    ),
    "gather": (lambda: [layers.Dense(4), Positions()], (2, 5, 8)),
}


class Positions(layers.Layer):
    """A branch with a lookup in a learnt table, whose gradient is sparse."""

    def build(self, input_shape):
        self.table = self.add_weight(shape=(9, input_shape[-1]), initializer="normal")

    def call(self, x):
        return tf.tanh(x) + tf.gather(self.table, tf.range(tf.shape(x)[1]))


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_any_kind_of_branch_has_the_gradients_of_its_twin(name, mode):
    make, shape = BRANCHES[name]
    layer, twin = twins(lambda: RevBlock(*make()), (None, *shape[1:]))
    step = loss_and_gradients
    if mode == "graph":
        step = tf.function(step, autograph=False)
    x = images(*shape)
    for _ in range(2):
        got, expected = step(layer, x), step(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for v, w in zip(layer.variables, twin.variables, strict=True):
        np.testing.assert_allclose(v.numpy(), w.numpy(), rtol=1e-5, err_msg=v.path)


class Conditioned(layers.Layer):
    """A branch with two arguments of its own. One has a gradient."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))

    def call(self, x, condition, keep=None):
        y = tf.tanh(self.w * x) * condition
        return y if keep is None else y * tf.cast(keep, y.dtype)


@pytest.mark.parametrize("kind", ["block", "sequence"])
def test_arguments_of_the_call_reach_the_branches_that_name_them(run, kind):
    def make():
        blocks = [RevBlock(Conditioned(), layers.Dense(4, "tanh")) for _ in "ab"]
        return blocks[0] if kind == "block" else RevSequence(blocks)

    results = []
    condition, keep = images(5, 4, seed=3), tf.constant([[1], [0], [1], [1], [0]])
    for recompute in (True, False):
        keras.utils.set_random_seed(7)
        layer = make()
        layer.recompute = recompute
        layer(images(2, 8), condition=condition[:2])  # other batch size

        def gradients(x, condition, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch([x, condition])
                y = layer(x, training=True, condition=condition, keep=keep)
                loss = tf.reduce_sum(tf.sin(y))
            weights = [v.value for v in layer.trainable_variables]
            return tape.gradient(loss, [x, condition, *weights])

        results.append(run(gradients)(images(5, 8), condition))
        y = layer(images(5, 8), condition=condition, keep=keep)
        x = layer.inverse(y, condition=condition, keep=keep)
        np.testing.assert_allclose(x, images(5, 8), rtol=1e-4, atol=1e-5)
    assert_close(*results, rtol=1e-4, atol=1e-5)
    assert np.any(results[0][1] != 0)


def test_argument_that_no_branch_names_is_refused():
    block = RevBlock(Conditioned(), layers.Dense(4))
    with pytest.raises(TypeError, match="'conditions'"):
        block(images(2, 8), condition=images(2, 4), conditions=images(2, 4))


def test_branch_that_needs_more_than_a_stream_is_refused():
    block = RevBlock(Conditioned(), layers.Dense(4))
    with pytest.raises(TypeError, match="cannot be called on one stream"):
        block(images(2, 8))


def test_model_with_a_condition_is_saved_and_loaded(tmp_path):
    keras.saving.register_keras_serializable("tests")(Conditioned)
    x, condition = keras.Input((8,)), keras.Input((4,))
    y = RevBlock(Conditioned(), layers.Dense(4))(x, condition=condition)
    model = keras.Model([x, condition], y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    data = [images(3, 8), images(3, 4)]
    np.testing.assert_array_equal(loaded(data), model(data))


@pytest.mark.parametrize("training", [False, True])
def test_implicit_mask_reaches_the_branches_and_goes_on(training):
    # Padded steps must not change the input of the pooling.
    model = keras.Sequential(
        [
            layers.Masking(),
            RevBlock(layers.GRU(4, return_sequences=True), layers.Dense(4)),
            layers.GlobalAveragePooling1D(),
        ]
    )
    x = images(2, 5, 8)
    padded = tf.concat([x, tf.zeros((2, 3, 8))], 1)
    np.testing.assert_allclose(
        model(padded, training=training), model(x, training=training), atol=1e-6
    )
    block = model.layers[1]
    block.recompute = False
    np.testing.assert_allclose(
        model(padded, training=training), model(x, training=training), atol=1e-6
    )


def test_mask_that_a_branch_cannot_use_ends_with_keras_warning():
    model = keras.Sequential(
        [layers.Masking(), RevBlock(*(layers.Conv1D(4, 1) for _ in "fg"))]
    )
    model.layers[1].supports_masking = False
    with pytest.warns(UserWarning, match="does not support masking"):
        model(images(2, 5, 8))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_vectorized_map_around_a_block_has_the_gradients_of_the_twin(mode):
    layer, twin = twins(
        lambda: RevBlock(layers.Dense(4, "tanh"), layers.Dense(4, "tanh")), (None, 8)
    )
    x = images(3, 6, 8)

    def gradients(layer):
        with tf.GradientTape() as tape:
            y = tf.vectorized_map(lambda h: layer(h, training=True), x)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, [v.value for v in layer.trainable_variables])

    layer(x[0], training=True)
    if mode == "graph":
        gradients = tf.function(gradients, autograph=False)
    assert_close(gradients(layer), gradients(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16"])
def test_inputs_are_cast_to_the_dtype_of_the_streams(dtype):
    block = RevBlock(layers.Dense(4), layers.Dense(4))
    x = np.arange(16).reshape(2, 8).astype(dtype)
    y = block(x)
    assert y.dtype == tf.float32
    np.testing.assert_allclose(y, block(x.astype("float32")), rtol=1e-5)


def test_sums_that_would_be_broadcast_at_run_time_are_refused():
    block = RevBlock(layers.AveragePooling2D(8, 8), layers.Identity())
    model = keras.Model(x := keras.Input((None, None, 8)), block(x))
    refused = (ValueError, tf.errors.InvalidArgumentError)  # traced, or at run time
    with pytest.raises(refused):
        model.predict(np.ones((2, 8, 8, 8), "float32"), verbose=0)
    pair = RevBlock(layers.Dense(4), layers.Dense(4))
    pair((images(6, 4), images(6, 4)))
    for x1 in (images(6, 1), images(1, 4)):
        with pytest.raises(refused):
            pair((x1, images(6, 4)))


@pytest.mark.parametrize("training", [np.True_, True, tf.constant(True)])
def test_training_known_at_trace_time_is_taken(training):
    block = RevBlock(layers.Dropout(0.5, seed=1), layers.Dense(4))
    x = images(3, 8)
    block.build(x.shape)
    y = block(x, training=training)
    assert not np.allclose(y, block(x))


def test_training_unknown_at_trace_time_is_refused():
    block = RevBlock(layers.Dense(4), layers.Dense(4))
    block.build((None, 8))
    function = tf.function(lambda t: block(images(2, 8), training=t), autograph=False)
    with pytest.raises(ValueError, match="Python bool"):
        function(tf.constant(True))


def test_sequence_has_the_dtype_of_its_blocks():
    def block(dtype):
        return RevBlock(*(layers.Dense(4, dtype=dtype) for _ in "fg"), dtype=dtype)

    assert RevSequence([block("float64")]).compute_dtype == "float64"
    with pytest.raises(ValueError, match="differ in compute_dtype"):
        RevSequence([block("float64"), block("float32")])
    with pytest.raises(ValueError, match="dtype=float32"):
        RevSequence([block("float64")], dtype="float32")


def test_activity_regularizer_of_a_block_in_a_sequence_is_refused():
    block = RevBlock(layers.Dense(4), layers.Dense(4), activity_regularizer="l2")
    with pytest.raises(ValueError, match="activity_regularizer"):
        RevSequence([block])


def test_branch_without_default_for_training_and_named_pairs_work():
    class NoDefault(layers.Layer):
        def call(self, x, training):
            return tf.tanh(x) if training else x

    import collections

    Pair = collections.namedtuple("Pair", "left right")
    block = RevBlock(NoDefault(), NoDefault())
    y = block(Pair(images(2, 4), images(2, 4)), training=True)
    assert isinstance(y, Pair)


@pytest.mark.parametrize("inputs", [[], [None, None], "streams"])
def test_inputs_that_are_no_streams_are_refused(inputs):
    block = RevBlock(layers.Dense(4), layers.Dense(4))
    with pytest.raises(ValueError):
        block(inputs)


def conv_sequence(num_blocks, alike=False):
    def branch():
        return keras.Sequential(
            [
                layers.BatchNormalization(),
                layers.ReLU(negative_slope=0.1),
                layers.Conv2D(4, 3, padding="same"),
                layers.Conv2D(4, 1),
                layers.Conv2D(4, 1),
            ]
        )

    blocks = [RevBlock(branch(), branch()) for _ in range(num_blocks)]
    if alike:
        promise_alike(blocks)
    return RevSequence(blocks)


def trace_step(sequence):
    sequence.build((None, 3, 3, 8))
    step = tf.function(loss_and_gradients)
    return step.get_concrete_function(sequence, tf.TensorSpec((2, 3, 3, 8)))


def test_in_a_graph_promised_blocks_are_traced_once(monkeypatch):
    calls = []
    call = layers.ReLU.call

    def counted(self, inputs):
        calls.append(self)
        return call(self, inputs)

    monkeypatch.setattr(layers.ReLU, "call", counted)

    def traced(num_blocks, alike):
        sequence = conv_sequence(num_blocks, alike)
        sequence.build((None, 3, 3, 8))
        calls.clear()
        trace_step(sequence)
        return len(calls)

    # Traces of f and of g: one of the forward pass, and three of the backward pass.
    # These are of the last block, of the blocks between, and of the first block, which
    # reconstructs no input.
    assert traced(3, alike=True) == traced(6, alike=True) == 2 * 4
    # The block without a promise has one trace of each pass.
    assert traced(6, alike=False) == 2 * 2 * 6


def test_blocks_of_the_papers_networks_are_promised_and_survive_a_file(tmp_path):
    model = models.RevNet((3,), (8, 8), input_shape=(8, 8, 3))
    blocks = model.get_layer("stage1").blocks
    assert blocks[0]._promise is None  # without the first BN-ReLU
    assert blocks[1]._promise is blocks[2]._promise is not None
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = images(2, 8, 8, 3)
    np.testing.assert_array_equal(loaded(x), model(x))


def change_a_slope(branch):
    branch.layers[1].negative_slope = 0.7


def change_an_epsilon(branch):
    branch.layers[0].epsilon = 0.5


def change_an_activation(branch):
    branch.layers[2].activation = keras.activations.relu


def change_a_policy(branch):
    branch.layers[2].dtype_policy = keras.DTypePolicy("mixed_bfloat16")


@pytest.mark.parametrize(
    "change",
    [change_a_slope, change_an_epsilon, change_an_activation, change_a_policy],
)
def test_promised_blocks_that_differ_are_refused(change):
    sequence = conv_sequence(3, alike=True)
    change(sequence.blocks[1].f)
    with pytest.raises(ValueError, match="another configuration"):
        trace_step(sequence)


def freeze_the_statistics(blocks):
    blocks[1].f.layers[0].trainable = False


def freeze_a_block(blocks):
    blocks[0].trainable = False


def set_an_anchor(blocks):
    blocks[1].anchor = True


def store_a_block(blocks):
    blocks[1].recompute = False


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change", [freeze_the_statistics, freeze_a_block, set_an_anchor, store_a_block]
)
def test_promised_blocks_may_be_frozen_anchored_or_stored_one_by_one(change):
    results = []
    for layer in twins(lambda: conv_sequence(4, alike=True), (None, 3, 3, 8)):
        change(layer.blocks)
        results.append(tf.function(loss_and_gradients)(layer, images(2, 3, 3, 8)))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_likeness_tells_ties_and_policies_apart():
    def tied(*order):
        convs = [layers.Conv2D(4, 1) for _ in range(2)]
        stack = [keras.Sequential([convs[i]]) for i in order]
        return keras.Sequential([keras.Input((3, 3, 4)), *stack])

    def likeness(layer):
        return _functional.likeness(layer, [layer])

    assert likeness(tied(0, 1, 0)) == likeness(tied(0, 1, 0))
    assert likeness(tied(0, 1, 0)) != likeness(tied(0, 1, 1))
    policies = "float32", "mixed_bfloat16"
    assert len({likeness(layers.ReLU(dtype=policy)) for policy in policies}) == 2


def test_shared_traces_give_the_bits_of_separate_ones():
    results = []
    for alike in (True, False):
        layer, _ = twins(lambda: conv_sequence(4, alike), (None, 3, 3, 8))  # noqa: B023
        results.append(tf.function(loss_and_gradients)(layer, images(2, 3, 3, 8)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"axis": 1}, {"renorm": True}], ids=str)
def test_gradients_through_batch_normalization_are_those_of_autodiff(run, options):
    def branch():
        norm = layers.BatchNormalization(dtype="float64", **options)
        stack = [norm, layers.ReLU(), layers.Conv2D(2, 1)]
        return keras.Sequential(stack)

    keras.config.set_dtype_policy("float64")
    pair = twins(lambda: RevSequence([RevBlock(branch(), branch())]), (None, 5, 5, 4))
    x = tf.cast(1 + images(3, 5, 5, 4), tf.float64)
    before = [(type(v), sorted(vars(v))) for v in pair[0].blocks[0].f.layers]
    results = [run(loss_and_gradients)(layer, x) for layer in pair]
    assert_close(*results, rtol=1e-10, atol=1e-10)
    states = [[v.numpy() for v in layer.non_trainable_variables] for layer in pair]
    assert_close(*states, rtol=1e-10, atol=1e-10)
    # The block does not change the user's layers.
    assert [(type(v), sorted(vars(v))) for v in pair[0].blocks[0].f.layers] == before


def test_trainable_layer_in_a_frozen_branch_gets_its_gradient():
    gradients = []
    for layer in twins(lambda: conv_sequence(2), (None, 3, 3, 8)):
        for block in layer.blocks:
            block.f.trainable = False
            block.f.layers[2].trainable = True
        gradients.append(loss_and_gradients(layer, images(2, 3, 3, 8)))
    assert len(gradients[0]) == len(gradients[1])
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_random_operations_elsewhere_in_the_graph_are_not_refused():
    @tf.function
    def augment(x):
        return x + tf.random.normal(tf.shape(x))

    sequence = conv_sequence(2)
    sequence.build((None, 3, 3, 8))

    @tf.function
    def step(x):
        x = augment(x)
        x = tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: augment(x))
        return loss_and_gradients(sequence, x)

    assert np.isfinite(step(images(2, 3, 3, 8))[0])
