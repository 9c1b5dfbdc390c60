import dataclasses
import json
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf

from revnet_tf import models
from training import fit, train
from training.images import ImagesInMemory
from training.recipe import (
    PARTS,
    Optimizer,
    Recipe,
    ResNet,
    RevNet,
    Schedule,
    flags,
    iRevNet,
)
from training.recipes import (
    CIFAR_NETWORKS,
    IMAGENET_NETWORKS,
    IREVNETS,
    RECIPES,
    SHORT_NETWORKS,
)
from training.settings import COUNT, Settings, setting

TINY = RECIPES["digits_revnet"].replace(num_blocks=(1,), channels=(4, 4))


def test_networks_are_the_rows_of_the_papers_table():
    variants = {name.lower(): row for name, row in models.residual.VARIANTS.items()}
    for name, network in (CIFAR_NETWORKS | IMAGENET_NETWORKS).items():
        row = variants[name]
        cls = RevNet if row.reversible else ResNet
        assert network == cls(row.num_blocks, row.channels, row.bottleneck)


def test_irevnets_are_the_rows_of_the_table():
    variants = {name.lower(): row for name, row in models.irevnet.VARIANTS.items()}
    assert variants.keys() == IREVNETS.keys()
    for name, network in IREVNETS.items():
        row = variants[name]
        assert network == iRevNet(
            row.num_blocks,
            row.channels,
            row.strides,
            row.first_block_size,
            row.dropout,
        )


def test_each_network_has_a_recipe_for_each_of_its_data_sets():
    expected = {f"cifar{n}_{network}" for n in (10, 100) for network in CIFAR_NETWORKS}
    expected |= {f"imagenet_{network}" for network in IMAGENET_NETWORKS}
    expected |= {"cifar10_irevnet163", "cifar100_irevnet163", "imagenet_irevnet301"}
    expected |= {f"cifar10_{network}_short" for network in SHORT_NETWORKS}
    others = {"digits_revnet", "pictures_revnet", "brain_revunet", "decathlon_revunet"}
    assert set(RECIPES) == expected | others


def test_short_recipes_differ_in_the_network_only():
    first, *others = (RECIPES[f"cifar10_{network}_short"] for network in SHORT_NETWORKS)
    for other in others:
        assert dataclasses.replace(first, network=other.network) == other


def test_cifar_schedule_is_the_papers():
    rate = fit.learning_rate(RECIPES["cifar10_revnet38"])
    steps = [0, 39_999, 40_000, 59_999, 60_000, 79_999]
    rates = [float(rate(tf.constant(step, tf.int64))) for step in steps]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_irevnet_schedule_is_the_published():
    rate = fit.learning_rate(RECIPES["cifar10_irevnet163"])
    ends = [epoch * 390 for epoch in (60, 120, 160, 200)]  # whole batches of 128
    rates = [float(rate(tf.constant(end - 1, tf.int64))) for end in ends]
    np.testing.assert_allclose(rates, [0.1, 0.02, 0.004, 0.0008], rtol=1e-6)
    assert RECIPES["cifar10_irevnet163"].train_steps == ends[-1]


def test_learning_rate_without_decay_steps_is_constant():
    assert fit.learning_rate(TINY.replace(decay_steps=())) == 0.1


def test_cosine_schedule_rises_in_a_line_and_falls_along_half_a_cosine():
    recipe = TINY.replace(
        schedule="cosine",
        learning_rate=0.4,
        warmup_steps=100,
        train_steps=500,
    )
    rate = fit.learning_rate(recipe)
    rates = [float(rate(step)) for step in (0, 50, 100, 200, 300, 500)]
    half_cosines = [0.4, 0.4 * (1 + 2**-0.5) / 2, 0.2, 0]  # at 0, 1/4, 1/2 and 1
    np.testing.assert_allclose(rates, [0, 0.2, *half_cosines], rtol=1e-6, atol=1e-8)
    flat = fit.learning_rate(recipe.replace(warmup_steps=0))
    assert float(flat(0)) == pytest.approx(0.4)


def images_of(classes):
    blank, labels = np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64)
    return ImagesInMemory(
        blank, labels, blank, labels, [str(i) for i in range(classes)]
    )


@pytest.mark.parametrize("reversible", [True, False])
def test_penalty_adds_weight_decay_times_weight_to_the_gradient(reversible):
    recipe = TINY.replace(reversible=reversible, weight_decay=0.5)
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


def test_irevnet_decays_all_weights():
    tiny = dict(num_blocks=(2,), stream_channels=(4,), strides=(2,))
    recipe = RECIPES["cifar10_irevnet_short"].replace(**tiny, weight_decay=0.5)
    network = fit.build(recipe, images_of(classes=3))
    weights = network.trainable_variables
    with tf.GradientTape() as tape:
        penalty = tf.add_n(network.losses)
    gradients = tape.gradient(penalty, [weight.value for weight in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        np.testing.assert_allclose(gradient, 0.5 * weight.numpy(), rtol=1e-6)


def test_network_has_the_fraction_bits_of_the_recipe():
    recipe = TINY.replace(num_blocks=(2,), fraction_bits=12)
    network = fit.build(recipe, images_of(classes=3))
    assert network.get_layer("stage1").fraction_bits == 12


def test_network_gives_logits_for_each_class():
    network = fit.build(TINY, images_of(classes=3))
    assert network.output_shape == (None, 3)
    assert network.layers[-1].activation is keras.activations.linear


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": ""},
        {"image_size": 0},
        {"num_blocks": ()},
        {"channels": (4, 4, 4)},
        {"channels": (4, 0)},
        {"decay_steps": (20, 10)},
        {"schedule": "linear"},
        {"warmup_steps": 896, "schedule": "cosine"},
        {"global_batch_size": 0},
        {"learning_rate": float("nan")},
        {"train_steps": -1},
        {"weight_decay": -1.0},
        {"classes": 0},
        {"fraction_bits": 23},
        {"momentum": 1.0},
        {"pad": -1},
        {"seed": -1},
    ],
)
def test_impossible_value_is_refused_by_the_name_of_its_field(change):
    field, *_ = change
    with pytest.raises(ValueError, match=f"^{field}="):
        TINY.replace(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": (2, 3, 2)},
        {"num_blocks": ()},
        {"stream_channels": (16, 64)},
        {"stream_channels": (16, 64, 3)},
        {"strides": (1, 2)},
        {"strides": (0, 2, 2)},
        {"first_block_size": 0},
        {"dropout": 1.0},
    ],
)
def test_impossible_value_of_an_irevnet_is_refused_by_the_name_of_its_field(change):
    field, *_ = change
    with pytest.raises(ValueError, match=f"^{field}="):
        RECIPES["cifar10_irevnet_short"].replace(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rat": 0.1},
        {"warmup_steps": 10},
        {"decay_steps": (10,), "schedule": "cosine"},
        {"fraction_bits": 14, "reversible": False},
        {"pad": 1, "dataset": "imagenet2012"},
        {"strides": (1,)},
    ],
)
def test_field_that_no_part_of_the_recipe_has_is_refused(change):
    field, *_ = change
    with pytest.raises(TypeError, match=field):
        TINY.replace(**change)


@pytest.mark.parametrize("value", [True, 1.5, "1", None, (1,), float("nan"), 2**31])
def test_value_of_another_type_is_refused(value):
    for field in ("global_batch_size", "train_steps"):
        with pytest.raises(ValueError, match=f"^{field}="):
            TINY.replace(**{field: value})


@pytest.mark.parametrize(
    "change, dropped, shared",
    [
        ({"reversible": False}, {"recompute", "fraction_bits"}, "num_blocks"),
        ({"schedule": "cosine"}, {"decay_steps", "decay_factor"}, "learning_rate"),
        (
            {"dataset": "imagenet2012"},
            {"image_size", "pad", "flip", "test_in_mean", "standardize"},
            "classes",
        ),
    ],
)
def test_choice_of_another_class_copies_the_shared_fields(change, dropped, shared):
    before, after = TINY.values(), TINY.replace(**change).values()
    assert before.keys() - after.keys() == dropped
    assert after[shared] == before[shared]
    (flag,) = change
    back = TINY.replace(**change).replace(**{flag: before[flag]}).values()
    assert back.keys() == before.keys()


def test_recipe_that_was_written_and_read_is_the_same():
    for recipe in RECIPES.values():
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_every_flag_has_one_type_and_one_help_text():
    for classes in PARTS.values():
        for cls in classes:
            kinds = typing.get_type_hints(cls)
            for field in cls.settings():
                kind, help, _ = flags()[field.name]
                assert kind == kinds[field.name]
                if field.name != "dataset":  # which chooses a class, too
                    assert help == field.metadata["help"]


@dataclasses.dataclass(frozen=True)
class UNet(Settings):
    width: int = setting("channels of the first level.", COUNT, default=4)

    def build(self, task, images, optimizer):
        assert optimizer.kernel_regularizer() is None
        inputs = keras.Input(images.image_shape)
        x = keras.layers.Conv2D(self.width, 3, padding="same")(inputs)
        outputs = keras.layers.Conv2D(task.classes, 1, activation="softmax")(x)
        return keras.Model(inputs, outputs)


@dataclasses.dataclass(frozen=True)
class Segmentation(Settings):
    classes: int = setting("number of classes of the data set.", COUNT)

    def loss(self):
        return keras.losses.Dice()

    def metrics(self, classes):
        return [keras.metrics.OneHotMeanIoU(classes)]


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    decoupled_decay: float = setting("decoupled weight decay.", default=0.01)

    def build(self, learning_rate):
        return keras.optimizers.AdamW(learning_rate, self.decoupled_decay)


@dataclasses.dataclass(frozen=True)
class Steps(Schedule):
    factor: float = setting("factor of the learning rate at a step.", default=0.2)

    def build(self, train_steps):
        rates = [self.learning_rate, self.factor * self.learning_rate]
        return keras.optimizers.schedules.PiecewiseConstantDecay([1], rates)


def test_other_network_task_optimizer_and_schedule_fit_as_dataclasses(
    monkeypatch, capsys
):
    new = {"network": UNet, "task": Segmentation, "optimizer": AdamW, "schedule": Steps}
    for part, cls in new.items():
        monkeypatch.setitem(PARTS, part, (*PARTS[part], cls))
    recipe = Recipe(UNet(), Segmentation(3), AdamW(), Steps(0.1), 2, 10)
    recipe = recipe.replace(width=6, decoupled_decay=0.1, factor=0.5)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert {"width", "decoupled_decay", "factor"} < flags().keys()
    assert (
        not {"num_blocks", "momentum", "dataset", "reversible"} & recipe.values().keys()
    )

    monkeypatch.setitem(RECIPES, "volumes", recipe)
    _, _, changed, _ = train.parse(["--recipe", "volumes", "--width", "8"])
    assert changed == recipe.replace(width=8)
    for flag, argv in {
        "--reversible": ["--recipe", "volumes", "--reversible"],
        "--schedule": ["--recipe", "volumes", "--schedule", "cosine"],
        "--num-blocks": ["--recipe", "volumes", "--num-blocks", "1"],
        "--width": ["--width", "8"],
    }.items():
        with pytest.raises(SystemExit):
            train.parse(argv)
        assert f"unexpected {flag}: " in capsys.readouterr().err

    network = fit.build(recipe, images_of(classes=3))
    fit.compile_network(network, recipe)
    assert isinstance(network.optimizer, keras.optimizers.AdamW)
    assert network.optimizer.weight_decay == 0.1
    y = tf.one_hot(np.zeros((2, 8, 8), int), 3)
    network.fit(np.ones((2, 8, 8, 1)), y, epochs=3, verbose=0)
    assert float(network.optimizer.learning_rate) == pytest.approx(0.05)
