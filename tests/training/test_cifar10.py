"""The paper's network on real CIFAR-10, where TFDS has prepared it."""

import os
from pathlib import Path

import keras
import numpy as np
import pytest

from training import data, fit
from training.recipes import RECIPES

FOLDER = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "cifar10" / "3.0.2").is_dir(),
        reason="needs CIFAR-10 in TFDS_DATA_DIR or in TFDS's default folder",
    ),
]


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")


def losses(recipe, images, steps):
    keras.utils.set_random_seed(recipe.seed)
    network = fit.build(recipe, images)
    fit.compile_network(network, recipe)
    values = []
    for x, y in images.training_batches(recipe).take(steps):
        network.reset_metrics()
        values.append(network.train_on_batch(x, y, return_dict=True)["loss"])
    return np.array(values)


def test_reversible_and_ordinary_revnet38_have_equal_losses_for_20_steps(float64):
    # In float32, rounding separates any two runs of this network by 1e-3 within 5
    # steps, two ordinary runs as well, because it switches a few ReLUs.
    recipe = RECIPES["cifar10_revnet38"]
    images = data.load(recipe, FOLDER)
    recomputed = losses(recipe, images, 20)
    stored = losses(recipe.replace(recompute=False), images, 20)
    np.testing.assert_allclose(recomputed, stored, rtol=1e-9)
    assert len(set(stored)) == 20
