import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from revnet_tf import models
from training import fit
from training.images import ImagesInMemory
from training.recipes import CIFAR_NETWORKS, IMAGENET_NETWORKS, RECIPES, Recipe

TINY = dataclasses.replace(RECIPES["digits_revnet"], num_blocks=(1,), channels=(4, 4))


def test_networks_are_the_rows_of_the_papers_table():
    variants = {name.lower(): row for name, row in models.VARIANTS.items()}
    for network, row in (CIFAR_NETWORKS | IMAGENET_NETWORKS).items():
        variant = variants[network]
        assert row == (
            variant.reversible,
            variant.num_blocks,
            variant.channels,
            variant.bottleneck,
        )


def test_each_network_has_a_recipe_for_each_of_its_data_sets():
    expected = {f"cifar{n}_{network}" for n in (10, 100) for network in CIFAR_NETWORKS}
    expected |= {f"imagenet_{network}" for network in IMAGENET_NETWORKS}
    short = {"cifar10_revnet38_short", "cifar10_resnet32_short"}
    assert set(RECIPES) == expected | short | {"digits_revnet"}


def test_short_recipes_differ_in_the_network_only():
    revnet, resnet = (
        dataclasses.asdict(RECIPES[f"cifar10_{network}_short"])
        for network in ("revnet38", "resnet32")
    )
    different = {field for field in revnet if revnet[field] != resnet[field]}
    assert different == {"reversible", "num_blocks", "channels"}


def test_cifar_schedule_is_the_papers():
    rate = fit.learning_rate(RECIPES["cifar10_revnet38"])
    steps = [0, 39_999, 40_000, 59_999, 60_000, 79_999]
    rates = [float(rate(tf.constant(step, tf.int64))) for step in steps]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_learning_rate_without_decay_steps_is_constant():
    assert fit.learning_rate(dataclasses.replace(TINY, decay_steps=())) == 0.1


def test_cosine_schedule_rises_in_a_line_and_falls_along_half_a_cosine():
    recipe = dataclasses.replace(
        TINY,
        schedule="cosine",
        decay_steps=(),
        learning_rate=0.4,
        warmup_steps=100,
        train_steps=500,
    )
    rate = fit.learning_rate(recipe)
    rates = [float(rate(step)) for step in (0, 50, 100, 200, 300, 500)]
    half_cosines = [0.4, 0.4 * (1 + 2**-0.5) / 2, 0.2, 0]  # at 0, 1/4, 1/2 and 1
    np.testing.assert_allclose(rates, [0, 0.2, *half_cosines], rtol=1e-6, atol=1e-8)
    flat = fit.learning_rate(dataclasses.replace(recipe, warmup_steps=0))
    assert float(flat(0)) == pytest.approx(0.4)


def images_of(classes):
    blank, labels = np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64)
    return ImagesInMemory(
        blank, labels, blank, labels, [str(i) for i in range(classes)]
    )


@pytest.mark.parametrize("reversible", [True, False])
def test_penalty_adds_weight_decay_times_weight_to_the_gradient(reversible):
    recipe = dataclasses.replace(TINY, reversible=reversible, weight_decay=0.5)
    network = fit.build(recipe, images_of(classes=3))
    weights = network.trainable_variables
    with tf.GradientTape() as tape:
        penalty = tf.add_n(network.losses)
    gradients = tape.gradient(penalty, [weight.value for weight in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.path.endswith("kernel"):
            np.testing.assert_allclose(gradient, 0.5 * weight.numpy(), rtol=1e-6)
        else:
            assert gradient is None


def test_network_has_the_fraction_bits_of_the_recipe():
    recipe = dataclasses.replace(TINY, num_blocks=(2,), fraction_bits=12)
    network = fit.build(recipe, images_of(classes=3))
    assert network.get_layer("stage1").fraction_bits == 12


def test_network_gives_logits_for_each_class():
    network = fit.build(TINY, images_of(classes=3))
    assert network.output_shape == (None, 3)
    assert network.layers[-1].activation is keras.activations.linear


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "mnist"},
        {"num_blocks": ()},
        {"channels": (4, 4, 4)},
        {"channels": (4, 0)},
        {"decay_steps": (20, 10)},
        {"schedule": "linear"},
        {"decay_steps": (10,), "schedule": "cosine"},
        {"warmup_steps": 10},
        {"global_batch_size": 0},
        {"learning_rate": float("nan")},
        {"train_steps": -1},
        {"weight_decay": -1.0},
        {"classes": 0},
        {"fraction_bits": 23},
        {"fraction_bits": 14, "reversible": False},
        {"momentum": 1.0},
        {"pad": -1},
        {"seed": -1},
    ],
)
def test_impossible_value_is_refused_by_the_name_of_its_field(change):
    field, *_ = change
    with pytest.raises(ValueError, match=f"^{field}="):
        dataclasses.replace(TINY, **change)


def test_unknown_field_is_refused():
    with pytest.raises(TypeError, match="learning_rat"):
        Recipe(**dataclasses.asdict(TINY), learning_rat=0.1)
