import dataclasses
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from training import data
from training.images import ImagesInMemory
from training.recipes import RECIPES

RECIPE = RECIPES["digits_revnet"].replace(global_batch_size=4, pad=0, flip=False)
CIFAR10 = RECIPES["cifar10_revnet38"]
# Real CIFAR-10, where TFDS has prepared it.
CIFAR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def numbered_images(size, shape=(8, 8, 1)):
    """Images whose label is their number, so that a label tells which it is."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    return ImagesInMemory(images, np.arange(size), images[:7], np.arange(7), ["a", "b"])


def training_arrays(images, recipe, steps, first_step=0):
    batches = images.training_batches(recipe, first_step).take(steps)
    x, y = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(x), np.concatenate(y)


def test_training_images_are_centred_on_the_mean_image_and_divided_by_255():
    images = numbered_images(10)
    x, y = training_arrays(images, RECIPE, steps=2)
    mean = images.train_images.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(x, (images.train_images[y] - mean) / 255, atol=1e-6)


def test_mean_can_include_the_test_images_as_the_authors_have_it():
    images = dataclasses.replace(numbered_images(10), test_in_mean=True)
    # The seven test images are the first seven training images.
    everything = np.concatenate([images.train_images, images.train_images[:7]])
    np.testing.assert_allclose(images.mean, everything.mean(axis=0), rtol=1e-6)


def test_standardized_images_have_mean_0_and_deviation_1_in_each_channel():
    images = dataclasses.replace(numbered_images(10), standardize=True)
    x = images.normalize(images.train_images).numpy()
    values = images.train_images.astype(np.float64)
    mean, deviation = (f(values, axis=(0, 1, 2)) for f in (np.mean, np.std))
    np.testing.assert_allclose(x, (values - mean) / deviation, atol=1e-5)
    blank = dataclasses.replace(images, train_images=np.zeros_like(images.train_images))
    assert not blank.normalize(blank.train_images).numpy().any()
    both = dataclasses.replace(images, test_in_mean=True)
    everything = np.concatenate([values, values[:7]])
    np.testing.assert_allclose(both.mean[0, 0], everything.mean(axis=(0, 1, 2)))


def test_mean_image_is_exact_where_a_float32_sum_is_not():
    bright = np.full((300_000, 1, 1, 1), 255, np.uint8)
    images = ImagesInMemory(bright, np.zeros(len(bright)), bright, bright, ["a"])
    assert images.mean == 255
    assert np.add.accumulate(bright.ravel(), dtype=np.float32)[-1] != bright.sum()


def test_epoch_holds_no_image_twice_and_leaves_out_other_images_each_time():
    images = numbered_images(10)
    _, y = training_arrays(images, RECIPE, steps=40)
    epochs = y.reshape(20, 8)
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set(y) == set(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 20


@pytest.mark.parametrize("first_step", [3, 5])
def test_resumed_run_sees_the_images_of_an_uninterrupted_run(first_step):
    images = numbered_images(13)
    recipe = RECIPE.replace(pad=2, flip=True)
    x, y = training_arrays(images, recipe, steps=9)
    tf.random.set_seed(99)  # neither global seed nor earlier draws matter
    x_on, y_on = training_arrays(images, recipe, 9 - first_step, first_step)
    np.testing.assert_array_equal(y_on, y[first_step * 4 :])
    np.testing.assert_array_equal(x_on, x[first_step * 4 :])


def test_seeds_give_other_orders():
    images = numbered_images(100)
    orders = [
        training_arrays(images, RECIPE.replace(seed=seed), 25)[1]
        for seed in (0, 1, 2**32 - 1)
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_crops_are_windows_of_the_zero_padded_normalized_image():
    images = numbered_images(10)
    recipe = RECIPE.replace(pad=1)
    x, y = training_arrays(images, recipe, steps=50)
    offsets = []
    for crop, i in zip(x, y, strict=True):
        padded = np.pad(
            images.normalize(images.train_images[i]), [(1, 1), (1, 1), (0, 0)]
        )
        offsets += [
            (top, left)
            for top in range(3)
            for left in range(3)
            if np.allclose(crop, padded[top : top + 8, left : left + 8], atol=1e-6)
        ]
    assert len(offsets) == len(x)
    assert len(set(offsets)) == 9  # every one of the windows occurs


def test_about_half_of_the_images_are_flipped():
    images = numbered_images(10)
    x, y = training_arrays(images, RECIPE.replace(flip=True), steps=50)
    straight = images.normalize(images.train_images[y]).numpy()
    flipped = np.isclose(x, straight[:, :, ::-1]).all(axis=(1, 2, 3))
    unflipped = np.isclose(x, straight).all(axis=(1, 2, 3))
    assert np.all(flipped != unflipped)
    assert 0.35 < flipped.mean() < 0.65  # 200 draws: 4 standard deviations


def test_test_images_come_in_order_and_blanks_of_no_weight_fill_the_last_batch():
    images = numbered_images(10)
    batches = images.test_batches(4, normalize=False).as_numpy_iterator()
    x, y, weights = zip(*batches, strict=True)
    assert [len(labels) for labels in y] == [4, 4]
    np.testing.assert_array_equal(np.concatenate(x)[:7], images.test_images)
    np.testing.assert_array_equal(np.concatenate(y)[:7], images.test_labels)
    np.testing.assert_array_equal(np.concatenate(weights), 7 * [1] + [0])


def test_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=11 .* 10 training images"):
        numbered_images(10).steps_per_epoch(11)


def test_digits_are_held_out_by_a_fixed_split_with_every_class():
    first, second = data.load(RECIPE), data.load(RECIPE)
    np.testing.assert_array_equal(first.test_images, second.test_images)
    assert first.train_images.shape == (1437, 8, 8, 1)
    assert first.test_images.shape == (360, 8, 8, 1)
    assert first.train_images.dtype == np.uint8
    assert first.train_images.max() == 255
    assert set(np.bincount(first.test_labels)) <= {35, 36, 37}
    train = {image.tobytes() for image in first.train_images}
    assert not train & {image.tobytes() for image in first.test_images}


@pytest.fixture
def no_network(monkeypatch):
    """Refuses every request, as an unreachable host does."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def test_prepared_data_is_read_without_a_network_call(prepared, monkeypatch):
    def connect(*_):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    images = data.load(CIFAR10, prepared)
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    np.testing.assert_array_equal(images.train_images, expected)
    np.testing.assert_array_equal(images.train_labels, np.arange(20) % 10)
    assert images.test_images.shape == (10, 32, 32, 3)
    assert images.class_names == list("abcdefghij")


def test_data_set_with_other_classes_than_the_recipe_says_is_refused(prepared):
    with pytest.raises(ValueError, match="classes=100, but .* cifar10 has 10"):
        data.load(CIFAR10.replace(classes=100), prepared)


def test_data_dir_comes_from_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(data.load(CIFAR10).train_images) == 20


@pytest.mark.parametrize("level", ["above", "in cifar10", "in the version"])
def test_data_dir_of_another_level_is_named(prepared, level, no_network):
    given, there = {
        "above": (prepared.parent, prepared / "cifar10" / "3.0.2"),
        "in cifar10": (prepared / "cifar10", prepared / "cifar10" / "3.0.2"),
        "in the version": (
            prepared / "cifar10" / "3.0.2",
            prepared / "cifar10" / "3.0.2",
        ),
    }[level]
    with pytest.raises(FileNotFoundError) as error:
        data.load(CIFAR10, given)
    assert f"data_dir={given} does not hold cifar10/3.0.2" in str(error.value)
    assert str(there) in str(error.value)


def test_another_version_is_named(tmp_path, no_network):
    old = tmp_path / "cifar10" / "3.0.1"
    old.mkdir(parents=True)
    (old / "dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"hold cifar10/3.0.2, .* {old}"):
        data.load(CIFAR10, tmp_path)


def test_unprepared_data_without_network_fails_soon_and_leaves_nothing(
    tmp_path, no_network, capsys
):
    start = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        data.load(RECIPES["cifar100_revnet38"], tmp_path)
    assert time.monotonic() - start < 20
    assert str(tmp_path / "cifar100" / "3.0.2") in str(error.value)
    assert "--data-dir" in str(error.value)
    line = capsys.readouterr().out
    assert line.startswith("Downloading cifar100/3.0.2, 160.71 MiB, from https://")
    assert str(tmp_path) in line
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_host_that_never_answers_is_given_up_within_20_seconds(
    tmp_path, no_network, monkeypatch
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        monkeypatch.setenv("https_proxy", proxy)
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            data.load(CIFAR10, tmp_path)
        assert time.monotonic() - start < 20


@pytest.mark.thorough
@pytest.mark.skipif(
    not (CIFAR / "cifar10" / "3.0.2").is_dir(),
    reason="needs CIFAR-10, prepared by TFDS in TFDS_DATA_DIR or its default folder",
)
def test_real_cifar10():
    images = data.load(CIFAR10, CIFAR)
    assert images.train_images.shape == (50_000, 32, 32, 3)
    assert images.test_images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(images.train_labels), [5000] * 10)
    # The published means of the channels; copies that went through JPEG are 1.4 off.
    np.testing.assert_allclose(
        images.mean.mean(axis=(0, 1)), [125.3, 123.0, 113.9], atol=2
    )
    assert images.class_names[0] == "airplane"


def contexts(pipelines, replicas):
    return [
        tf.distribute.InputContext(pipelines, i, replicas) for i in range(pipelines)
    ]


@pytest.mark.parametrize("first_step", [0, 3])
def test_pipelines_of_workers_share_the_images_of_each_step(first_step):
    images = numbered_images(10)
    recipe = RECIPE.replace(flip=True, pad=1)
    x, y = training_arrays(images, recipe, 6, first_step)
    shares = [
        list(
            images.training_batches(recipe, first_step, context)
            .take(12)
            .as_numpy_iterator()
        )
        for context in contexts(2, replicas=4)
    ]
    for step in range(6):
        # Two workers of two replicas each: four batches of one image.
        parts = [part for share in shares for part in share[2 * step : 2 * step + 2]]
        assert all(part_x.shape[0] == 1 for part_x, _ in parts)
        found = {int(part_y[0]): part_x[0] for part_x, part_y in parts}
        expected = dict(zip(y[4 * step :], x[4 * step : 4 * step + 4], strict=False))
        assert found.keys() == expected.keys()
        for label, image in expected.items():
            np.testing.assert_array_equal(found[label], image)


@pytest.mark.parametrize("pipelines", [1, 2, 3])
def test_every_worker_tests_as_many_batches_and_all_of_them_every_image_once(pipelines):
    # With seven images, a third worker would have no image in its second batch.
    images, batch = numbered_images(10), 2 * pipelines
    seen = []
    for context in contexts(pipelines, pipelines):
        batches = list(images.test_batches(batch, False, context).as_numpy_iterator())
        assert len(batches) == images.test_steps(batch) == -(-7 // batch)
        for _, labels, weights in batches:
            assert len(weights) == 2
            seen += labels[weights > 0].tolist()
    assert sorted(seen) == list(range(7))


def test_worker_without_any_test_image_has_blanks():
    images = dataclasses.replace(
        numbered_images(10),
        test_images=np.zeros((1, 8, 8, 1), np.uint8),
        test_labels=np.zeros(1, np.int64),
    )
    first, second = [
        list(images.test_batches(4, False, context).as_numpy_iterator())
        for context in contexts(2, replicas=2)
    ]
    assert [weights.tolist() for *_, weights in first] == [[1, 0]]
    assert [weights.tolist() for *_, weights in second] == [[0, 0]]
