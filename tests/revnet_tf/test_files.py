"""Layers load from every kind of file with their weights, also from old files."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import images

from revnet_tf import DownsamplingBlock, RevBlock, RevSequence, models

layers = keras.layers
DATA = pathlib.Path(__file__).parents[1] / "data"


def dense_block():
    return RevBlock(layers.Dense(4), keras.Sequential([layers.Dense(4, "tanh")]))


def recurrent_block():
    def branch():
        gru = layers.GRU(2, return_sequences=True)
        return keras.Sequential(
            [layers.Bidirectional(gru), layers.LayerNormalization()]
        )

    return RevBlock(branch(), branch())


def nested_sequence():
    inner = RevSequence([dense_block(), dense_block()], recompute=False)
    return RevSequence([dense_block(), inner], fraction_bits=12)


def downsampling_block():
    return DownsamplingBlock(*(layers.Dense(2) for _ in range(4)))


LAYERS = [
    (dense_block, (8,)),
    (lambda: RevSequence([dense_block() for _ in range(2)]), (8,)),
    (nested_sequence, (8,)),
    (lambda: RevSequence([recurrent_block()]), (5, 8)),
    (downsampling_block, (8,)),
]
NAMES = ["block", "sequence", "nested", "recurrent", "downsampling"]


@pytest.mark.parametrize("make, shape", LAYERS, ids=NAMES)
@pytest.mark.filterwarnings("ignore:.*HDF5 file:UserWarning")
def test_layer_comes_back_from_an_hdf5_file(make, shape, tmp_path):
    x = keras.Input(shape)
    model = keras.Model(x, make()(x))
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    batch = images(3, *shape)
    np.testing.assert_array_equal(loaded(batch), model(batch))


@pytest.mark.filterwarnings("ignore:.*HDF5 file:UserWarning")
def test_network_comes_back_from_an_hdf5_file(tmp_path):
    model = models.RevNet((1, 2), (4, 4, 8), input_shape=(8, 8, 3))
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    x = images(2, 8, 8, 3)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_file_of_version_0_1_gives_the_predictions_of_that_version():
    model = keras.models.load_model(DATA / "revnet_0_1.keras")
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype("float32")
    expected = [0.001990010729, 0.055179990828, 0.002178911352, 0.025008074939]
    np.testing.assert_allclose(model(x)[:, 0], expected, rtol=1e-5)


def test_blocks_of_a_sequence_cannot_be_added_or_removed():
    sequence = RevSequence([dense_block() for _ in range(3)])
    with pytest.raises(AttributeError, match="append"):
        sequence.blocks.append(dense_block())
    with pytest.raises(TypeError, match="item"):
        del sequence.blocks[0]


def test_block_that_is_used_several_times_has_its_weights_once():
    sequence = RevSequence([dense_block()] * 3)
    sequence.build((None, 8))
    assert len(sequence.variables) == 4


def test_checkpoint_holds_every_variable_of_a_sequence(tmp_path):
    def values(layer):
        return [v.numpy() for v in layer.variables]

    sequences = nested_sequence(), nested_sequence()
    for sequence in sequences:
        sequence.build((None, 8))
    path = tf.train.Checkpoint(layer=sequences[0]).save(tmp_path / "checkpoint")
    restored = tf.train.Checkpoint(layer=sequences[1]).restore(path)
    restored.assert_existing_objects_matched()
    assert len(sequences[0].variables) == 12
    for got, expected in zip(*map(values, reversed(sequences)), strict=True):
        np.testing.assert_array_equal(got, expected)
