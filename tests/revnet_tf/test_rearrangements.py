"""`SpaceToDepth` and `ChannelPadding`: values, inverses, gradients, memory, errors."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    assert_close,
    assert_same_state,
    conv_branch,
    images,
    loss_and_gradients,
    twins,
)

from revnet_tf import ChannelPadding, RevBlock, RevSequence, SpaceToDepth, memory
from revnet_tf.numerics import reconstruction_error

layers = keras.layers


def stated(x, block_size):
    """Returns space to depth of an array, stated position by position."""
    steps = [slice(i, None, block_size) for i in range(block_size)]
    positions = itertools.product(steps, repeat=x.ndim - 2)
    return np.concatenate([x[(slice(None), *p)] for p in positions], -1)


def halves(x):
    return np.split(np.asarray(x), 2, -1)


def block(width, dropout=0.3, **kwargs):
    # ReLU has another gradient at a tiny value than at the zeros of a padding.
    first = [
        layers.BatchNormalization(momentum=0.9, **kwargs),
        layers.ReLU(**kwargs),
        layers.Conv2D(width, 3, padding="same", **kwargs),
    ]
    second = conv_branch(width, dropout, **kwargs)
    return RevBlock(keras.Sequential(first), second, **kwargs)


def every_kind(**kwargs):
    """A sequence with layers before, between and after its blocks, some nested.

    It maps images with 3 channels, or a pair with 1 and 2 channels.
    """
    return RevSequence(
        [
            RevSequence([ChannelPadding(4, **kwargs), SpaceToDepth(2, **kwargs)]),
            ChannelPadding(20, **kwargs),
            block(10, **kwargs),
            ChannelPadding(24, **kwargs),
            RevSequence([SpaceToDepth(2, **kwargs), block(48, **kwargs)]),
            ChannelPadding(100, **kwargs),
        ]
    )


@pytest.mark.parametrize("block_size, sizes", [(2, (6,)), (3, (6, 9)), (2, (2, 4, 6))])
def test_space_to_depth_moves_positions_to_channels_of_each_stream(block_size, sizes):
    for channels in (3, 4):
        layer, x = SpaceToDepth(block_size), images(2, *sizes, channels)
        y = layer(x)
        assert y.shape == layer.compute_output_shape(x.shape)
        streams = halves(x) if channels == 4 else [x.numpy()]
        expected = np.concatenate([stated(s, block_size) for s in streams], -1)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(layer.inverse(y), x)
    layer, pair = SpaceToDepth(block_size), (x, images(2, *sizes, 1))
    for got, part in zip(layer(pair), pair, strict=True):
        np.testing.assert_array_equal(got, stated(part.numpy(), block_size))
    assert_close(layer.inverse(layer(pair)), pair, rtol=0, atol=0)
    if len(sizes) == 2:
        expected = tf.nn.space_to_depth(x, block_size)
        np.testing.assert_array_equal(SpaceToDepth(block_size)((x, x))[0], expected)


def test_channel_padding_adds_zeros_to_the_joined_tensor():
    for channels, padded in ((3, 5), (3, 8), (4, 5), (4, 6), (4, 4)):
        layer, x = ChannelPadding(padded), images(2, 5, channels)
        y = layer(x)
        assert y.shape == layer.compute_output_shape(x.shape)
        np.testing.assert_array_equal(
            y, np.pad(x, [(0, 0), (0, 0), (0, padded - channels)])
        )
        np.testing.assert_array_equal(layer.inverse(y), x)
    layer, pair = ChannelPadding(8), (images(2, 5, 1), images(2, 5, 2, seed=1))
    joined = np.concatenate([*pair, np.zeros((2, 5, 5))], -1)
    assert_close(layer(pair), halves(joined), rtol=0, atol=0)
    assert_close(layer.inverse(layer(pair)), pair, rtol=0, atol=0)


def test_sequence_acts_on_the_whole_tensor_before_its_first_block_only():
    zeros = [layers.Dense(n, kernel_initializer="zeros") for n in (8, 8)]
    sequence = RevSequence(
        [RevSequence([SpaceToDepth()]), RevBlock(*zeros), SpaceToDepth()]
    )
    x = images(2, 8, 8, 4)
    whole = tf.nn.space_to_depth(x, 2)
    expected = tf.concat([tf.nn.space_to_depth(h, 2) for h in halves(whole)], -1)
    for training in (False, True):
        np.testing.assert_array_equal(sequence(x, training=training), expected)
    np.testing.assert_array_equal(sequence.inverse(expected), x)
    # Without a block nothing is split.
    only = RevSequence([SpaceToDepth(), ChannelPadding(17)])
    np.testing.assert_array_equal(only(x), tf.pad(whole, [[0, 0]] * 3 + [[0, 1]]))
    np.testing.assert_array_equal(only.inverse(only(x)), x)


TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


@pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.thorough)]
)
def test_gradients_of_every_kind_equal_ordinary_backpropagation(run, dtype):
    layer, twin = twins(lambda: every_kind(dtype=dtype), (None, 8, 8, 3))
    x = images(3, 8, 8, 3, dtype=dtype)
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_same_state(layer, twin)
    y = layer(x, training=False)
    assert y.shape == layer.compute_output_shape(x.shape) == (3, 2, 2, 100)
    np.testing.assert_allclose(layer.inverse(y), x, atol=TOLERANCE[dtype])


@pytest.mark.thorough
def test_gradients_of_a_pair_equal_ordinary_backpropagation(run):
    layer, twin = twins(
        lambda: every_kind(dtype="float64"), ((None, 8, 8, 1), (None, 8, 8, 2))
    )
    x = (images(3, 8, 8, 1, dtype="float64"), images(3, 8, 8, 2, dtype="float64"))
    got, expected = run(loss_and_gradients)(layer, x), run(loss_and_gradients)(twin, x)
    assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-9)


def test_layers_one_by_one_equal_a_sequence_and_store_as_little():
    blocks = [block(3, 0), SpaceToDepth(), ChannelPadding(32), block(16, 0)]
    blocks.append(SpaceToDepth())
    x = y = keras.Input((8, 8, 6))
    for layer in blocks:
        y = layer(y)
    stacked, sequence = keras.Model(x, y), RevSequence(blocks)
    batch = images(3, 8, 8, 6)

    @tf.function(autograph=False)
    def both(x):
        return loss_and_gradients(stacked, x), loss_and_gradients(sequence, x)

    assert_close(*both(batch), rtol=1e-4, atol=1e-5)
    kept = [stage.kept_bytes for stage in memory.estimate(stacked, 64).stages]
    assert kept[:-2] == [0] * 4
    # The streams and their join. The loss stores the last output, too.
    assert kept[-2] <= 2 * 64 * 2 * 2 * 128 * 4


def test_observers_see_the_blocks_and_fixed_point_values_pass_unchanged():
    layer = every_kind()
    exact = RevSequence(layer.blocks, fraction_bits=12)
    exact.build((None, 8, 8, 3))
    x = tf.round(images(3, 8, 8, 3) * 2**12) / 2**12
    np.testing.assert_array_equal(exact.inverse(exact(x, training=False)), x)
    errors = reconstruction_error(exact, x)
    assert [error.absolute for error in errors.values()] == [0, 0]


@pytest.mark.thorough
def test_observers_see_the_rounding_of_each_block():
    layer = every_kind()
    layer.build((None, 8, 8, 3))
    errors = reconstruction_error(layer, images(3, 8, 8, 3))
    first, second = (error.relative for error in errors.values())
    # The first block uses its true inputs, because a padding is before it.
    assert first == 0 < second < 1e-5


def test_fixed_point_streams_out_of_range_are_refused():
    layer = SpaceToDepth(fraction_bits=20)
    with pytest.raises(tf.errors.InvalidArgumentError, match="fewer fraction bits"):
        layer(100 * tf.ones((1, 2, 2, 1)))


@pytest.mark.parametrize("block_size", [1, 0, -2, 2.0, True, None])
def test_block_size_below_two_is_refused(block_size):
    with pytest.raises(ValueError, match="block_size must be an integer of at least 2"):
        SpaceToDepth(block_size)


@pytest.mark.parametrize("channels", [0, -4, 2.0, None])
def test_channels_that_are_no_number_are_refused(channels):
    with pytest.raises(ValueError, match="channels must be an integer above 0"):
        ChannelPadding(channels)


def test_sizes_that_the_block_does_not_divide_are_refused():
    for make in (
        SpaceToDepth,
        lambda: RevSequence([ChannelPadding(4), SpaceToDepth()]),
    ):
        with pytest.raises(ValueError, match="block_size=2 divides.*Resize, crop"):
            make().build((None, 8, 5, 3))
        layer = make()
        layer.build((None, None, None, 3))
        assert layer.compute_output_shape((None, None, 6, 3))[1:3] == (None, 3)
        with pytest.raises(ValueError, match="block_size=2 divides.*Resize, crop"):
            layer(images(1, 8, 5, 3))
        call = tf.function(
            layer, input_signature=[tf.TensorSpec((None, None, None, 3))]
        )
        assert call(images(1, 8, 6, 3)).shape[:3] == (1, 4, 3)
        with pytest.raises(tf.errors.InvalidArgumentError, match="Resize, crop"):
            call(images(1, 8, 5, 3))


@pytest.mark.parametrize("shape", [(None, 4), (None, 2, 2, 2, 2, 4)])
def test_inputs_without_one_to_three_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="one, two or three sizes"):
        SpaceToDepth().build(shape)


@pytest.mark.parametrize("layer", [SpaceToDepth(), ChannelPadding(8)])
def test_open_number_of_channels_is_refused(layer):
    with pytest.raises(ValueError, match="known number of channels"):
        layer.build((None, 4, 4, None))


def test_padding_that_would_lose_channels_is_refused():
    with pytest.raises(ValueError, match="Use channels=6 or more"):
        ChannelPadding(5).build((None, 6))
    with pytest.raises(ValueError, match="Use channels=6 or more"):
        ChannelPadding(4).build(((None, 3), (None, 3)))


def test_odd_padding_of_a_pair_is_refused():
    with pytest.raises(ValueError, match="even number of channels.*Use 8"):
        ChannelPadding(7).build(((None, 3), (None, 3)))


def test_odd_width_at_the_first_block_is_refused():
    with pytest.raises(ValueError, match="5 entries on axis=-1"):
        RevSequence([ChannelPadding(5), block(2)]).build((None, 4, 4, 3))


def test_inverse_of_another_width_is_refused():
    padding, space, sequence = ChannelPadding(8), SpaceToDepth(), every_kind()
    for layer, expected in ((padding, 8), (space, 12), (sequence, 50)):
        layer.build((None, 8, 8, 3))
        with pytest.raises(ValueError, match=rf"Expected the output of .*{expected}\)"):
            layer.inverse(images(1, 2, 2, 64))


def test_layer_of_another_width_is_refused():
    layer = SpaceToDepth()
    layer.build((None, 4, 4, 3))
    with pytest.raises(ValueError, match="Expected 3 channels.*Make a new layer"):
        layer(images(1, 4, 4, 5))


def test_masks_pass_a_padding_and_are_refused_by_space_to_depth():
    x = keras.Input((4, 3))
    masked = layers.Masking()(x)
    assert ChannelPadding(6)(masked)._keras_mask is not None
    for layer in (SpaceToDepth(), RevSequence([ChannelPadding(4), SpaceToDepth()])):
        with pytest.raises(ValueError, match="Expected an input without a mask"):
            layer(masked)


@pytest.mark.parametrize("entry", [layers.Dense(3), None])
def test_sequence_names_the_layers_that_it_takes(entry):
    with pytest.raises(ValueError, match="a SpaceToDepth or a ChannelPadding"):
        RevSequence([SpaceToDepth(), entry])
