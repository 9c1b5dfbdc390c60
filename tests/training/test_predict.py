"""Predictions of finished runs: volumes in their own space, and classes of pictures."""

import csv
import json
import re
from pathlib import Path

import keras
import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf
from made_volumes import (
    AXES,
    CASES,
    case,
    cut,
    image_of,
    turned,
    with_nan,
    write_decathlon,
)
from PIL import Image

from training import evaluate, export, fit, outputs, predict, runs, train
from training.recipes import RECIPES
from training.windows import SlidingWindow, shares

RESULT = {
    "test_loss": 0.0,
    "class_names": ["background", "organ", "tumour"],
    "label_values": [0, 3, 7],
    "channel_names": ["m0"],
    "channel_files": False,
    "spacing": [1.0, 1.0, 1.0],
}


def write_run(run_dir, name, recipe, network, images=None, **result):
    """Writes the files of a finished run that the program reads."""
    run_dir.mkdir(exist_ok=True)
    recipe.task.serving_model(network, images).save(run_dir / "model.keras")
    outputs.write_json(run_dir / "recipe.json", runs.describe(name, recipe))
    outputs.write_json(run_dir / "result.json", RESULT | result)


def network(channels=1, window=(6, 6, 6), convolution=None):
    inputs = keras.Input((*window, channels))
    conv = convolution or keras.layers.Conv3D(3, 3, padding="same")
    return keras.Model(inputs, conv(inputs))


def threshold(channels=1):
    """A network of the first channel: organ above 1 deviation, tumour above 3."""
    found = network(channels, convolution=keras.layers.Conv3D(3, 1))
    kernel = np.zeros((1, 1, 1, channels, 3))
    # Score of each class: 0, x - 1 and 2 * x - 4, which cross at 1 and at 3.
    kernel[..., 0, :] = [0, 1, 2]
    found.set_weights([50 * kernel, 50 * np.array([0, -1, -4])])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("made") / "run"
    recipe = RECIPES["decathlon_revunet"].replace(patch_size=(6, 6, 6))
    write_run(run_dir, "decathlon_revunet", recipe, threshold())
    return run_dir


def body(shape=(11, 8, 13)):
    """Returns a volume, and the labels that `threshold` gives its voxels."""
    rng = np.random.default_rng(0)
    array = rng.uniform(0, 1, shape).astype(np.float32)
    array[: shape[0] // 2, -3:, -4:] += 10
    array[:2, -2:, -2:] += 40
    values = (array - array.mean()) / array.std()
    return array, np.array([0, 3, 7])[(values > 1).astype(int) + (values > 3)]


def save(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        nib.save(image, folder / name)
    return [str(folder / name) for name in images]


def test_labels_lie_on_their_volume_in_every_orientation(run, tmp_path, capsys):
    array, labels = body()
    assert set(np.unique(labels)) == {0, 3, 7}
    files = save(
        tmp_path / "in", {f"{axes}.nii.gz": image_of(array, axes=axes) for axes in AXES}
    )
    predict.main([str(run), *files, "--output", str(tmp_path / "out")])
    for file in files:
        given, found = nib.load(file), nib.load(tmp_path / "out" / Path(file).name)
        assert found.get_data_dtype() == np.uint8
        np.testing.assert_allclose(found.affine, given.affine, atol=1e-6)
        assert found.header["sform_code"] == given.header["sform_code"]
        assert nib.aff2axcodes(found.affine) == tuple(Path(file).name[:3])
        # Each voxel beside its own intensity, in the order of the file.
        pairs = dict(
            zip(
                np.asarray(given.dataobj).flat,
                np.asarray(found.dataobj).flat,
                strict=True,
            )
        )
        np.testing.assert_array_equal(
            [pairs[value] for value in array.flat], labels.flat
        )
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(AXES)
    assert "RAS.nii.gz (48 of 48): 100%" in err or "RAS.nii.gz" in err


@pytest.mark.parametrize("shape", [(3, 4, 2), (6, 6, 6), (7, 25, 6), (1, 30, 30)])
def test_volume_of_any_size_is_predicted(run, tmp_path, shape):
    array = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    array[0, -1, -1] = 50
    files = save(tmp_path / "in", {"a.nii": image_of(array, axes="PIR")})
    predict.main([str(run), *files, "--output", str(tmp_path / "out")])
    found = nib.as_closest_canonical(nib.load(tmp_path / "out" / "a.nii.gz"))
    assert found.shape == shape
    assert np.flatnonzero(np.asarray(found.dataobj) == 7).tolist() == (
        [np.ravel_multi_index((0, shape[1] - 1, shape[2] - 1), shape)]
    )


def test_labels_of_another_spacing_lie_on_their_volume(run, tmp_path):
    array, labels = body((16, 12, 20))
    fine = array.repeat(2, 0).repeat(2, 2)
    image = image_of(fine, (0.5, 1, 0.5), "SLP")
    files = save(tmp_path / "in", {"a.nii.gz": image})
    predict.main([str(run), *files, "--output", str(tmp_path / "out")])
    found = nib.as_closest_canonical(nib.load(tmp_path / "out" / "a.nii.gz"))
    expected = labels.repeat(2, 0).repeat(2, 2)
    tumour = np.asarray(found.dataobj) == 7
    overlap = 2 * (tumour & (expected == 7)).sum()
    assert overlap / (tumour.sum() + (expected == 7).sum()) > 0.8


def test_shares_of_the_windows_in_a_voxel_sum_to_1():
    for size, window in [(6, 6), (7, 6), (100, 6), (31, 8), (5, 1)]:
        starts, weights = shares(size, window)
        total = np.zeros(size)
        for start, weight in zip(starts.numpy(), weights.numpy(), strict=True):
            total[start : start + window] += weight
        np.testing.assert_allclose(total, 1, rtol=1e-5)
        assert (np.diff(starts) <= max(window // 2, 1)).all()
        assert starts[0] == 0 and starts[-1] == size - window


def test_loop_of_the_model_gives_the_probabilities_of_the_prediction():
    found = network(channels=2)
    inputs = keras.Input(batch_shape=(1, None, None, None, 2))
    layer = SlidingWindow(found, "channel")
    model = keras.Model(inputs, layer(inputs))
    for shape in [(11, 8, 13), (4, 9, 5)]:
        x = np.random.default_rng(0).normal(3, 5, (*shape, 2)).astype(np.float32)
        mean, deviation = x.mean((0, 1, 2)), x.std((0, 1, 2))
        planes = np.concatenate(list(layer.planes(x, mean, deviation)))
        graph = tf.function(model)(x[np.newaxis])[0]
        np.testing.assert_allclose(planes, graph, atol=1e-6)
        np.testing.assert_allclose(planes.sum(-1), 1, atol=1e-5)
    # By hand, a window that is the whole volume.
    x = np.random.default_rng(1).normal(size=(1, 6, 6, 6, 2)).astype(np.float32)
    normal = (x - x.mean((1, 2, 3))) / x.std((1, 2, 3))
    np.testing.assert_allclose(model(x), tf.nn.softmax(found(normal)), atol=1e-5)


def refusal(capsys, *argv, status=2):
    """Runs a prediction that has to refuse, and returns its line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        predict.main([str(word) for word in argv])
    assert exit_.value.code == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m training.predict: error: ")
    return line


def two_channels(folder):
    array, _ = body()
    return save(folder, {"b.nii.gz": image_of(np.stack([array, array], -1))})


def oblique(folder):
    array, _ = body()
    save(folder, {"b.nii.gz": image_of(array)})
    turned(folder, "b.nii.gz", 40)
    return [folder / "b.nii.gz"]


def same_name(folder):
    array, _ = body()
    return [
        *save(folder / "1", {"b.nii.gz": image_of(array)}),
        *save(folder / "2", {"b.nii": image_of(array)}),
    ]


def existing(folder):
    array, _ = body()
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "b.nii.gz").write_text("years of work")
    return save(folder, {"b.nii.gz": image_of(array)})


def folder_of_the_input(folder):
    array, _ = body()
    return save(folder.parent / "out", {"b.nii.gz": image_of(array)})


def truncated(folder):
    array, _ = body()
    save(folder, {"b.nii.gz": image_of(array)})
    cut(folder, "b.nii.gz")
    return [folder / "b.nii.gz"]


def not_finite(folder):
    array, _ = body()
    return save(folder, {"b.nii.gz": image_of(with_nan(array))})


def missing(folder):
    return [folder / "b.nii.gz"]


def picture(folder):
    folder.mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(folder / "b.png")
    return [folder / "b.png"]


@pytest.mark.parametrize(
    "bad, hint",
    [
        (two_channels, r"b.nii.gz: expected 1 channel\(s\), .* found \(11, 8, 13, 2\)"),
        (oblique, "b.nii.gz: expected voxels along the axes .* 40 degrees"),
        (same_name, "expected a name for each input, found .*b.nii.gz and .*b.nii;"),
        (existing, "out/b.nii.gz exists; remove it, or give another --output"),
        (folder_of_the_input, "out is the folder of .*b.nii.gz"),
        (truncated, "b.nii.gz is damaged or cut"),
        (not_finite, "b.nii.gz: expected finite voxels, found 1"),
        (missing, "b.nii.gz is missing"),
        (picture, "b.png is no NIfTI file"),
    ],
)
def test_input_that_does_not_fit_is_named_before_anything_is_written(
    run, tmp_path, bad, hint, capsys
):
    array, _ = body()
    good = save(tmp_path / "in", {"a.nii.gz": image_of(array)})
    files = bad(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    line = refusal(capsys, run, *good, *files, "--output", tmp_path / "out")
    assert re.search(hint, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_error_while_writing_leaves_no_part(run, tmp_path, monkeypatch, capsys):
    def full(image, path):
        Path(path).write_text("a part")
        raise OSError("No space left on device")

    array, _ = body()
    files = save(tmp_path / "in", {"a.nii.gz": image_of(array)})
    monkeypatch.setattr(nib, "save", full)
    line = refusal(capsys, run, *files, "--output", tmp_path / "out", status=1)
    assert "No space left" in line
    assert not (tmp_path / "out").exists()


def test_files_of_channels_are_one_volume(tmp_path, capsys):
    recipe = RECIPES["decathlon_revunet"].replace(patch_size=(6, 6, 6))
    about = {"channel_names": ["m0", "m1"], "channel_files": True}
    write_run(tmp_path / "run", "decathlon_revunet", recipe, threshold(2), **about)
    array, labels = body()
    files = save(
        tmp_path / "in",
        {f"a_{i:04}.nii.gz": image_of(array if i == 0 else -array) for i in range(2)},
    )
    out = tmp_path / "out"
    line = refusal(capsys, tmp_path / "run", files[0], "--output", out)
    assert "expected the files of 2 channel(s), a_0000 to a_0001, found" in line
    predict.main([str(tmp_path / "run"), *files, "--output", str(out)])
    assert [path.name for path in out.iterdir()] == ["a.nii.gz"]
    np.testing.assert_array_equal(nib.load(out / "a.nii.gz").dataobj, labels)


def test_run_on_images_writes_the_class_of_each_picture(tmp_path, capsys):
    from training import data

    recipe = RECIPES["digits_revnet"].replace(num_blocks=(1,), channels=(4, 4))
    images = data.load(recipe)
    model = fit.build(recipe, images)
    run_dir = tmp_path / "run"
    write_run(
        run_dir, "digits_revnet", recipe, model, images, class_names=images.class_names
    )
    files = []
    (tmp_path / "in").mkdir()
    for i, pixels in enumerate(images.test_images[:5]):
        files.append(str(tmp_path / "in" / f"{i}.png"))
        Image.fromarray(pixels[..., 0]).save(files[-1])
    predict.main([str(run_dir), *files, "--output", str(tmp_path / "out")])
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = export.load(run_dir)(images.test_images[:5]).numpy()
    assert [row["file"] for row in rows] == files
    assert [row["class"] for row in rows] == [str(i) for i in expected.argmax(1)]
    found = [[float(row[name]) for name in images.class_names] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-4)

    Path(files[2]).write_text("no picture")
    line = refusal(capsys, run_dir, *files, "--output", tmp_path / "2", status=1)
    assert f"{files[2]} cannot be read as a picture" in line
    assert not (tmp_path / "2").exists()


def rows_of(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


TINY = (
    "--recipe decathlon_revunet --channels 8 16 --norm instance --patch-size 8 8 8 "
    "--patches-per-volume 20 --global-batch-size 2 --train-steps 80 --warmup-steps 5 "
    "--learning-rate 0.01 --no-flip"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a made-up task of the Decathlon. Beside it lies the task."""
    folder = tmp_path_factory.mktemp("trained")
    write_decathlon(folder / "task")
    where = ["--data-dir", str(folder / "task"), "--run-dir", str(folder / "run")]
    train.main([*TINY, *where])
    return folder / "run"


@pytest.mark.thorough
def test_trained_run_reports_the_dice_of_each_class(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["test_dice_organ"] > 0.8 and result["test_dice_tumour"] > 0.6
    assert result["test_dice"] == pytest.approx(
        (result["test_dice_organ"] + result["test_dice_tumour"]) / 2
    )
    rows = rows_of(trained)
    assert [row["step"] for row in rows] == ["40", "80"]
    assert float(rows[-1]["test_dice_organ"]) > 0.7
    for name in ("slices.png", "curves.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    card = json.loads((trained / "export" / "1" / "model_card.json").read_text())
    assert card["class_names"] == ["background", "organ", "tumour"]
    assert card["result"]["spacing"] == result["spacing"]


@pytest.mark.thorough
def test_trained_run_labels_the_corner_of_every_case(trained, tmp_path):
    for name, (_, spacing, axes) in CASES.items():
        array, label = case(name)
        files = save(tmp_path, {f"{name}.nii.gz": image_of(array, spacing, axes)})
        predict.main([str(trained), *files, "--output", str(tmp_path / "out")])
        found = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert nib.aff2axcodes(found.affine) == tuple(axes)
        found = np.asarray(nib.as_closest_canonical(found).dataobj) > 0
        dice = 2 * (found & (label > 0)).sum() / (found.sum() + (label > 0).sum())
        assert dice > 0.75, name
        assert found[-1, -1, -1] and not found[0].any(), name


@pytest.mark.thorough
def test_saved_model_gives_the_probabilities_and_labels_of_the_prediction(
    trained, tmp_path
):
    result = json.loads((trained / "result.json").read_text())
    array, _ = case("d")
    spacing = tuple(result["spacing"])
    files = save(tmp_path, {"d.nii.gz": image_of(array, spacing)})
    predict.main([str(trained), *files, "--output", str(tmp_path / "out")])
    labels = np.asarray(nib.load(tmp_path / "out" / "d.nii.gz").dataobj)
    signatures = tf.saved_model.load(trained / "export" / "1").signatures
    x = tf.constant(array[np.newaxis])
    found = signatures["serving_default"](inputs=x)["predictions"][0]
    windows = export.load(trained).layers[-1]
    mean, deviation = array.mean((0, 1, 2)), array.std((0, 1, 2))
    expected = np.concatenate(list(windows.planes(array, mean, deviation)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(signatures["labels"](inputs=x)["labels"][0], labels)


@pytest.mark.thorough
def test_trained_run_is_scored_again(trained, capsys):
    evaluate.main([str(trained), "--data-dir", str(trained.parent / "task")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in lines] == [
        "loss",
        "dice",
        "dice_organ",
        "dice_tumour",
    ]
    for line in lines:
        scored, recorded = re.findall(r"\d\.\d{4}", line)
        assert scored == recorded


@pytest.mark.thorough
def test_other_formats_are_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([str(trained), "--format", "onnx", "--output", str(tmp_path / "x")])
    assert "format=onnx: the model of this run needs a loop" in capsys.readouterr().err


class Interrupted(Exception):
    pass


@pytest.mark.thorough
def test_interrupted_run_goes_on_with_the_patches_of_a_straight_one(
    trained, tmp_path, monkeypatch
):
    from training.checkpoints import Checkpoints

    save_checkpoint = Checkpoints.save

    def interrupted(checkpoints, step, record):
        if step == 80:
            raise Interrupted
        save_checkpoint(checkpoints, step, record)

    where = ["--data-dir", str(trained.parent / "task"), "--run-dir", str(tmp_path)]
    monkeypatch.setattr(train, "finish", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(Interrupted):
            train.main([*TINY, *where])
    train.main([*TINY, *where])
    straight, resumed = (rows_of(path) for path in (trained, tmp_path))
    assert [row["step"] for row in resumed] == ["40", "80"]
    for column in ("train_loss", "test_loss", "test_dice"):
        # The order of sums on several threads is not fixed.
        expected = float(straight[-1][column])
        assert float(resumed[-1][column]) == pytest.approx(expected, abs=0.02)


@pytest.mark.thorough
def test_two_replicas_train_on_volumes(trained, two_replicas, tmp_path, monkeypatch):
    from training import strategy

    monkeypatch.setattr(strategy, "get_strategy", lambda _: two_replicas)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    where = ["--data-dir", str(trained.parent / "task"), "--run-dir", str(tmp_path)]
    train.main([*TINY, *where, "--train-steps", "10"])
    (row,) = rows_of(tmp_path)
    assert (row["step"], float(row["train_dice"]) > 0.1) == ("10", True)
