"""`RevBlock` and `RevSequence` as Keras layers: shapes, errors, config, files."""

import inspect
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    assert_close,
    conv_branch,
    conv_sequence,
    images,
    loss_and_gradients,
    twins,
)

import revnet_tf
from revnet_tf import Recompute, RevBlock, RevSequence
from revnet_tf.layers import (
    ChannelPadding,
    DownsamplingBlock,
    PoolingShortcut,
    SpaceToDepth,
)

layers = keras.layers


def dense_block(units=4, **kwargs):
    return RevBlock(layers.Dense(units, "tanh"), layers.Dense(units, "tanh"), **kwargs)


def test_block_computes_the_coupling_of_the_paper():
    block = dense_block()
    x = images(3, 8)
    y = block(x)
    x1, x2 = x[:, :4], x[:, 4:]
    y1 = x1 + np.tanh(x2 @ block.f.kernel + block.f.bias)
    y2 = x2 + np.tanh(y1 @ block.g.kernel + block.g.bias)
    np.testing.assert_allclose(y, np.concatenate([y1, y2], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((4, 6), 1),
        ((4, 6), -1),
        ((2, 6, 5), 1),
        ((2, 4, 6, 3), 2),
        ((2, 3, 3, 3, 6), 4),
    ],
)
def test_any_rank_and_axis_splits_and_joins_to_the_same_order(shape, axis):
    block = RevBlock(layers.Activation("tanh"), layers.Activation("tanh"), axis=axis)
    x = images(*shape)
    y = block(x, training=True)
    half = shape[axis] // 2
    x1, x2 = np.split(x, [half], axis)
    y1 = x1 + np.tanh(x2)
    expected = np.concatenate([y1, x2 + np.tanh(y1)], axis)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(block.inverse(y), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [tuple, list])
def test_pair_of_different_widths_comes_back_as_it_was_given(run, kind):
    def make():
        return RevBlock(layers.Dense(3, "tanh"), layers.Dense(5, "tanh"))

    layer, twin = twins(make, ((None, 3), (None, 5)))
    x = kind([images(4, 3), images(4, 5)])
    y = layer(x)
    assert type(y) is kind
    assert [part.shape for part in y] == [(4, 3), (4, 5)]
    assert_close(layer.inverse(y), x, rtol=1e-5, atol=1e-6)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [("float64", 1e-12), ("float32", 1e-4)])
def test_inverse_undoes_a_sequence_and_updates_no_state(dtype, atol):
    sequence = conv_sequence(num_blocks=10, dtype=dtype)
    x = images(2, 6, 6, 8, dtype=dtype)
    y = sequence(x, training=False)
    before = [v.numpy() for v in sequence.variables]
    np.testing.assert_allclose(sequence.inverse(y), x, rtol=0, atol=atol)
    sequence.inverse(y, training=True)
    for v, old in zip(sequence.variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), old)


def test_inverse_in_training_mode_uses_batch_statistics():
    sequence = conv_sequence(dropout=0.0)
    x = images(4, 6, 6, 8)
    y = sequence(x, training=True)
    np.testing.assert_allclose(sequence.inverse(y, training=True), x, atol=1e-4)
    assert np.max(np.abs(sequence.inverse(y) - x)) > 0.1


def test_inverse_before_build_says_what_to_do():
    with pytest.raises(ValueError, match="Call or build it first"):
        dense_block().inverse(images(2, 8))


@pytest.mark.parametrize("channels", [0, 1, 3, 7])
def test_odd_width_is_refused_with_axis_and_count(channels):
    with pytest.raises(ValueError, match=f"{channels} entries on axis=-1"):
        dense_block().build((None, channels))


@pytest.mark.parametrize("axis", [0, 2, 5, -2, -3])
def test_wrong_axis_is_refused(axis):
    with pytest.raises(ValueError, match=f"axis={axis}"):
        dense_block(axis=axis).build((None, 8))


@pytest.mark.parametrize("axis", ["channels", 1.0, None, True])
def test_axis_that_is_no_integer_is_refused(axis):
    with pytest.raises(ValueError, match="axis="):
        dense_block(axis=axis)


@pytest.mark.parametrize("name", ["f", "g"])
@pytest.mark.parametrize(
    "branch",
    [
        lambda: layers.Conv2D(8, 3, padding="same"),
        lambda: layers.Conv2D(4, 3, strides=2, padding="same"),
        lambda: layers.Conv2D(4, 3),
        lambda: layers.Conv2D(1, 3, padding="same"),  # The sum would broadcast it.
        lambda: layers.Flatten(),
    ],
    ids=["wider", "strided", "valid", "one_channel", "flattened"],
)
def test_branch_that_changes_the_shape_is_refused(branch, name):
    pair = {"f": layers.Conv2D(4, 1), "g": layers.Conv2D(4, 1), name: branch()}
    with pytest.raises(ValueError, match=f"Change {name} so that"):
        RevBlock(**pair).build((None, 8, 8, 8))


def test_broadcasting_of_an_unknown_dimension_is_refused():
    pool = layers.GlobalAveragePooling2D(keepdims=True)
    with pytest.raises(ValueError, match="Change f"):
        RevBlock(pool, layers.Conv2D(4, 1)).build((None, None, None, 8))


def test_branch_must_be_a_layer():
    with pytest.raises(ValueError, match="g must be a Keras layer"):
        RevBlock(layers.Dense(2), tf.tanh)


def test_sequence_refuses_blocks_that_it_cannot_apply():
    with pytest.raises(ValueError, match="empty"):
        RevSequence([])
    with pytest.raises(ValueError, match="differ in axis"):
        RevSequence([dense_block(axis=1), dense_block(axis=2)])
    with pytest.raises(ValueError, match="must be a RevBlock"):
        RevSequence([layers.Dense(3)])


def test_three_streams_are_refused():
    with pytest.raises(ValueError, match="pair"):
        dense_block()([images(2, 4)] * 3)


def test_nested_sequences_are_one_run_and_stay_as_they_were(run):
    def make():
        blocks = [dense_block() for _ in range(5)]
        stored = RevSequence(blocks[3:], recompute=False)
        return RevSequence([blocks[0], RevSequence(blocks[1:3]), stored])

    layer, twin = twins(make, (None, 8))
    order = [recompute for _, recompute in layer.blocks_in_order()]
    assert order == [True, True, True, False, False]
    assert [block.recompute for block in layer.blocks] == [True, True, False]
    assert all(inner.recompute for block in layer.blocks[1:] for inner in block.blocks)
    x = images(5, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_sequence_in_a_sequence_stays_frozen():
    frozen = RevSequence([dense_block()])
    frozen.trainable = False
    sequence = RevSequence([dense_block(), frozen])
    sequence.build((None, 8))
    assert len(sequence.trainable_variables) == 4
    assert len(loss_and_gradients(sequence, images(5, 8))) == 2 + 4


def test_constructor_leaves_its_blocks_as_they_were():
    blocks = [dense_block() for _ in range(2)]
    inner = RevSequence(blocks[1:])
    sequence = RevSequence([blocks[0], inner], fraction_bits=10)
    assert sequence.fraction_bits == 10
    assert inner.fraction_bits is None
    assert all(block.fraction_bits is None for block in blocks)
    x = images(4, 8)
    sequence(x)
    y = sequence(x)
    np.testing.assert_array_equal(y * 2**10, np.round(y * 2**10))
    alone = blocks[0](x)
    assert np.any(alone * 2**10 != np.round(alone * 2**10))


def test_a_block_that_does_not_recompute_splits_the_run(run):
    def make():
        sequence = RevSequence([dense_block() for _ in range(5)])
        sequence.blocks[2].recompute = False
        return sequence

    layer, twin = twins(make, (None, 8))
    order = [recompute for _, recompute in layer.blocks_in_order()]
    assert order == [True, True, False, True, True]
    x = images(5, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_symbolic_call_keeps_static_channels_and_unknown_sizes():
    x = keras.Input((None, None, 16))
    y = RevBlock(*(layers.Conv2D(8, 3, padding="same") for _ in "fg"))(x)
    assert y.shape == (None, None, None, 16)
    model = keras.Model(x, layers.Conv2D(2, 1)(y))
    model.compile("sgd", "mse")
    model.fit(images(4, 5, 7, 16), images(4, 5, 7, 2), verbose=0)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = dense_block()
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.block(x))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed"])
def test_fit_equals_ordinary_backpropagation(kind, jit_compile):
    weights = []
    for recompute in (True, False):
        keras.utils.set_random_seed(1)
        blocks = [dense_block(recompute=recompute) for _ in range(3)]
        if kind == "functional":
            x = y = keras.Input((8,))
            for block in blocks:
                y = block(y)
            model = keras.Model(x, layers.Dense(1)(y))
        elif kind == "sequential":
            model = keras.Sequential([keras.Input((8,)), *blocks, layers.Dense(1)])
        else:
            model = Subclassed()
            model.block.recompute = recompute
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        model.fit(images(32, 8), images(32, 1), epochs=2, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    assert_close(*weights, rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Scale(layers.Layer):
    """A registered subclass that builds itself in its first call."""

    def call(self, x):
        return self.w * x

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],))


def functional_branch(units):
    x = keras.Input((units,))
    return keras.Model(x, layers.Dense(units, "tanh")(x))


def every_public_layer():
    shared = layers.Dense(4, "tanh")
    return {
        "stock": dense_block(axis=1, recompute=False, name="other"),
        "sequential": RevBlock(*(keras.Sequential([layers.Dense(4)]) for _ in "fg")),
        "functional": RevBlock(functional_branch(4), functional_branch(4)),
        "registered": RevBlock(Scale(), Scale()),
        "f_is_g": RevBlock(shared, shared),
        "sequence": RevSequence([dense_block(), dense_block(recompute=False)]),
        "shared_in_sequence": RevSequence([RevBlock(shared, shared) for _ in "ab"]),
        "padding": ChannelPadding(12, recompute=False),
        "padded_sequence": RevSequence([ChannelPadding(8), dense_block()]),
        "downsampling": DownsamplingBlock(
            layers.Dense(6), layers.Dense(6), layers.Dense(6), layers.Dense(6)
        ),
        "recompute": Recompute(functional_branch(8), recompute=False),
    }


@pytest.mark.parametrize("name", every_public_layer())
def test_round_trip_through_config_and_files(name, tmp_path):
    layer = every_public_layer()[name]
    model = keras.Sequential([keras.Input((8,)), layer])
    x = images(3, 8)
    expected = model(x)

    clone = type(layer).from_config(layer.get_config())
    assert clone.name == layer.name
    assert getattr(clone, "axis", None) == getattr(layer, "axis", None)
    assert clone.recompute == layer.recompute
    clone.build((None, 8))
    assert len(clone.variables) == len(layer.variables)
    assert not {id(v) for v in clone.variables} & {id(v) for v in layer.variables}
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(x), expected)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), expected)
    assert len(loaded.variables) == len(model.variables)

    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.models.clone_model(model)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(x), expected)
    assert len(other.variables) == len(model.variables)


@pytest.mark.parametrize(
    "cls",
    [
        RevBlock,
        RevSequence,
        SpaceToDepth,
        ChannelPadding,
        DownsamplingBlock,
        Recompute,
    ],
)
def test_constructor_arguments_equal_config_keys(cls):
    known = [*every_public_layer().values(), SpaceToDepth()]
    layer = next(v for v in known if type(v) is cls)
    accepted = set()
    for base in cls.__mro__[: cls.__mro__.index(layers.Layer)]:
        accepted |= set(inspect.signature(base.__init__).parameters)
    accepted -= {"self", "kwargs", "args"}
    if cls in (RevSequence, SpaceToDepth, ChannelPadding):
        accepted -= {"axis"}  # The blocks have it, or it is the last one.
    assert set(layer.get_config()) == accepted | {"name", "trainable", "dtype"}


def test_tensorflow_checkpoint_holds_every_variable(tmp_path):
    models = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        models.append(keras.Sequential([keras.Input((6, 6, 8)), conv_sequence()]))
    models[0](images(4, 6, 6, 8), training=True)  # moves statistics and seeds
    path = tf.train.Checkpoint(model=models[0]).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=models[1]).restore(path).assert_consumed()
    for v, w in zip(models[0].variables, models[1].variables, strict=True):
        if "seed_generator" not in v.path:  # Keras's layers hide it, too.
            np.testing.assert_array_equal(v.numpy(), w.numpy(), err_msg=v.path)


def test_a_branch_shared_by_two_blocks_survives_the_file(tmp_path):
    shared = layers.Dense(4, "tanh")
    model = keras.Sequential(
        [keras.Input((8,)), RevBlock(shared, layers.Dense(4)), RevBlock(shared, shared)]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].f is loaded.layers[1].f is loaded.layers[1].g
    x = images(3, 8)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_files_load_in_a_fresh_process(tmp_path):
    keras.utils.set_random_seed(5)
    blocks = [RevBlock(conv_branch(2), conv_branch(2)) for _ in "ab"]
    model = keras.Sequential([keras.Input((6, 6, 4)), RevSequence(blocks)])
    x = images(2, 6, 6, 4)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", model(x))
    model.save(tmp_path / "model.keras")
    script = (
        "import keras, numpy as np, revnet_tf;"
        "m = keras.models.load_model('model.keras');"
        "np.testing.assert_allclose(m(np.load('x.npy')), np.load('y.npy'), atol=1e-6)"
    )
    checkout = str(pathlib.Path(revnet_tf.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": checkout}
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_streams_of_a_mixed_policy_are_float32_and_survive_the_config():
    keras.config.set_dtype_policy("mixed_bfloat16")
    block = dense_block()
    assert block.compute_dtype == "float32"
    assert block.f.compute_dtype == "bfloat16"
    keras.config.set_dtype_policy("float32")
    clone = RevBlock.from_config(block.get_config())
    assert (clone.compute_dtype, clone.f.compute_dtype) == ("float32", "bfloat16")


def test_anchors_survive_clones_and_files(tmp_path):
    blocks = [dense_block(anchor=i == 1) for i in range(3)]
    model = keras.Sequential([keras.Input((8,)), RevSequence(blocks), dense_block()])
    model.layers[1].anchor = True
    model.save(tmp_path / "model.keras")
    for other in (
        keras.models.clone_model(model),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        sequence, block = other.layers
        assert [b.anchor for b in sequence.blocks] == [False, True, False]
        assert block.anchor


def test_recompute_can_be_set_after_build():
    block = dense_block()
    x = images(2, 8)
    expected = loss_and_gradients(block, x)
    block.recompute = False
    assert_close(loss_and_gradients(block, x), expected, rtol=1e-4, atol=1e-5)


def test_inference_graph_holds_no_custom_gradient():
    sequence = conv_sequence()
    sequence.build((None, 6, 6, 8))
    function = tf.function(lambda x: sequence(x, training=False), autograph=False)
    graph = function.get_concrete_function(tf.TensorSpec((None, 6, 6, 8))).graph
    assert "IdentityN" not in {op.type for op in graph.get_operations()}


def test_weights_are_visible_once_each_before_any_data():
    x = keras.Input((8,))
    model = keras.Model(x, RevSequence([dense_block(), dense_block()])(x))
    assert len(model.trainable_weights) == len({id(v) for v in model.weights}) == 8
    assert model.count_params() == 4 * (4 * 4 + 4)


def test_mirrored_replicas_train_like_one_device(two_replicas):
    # Without batch statistics, two replicas of half the batch equal one device.
    def make():
        x = keras.Input((8,))
        y = RevSequence([dense_block() for _ in range(2)])(x)
        model = keras.Model(x, layers.Dense(1)(y))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    weights = []
    for scope in (two_replicas, tf.distribute.get_strategy()):
        keras.utils.set_random_seed(2)
        with scope.scope():
            model = make()
        data = tf.data.Dataset.from_tensor_slices((images(16, 8), images(16, 1)))
        model.fit(data.batch(8), epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_pooling_shortcut_pools_and_pads_symmetrically():
    x = images(2, 4, 4, 3)
    y = PoolingShortcut(7, 2)(x)
    pooled = np.asarray(x).reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(y[..., 2:5], pooled, rtol=1e-5, atol=1e-6)
    assert not np.any(y[..., :2]) and not np.any(y[..., 5:])


def test_pooling_shortcut_cannot_drop_channels():
    with pytest.raises(ValueError, match="filters=2"):
        PoolingShortcut(2)(images(1, 4, 4, 3))


def test_downsampling_block_equals_autodiff(run):
    def make():
        return DownsamplingBlock(
            keras.Sequential(
                [
                    layers.BatchNormalization(momentum=0.9),
                    layers.Conv2D(6, 3, 2, padding="same"),
                    layers.Dropout(0.3, seed=1),
                ]
            ),
            conv_branch(6, 0.3),
            PoolingShortcut(6, 2),
            layers.Conv2D(6, 1, 2),
        )

    layer, twin = twins(make, (None, 6, 6, 8))
    x = images(3, 6, 6, 8)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for v, w in zip(layer.variables, twin.variables, strict=True):
        np.testing.assert_array_equal(v.numpy(), w.numpy())


def test_downsampling_block_refuses_shapes_that_do_not_agree():
    block = DownsamplingBlock(
        layers.Conv2D(4, 3, 2, padding="same"),
        layers.Conv2D(4, 3, padding="same"),
        PoolingShortcut(4, 3),
        PoolingShortcut(4, 2),
    )
    with pytest.raises(ValueError, match="each pair must agree"):
        block.build((None, 7, 7, 4))


@pytest.mark.parametrize("sizes", [(5,), (4, 5), (2, 3, 5)])
def test_pooling_shortcut_averages_in_one_two_and_three_dimensions(sizes):
    x = tf.random.stateless_normal((2, *sizes, 3), (0, 1))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = PoolingShortcut(6, 2)(x)
    # The weights of each mean add up to 1, and 3 of 6 channels are means.
    d_sum = tf.reduce_sum(tape.gradient(y, x))
    np.testing.assert_allclose(d_sum, np.prod(y.shape) / 2, rtol=1e-5)
    # By hand: the mean of the first window, between channels of zeros.
    first = x[(slice(None), *[slice(2)] * len(sizes))]
    axes = list(range(1, len(sizes) + 1))
    corner = (slice(None), *[0] * len(sizes))
    np.testing.assert_allclose(
        y[corner][:, 1:4], tf.reduce_mean(first, axes), rtol=1e-5, atol=1e-6
    )
    assert y.shape == PoolingShortcut(6, 2).compute_output_shape(x.shape)
    np.testing.assert_array_equal(y[..., :1], 0)
    np.testing.assert_array_equal(y[..., 4:], 0)


def test_pooling_shortcut_refuses_an_input_without_sizes():
    with pytest.raises(ValueError, match="one, two or three sizes"):
        PoolingShortcut(6, 2)(tf.zeros((2, 3)))
