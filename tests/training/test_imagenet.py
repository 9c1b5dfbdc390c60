import shutil

import numpy as np
import pytest
import tensorflow as tf

from training import data, imagenet
from training.recipes import RECIPES

RECIPE = RECIPES["imagenet_revnet104"].replace(global_batch_size=5)


def load(data_dir, **options):
    return data.load(RECIPE, data_dir, **options)


def training_arrays(images, steps, first_step=0, recipe=RECIPE):
    batches = images.training_batches(recipe, first_step).take(steps)
    x, y = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(x), np.concatenate(y)


def test_training_images_are_of_one_size_and_range_with_their_labels(imagenet_dir):
    images = load(imagenet_dir)
    assert images.steps_per_epoch(5) == 2
    x, y = training_arrays(images, steps=12)
    assert x.shape == (60, 224, 224, 3)
    assert x.dtype == np.float32
    assert -1 <= x.min() < -0.5
    assert 0.5 < x.max() <= 1
    # An epoch holds no image twice, and has another order than the epoch before.
    epochs = y.reshape(6, 10)
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert set(y) == set(range(0, 120, 10))
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("first_step", [2, 3])
def test_resumed_run_sees_the_images_of_an_uninterrupted_run(imagenet_dir, first_step):
    x, y = training_arrays(load(imagenet_dir), steps=5)
    tf.random.set_seed(99)
    x_on, y_on = training_arrays(load(imagenet_dir), 5 - first_step, first_step)
    np.testing.assert_array_equal(y_on, y[5 * first_step :])
    np.testing.assert_array_equal(x_on, x[5 * first_step :])


@pytest.mark.parametrize("first_step", [0, 3])
def test_workers_share_the_images_of_each_step(imagenet_dir, first_step):
    recipe = RECIPE.replace(global_batch_size=4)
    x, y = training_arrays(load(imagenet_dir), 5, first_step, recipe)
    shares = []
    for i in range(2):
        context = tf.distribute.InputContext(2, i, 2)
        batches = load(imagenet_dir).training_batches(recipe, first_step, context)
        shares.append(list(batches.take(5).as_numpy_iterator()))
    for step in range(5):
        part_x, part_y = map(
            np.concatenate, zip(*[share[step] for share in shares], strict=True)
        )
        expected = slice(4 * step, 4 * step + 4)
        order, expected_order = np.argsort(part_y), np.argsort(y[expected])
        np.testing.assert_array_equal(part_y[order], y[expected][expected_order])
        np.testing.assert_array_equal(part_x[order], x[expected][expected_order])


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_test_every_image_once_in_as_many_batches(imagenet_dir, workers):
    seen = []
    for i in range(workers):
        context = tf.distribute.InputContext(workers, i, workers)
        images = load(imagenet_dir)
        batches = images.test_batches(workers, False, context).as_numpy_iterator()
        _, labels, weights = zip(*batches, strict=True)
        assert len(weights) == images.test_steps(workers) == -(-5 // workers)
        seen += np.concatenate(labels)[np.concatenate(weights) > 0].tolist()
    assert sorted(seen) == [0, 10, 20, 30, 40]


def coordinates(height, width):
    """Returns an image whose red grows downwards, and its green to the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = (np.arange(height) * 255 / (height - 1))[:, np.newaxis]
    image[..., 1] = np.arange(width) * 255 / (width - 1)
    return image


def test_random_windows_have_the_area_and_the_ratio_of_sides_of_inception():
    encoded = tf.io.encode_jpeg(coordinates(300, 400), quality=100)
    areas, ratios = [], []
    for i in range(100):
        window = imagenet.random_window(encoded, tf.constant([0, i])).numpy()
        assert window.shape == (224, 224, 3)
        height, width = (np.ptp(window[..., c]) / 255 for c in (0, 1))
        areas.append(height * width)
        ratios.append(400 * width / (300 * height))
    # Two pixels are lost at the edges, and JPEG is not exact.
    assert 0.03 < min(areas) < 0.15
    assert 0.85 < max(areas) <= 1
    assert 0.7 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.4


def test_centre_crop_is_the_middle_seven_eighths_of_each_side():
    encoded = tf.io.encode_png(coordinates(240, 400))  # without loss; read as JPEG is
    image = imagenet.centre_crop(encoded).numpy()
    assert image.shape == (224, 224, 3)
    assert image.dtype == np.uint8
    ends = [255 / 16, 255 * 15 / 16]
    for line in (image[[0, -1], 112, 0], image[112, [0, -1], 1]):
        np.testing.assert_allclose(line, ends, atol=2)  # ends of pixels, cut off


def test_test_images_come_in_order_for_the_network_and_for_the_serving_model(
    imagenet_dir,
):
    images = load(imagenet_dir)
    served = list(images.test_batches(3, normalize=False).as_numpy_iterator())
    assert [*served[0][1], *served[1][1]] == [0, 10, 20, 30, 40, 0]
    assert [*served[0][2], *served[1][2]] == [1, 1, 1, 1, 1, 0]
    for (x, _, weights), (raw, *_) in zip(images.test_batches(3), served, strict=True):
        assert raw.dtype == np.uint8
        count = int(sum(weights))
        np.testing.assert_allclose(x[:count], raw[:count] / 127.5 - 1, atol=1e-6)


@pytest.fixture
def with_junk(imagenet_dir, tmp_path, put_junk):
    """Copies the data set to `copy` and puts junk in the place of images."""

    def copy(split, numbers):
        shutil.copytree(imagenet_dir, tmp_path / "copy")
        name = f"imagenet2012-{split}.tfrecord-00000-of-00001"
        path = tmp_path / "copy" / "imagenet2012" / "5.1.0" / name
        put_junk(path, numbers)
        return path

    return copy


def test_corrupt_images_are_left_out_and_epochs_keep_their_length(tmp_path, with_junk):
    path = with_junk("train", [2, 3, 7])
    images = load(tmp_path / "copy", skip_corrupt=True)
    _, y = training_arrays(images, steps=8)
    assert set(y) == set(range(0, 120, 10)) - {20, 30, 70}
    # An epoch has 10 places for 9 images, so one image comes twice.
    assert all(len(set(epoch)) == 9 for epoch in y.reshape(4, 10))
    assert sorted(text.split(":")[0] for text in images.corrupt) == [
        f"{path}, record {i}" for i in (2, 3, 7)
    ]


@pytest.fixture
def train(tmp_path, run):
    """Runs the guide's line, for two steps of four images, on two devices."""

    def train(data_dir, *flags):
        argv = ["--recipe", "imagenet_revnet104", "--data-dir", data_dir]
        argv += ["--run-dir", tmp_path / "run", "--train-steps", "2"]
        argv += ["--strategy", "mirrored", "--global-batch-size", "4", *flags]
        (done,) = run(*argv, devices=2)
        return done

    return train


# A network that is built and exported in seconds.
SMALL = ["--num-blocks", "1", "1", "1", "2", "--channels", "8", "8", "8", "8", "16"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "network", [pytest.param([], marks=pytest.mark.slow), SMALL], ids=["full", "small"]
)
def test_line_of_the_readme_trains_revnet104_on_two_devices(
    imagenet_dir, tmp_path, train, network
):
    done = train(imagenet_dir, *network)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 replica(s)" in done.stdout
    if not network:
        assert "45,428,072 parameters" in done.stdout
    assert (tmp_path / "run" / "result.json").is_file()


def test_corrupt_test_images_are_left_out_of_the_score(tmp_path, with_junk):
    with_junk("validation", [1, 4])
    images = load(tmp_path / "copy", skip_corrupt=True)
    _, y, weights = zip(*images.test_batches(4).as_numpy_iterator(), strict=True)
    assert list(np.concatenate(y)) == [0, 20, 30, 0, 0, 0, 0, 0]
    assert list(np.concatenate(weights)) == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.thorough
def test_corrupt_image_in_the_middle_of_training_is_named(tmp_path, with_junk, train):
    path = with_junk("train", range(12))
    done = train(tmp_path / "copy", *SMALL)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"error: {path}, record " in last
    assert "--skip-corrupt leaves such images out" in last
    assert "Traceback" not in last
