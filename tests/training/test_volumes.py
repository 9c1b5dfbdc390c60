"""Volumes of one's own: reading, damage, patches, scores."""

import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf
from keras import losses
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

from training import data, nifti, segmentation, train
from training.recipes import RECIPES
from training.volumes import UNLABELED

RECIPE = RECIPES["decathlon_revunet"].replace(
    patch_size=(8, 8, 8), channels=(4, 4), patches_per_volume=4
)


@pytest.fixture
def folder(tmp_path):
    return write_decathlon(tmp_path / "task")


def load(folder, skip_corrupt=False, **changes):
    return data.load(
        RECIPE.replace(**changes), folder, skip_corrupt, run_dir=folder.parent / "run"
    )


def test_volume_is_read_along_the_axes_in_every_orientation(tmp_path):
    array, _ = case("a", channels=1)
    for axes in AXES:
        path = tmp_path / f"{axes}.nii"
        nib.save(image_of(array[..., 0], (1, 2, 3), axes), path)
        found = nifti.read([path], nifti.opened([path], 1), (1, 2, 3))
        np.testing.assert_array_equal(found.channels, array)
        np.testing.assert_allclose(found.affine[:3, 3], (-20, 5, 7))


def test_volume_is_resampled_where_its_voxels_lie(tmp_path):
    x, y, z = np.indices((20, 20, 20))
    ramp = image_of((x + 10.0 * y + 100 * z).astype(np.float32), (1, 1, 2), "PSL")
    nib.save(ramp, tmp_path / "ramp.nii")
    found = nifti.read(
        [tmp_path / "ramp.nii"], nifti.opened([tmp_path / "ramp.nii"], 1), (2, 0.5, 1)
    )
    assert found.channels.shape == (10, 40, 40, 1)
    inner = np.stack(np.indices((8, 36, 36)), -1) + (1, 2, 2)
    place = nib.affines.apply_affine(found.affine, inner) - (-20, 5, 7)
    expected = place @ (1, 10, 50)
    np.testing.assert_allclose(found.channels[1:9, 2:38, 2:38, 0], expected, rtol=1e-5)


def test_labels_are_resampled_to_the_nearest():
    label = np.zeros((6, 6, 6), np.uint8)
    label[3:] = 4
    found = nifti.along_axes(image_of(label), (0.5, 1, 1), order=0)
    assert set(np.unique(found.dataobj)) == {0, 4}
    assert np.asarray(found.dataobj).mean() == pytest.approx(2, abs=0.2)


def test_patches_are_those_of_a_run_without_interruption(folder):
    images = load(folder, flip=True, global_batch_size=3)
    recipe = RECIPE.replace(global_batch_size=3)
    straight = list(images.training_batches(recipe).take(8).as_numpy_iterator())
    resumed = images.training_batches(recipe, 5).take(3).as_numpy_iterator()
    for (x, y), (again_x, again_y) in zip(straight[5:], resumed, strict=True):
        np.testing.assert_array_equal(x, again_x)
        np.testing.assert_array_equal(y, again_y)
    assert x.shape == (3, 8, 8, 8, 2) and y.shape == (3, 8, 8, 8)
    other = images.training_batches(recipe.replace(seed=1)).take(1).as_numpy_iterator()
    assert (next(other)[0] != straight[0][0]).any()


def test_patches_are_read_on_and_labels_lie_on_their_voxels(folder):
    images = load(folder, flip=True, spacing=(1.0, 1.0, 1.0))
    for x, y in images.training_batches(RECIPE).take(20).as_numpy_iterator():
        bright = x[..., 0][y == 2].mean() if (y == 2).any() else 9
        dark = x[..., 0][y == 0].mean() if (y == 0).any() else -9
        assert bright > dark + 1
        assert (x[y == UNLABELED] == 0).all()


def test_share_of_the_patches_has_foreground(folder):
    images = load(folder, patch_size=(2, 2, 2), foreground=1.0)
    rng = np.random.default_rng(0)
    for volume in images.train:
        for _ in range(20):
            _, label = images.random_patch(volume, rng)
            assert ((label > 0) & (label < UNLABELED)).any()


def test_tiles_cover_every_test_voxel_once(folder):
    images = load(folder)
    labels = np.concatenate(
        [y for _, y in images.test_batches(4).as_numpy_iterator()], axis=None
    )
    assert len(labels) == images.test_steps(4) * 4 * 8**3
    for value in range(3):
        expected = sum(np.count_nonzero(v.label == value) for v in images.test)
        assert np.count_nonzero(labels == value) == expected


def test_every_channel_is_normalized_by_itself_or_with_the_others(folder):
    volume = load(folder).train[0]
    image = (volume.image - volume.mean) / volume.deviation
    np.testing.assert_allclose(image.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std((0, 1, 2)), 1, rtol=1e-5)
    volume = load(folder, normalization="volume").train[0]
    image = (volume.image - volume.mean) / volume.deviation
    assert (image.mean(), image.std()) == pytest.approx((0, 1), abs=1e-5)
    assert volume.mean[0] == volume.mean[1]


def test_fifth_of_the_volumes_is_for_the_test_with_every_seed(folder):
    names = [
        [[v.folder.name for v in part] for part in (images.train, images.test)]
        for images in (load(folder), load(folder, seed=1))
    ]
    assert names[0] == names[1]
    assert [len(part) for part in names[0]] == [4, 1]


def test_labeled_volumes_of_the_test_are_those_of_the_test(folder):
    for part in ("images", "labels"):
        (folder / f"{part}Ts").mkdir()
        path = folder / f"{part}Tr" / "b.nii.gz"
        path.rename(folder / f"{part}Ts" / "b.nii.gz")
    edit(folder, lambda c: c["training"].pop(1))
    edit(folder, lambda c: c.update(test=["./imagesTs/b.nii.gz"]))
    images = load(folder)
    assert [v.folder.name[0] for v in images.train] == ["a", "c", "d", "e"]
    assert [v.folder.name[0] for v in images.test] == ["b"]


def test_folder_of_nnunet_is_read_as_one_of_the_decathlon(folder, tmp_path):
    other = tmp_path / "nnunet"
    for part in ("imagesTr", "labelsTr"):
        (other / part).mkdir(parents=True)
    for name in CASES:
        image = nib.load(folder / "imagesTr" / f"{name}.nii.gz")
        for i in range(2):
            path = other / "imagesTr" / f"{name}_{i:04}.nii.gz"
            nib.save(image.slicer[..., i], path)
        label = nib.load(folder / "labelsTr" / f"{name}.nii.gz")
        nib.save(label, other / "labelsTr" / f"{name}.nii.gz")
    content = {
        "channel_names": {"0": "m0", "1": "m1"},
        "labels": {"background": 0, "organ": 1, "tumour": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (other / "dataset.json").write_text(json.dumps(content))
    found, expected = load(other), load(folder)
    assert found.about == expected.about | {"channel_files": True}
    for a, b in zip(found.train, expected.train, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.label, b.label)


def test_label_to_ignore_counts_nowhere(folder):
    edit(folder, lambda c: c.update(labels={"background": 0, "organ": 1, "ignore": 2}))
    images = load(folder)
    assert images.class_names == ["background", "organ"]
    assert (images.train[0].label == UNLABELED).sum() > 0


def test_values_of_labels_need_not_be_consecutive(folder):
    edit(folder, lambda c: c.update(labels={"0": "none", "2": "tumour", "1": "organ"}))
    assert load(folder).class_names == ["none", "organ", "tumour"]
    edit(folder, lambda c: c.update(labels={"0": "none", "2": "x", "1": "y", "9": "z"}))
    assert load(folder).about["label_values"] == [0, 1, 2, 9]


def test_volumes_are_decompressed_once(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(nifti, "read", None)
    again = load(folder)
    assert [v.folder for v in first.train] == [v.folder for v in again.train]
    with pytest.raises(TypeError):  # Another spacing needs other arrays.
        load(folder, spacing=(3.0, 3.0, 3.0))


def edit(folder, change):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(folder, name, change):
    """Replaces the voxels of a file."""
    path = folder / name
    image = nib.load(path)
    array = change(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(array, image.affine), path)


def cut_inside(folder, name):
    """Cuts the NIfTI file inside of a whole gzip file."""
    path = folder / name
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-200]))


IMAGE, LABEL = "imagesTr/b.nii.gz", "labelsTr/b.nii.gz"
DAMAGES = {
    "no description": (
        lambda f: (f / "dataset.json").unlink(),
        "dataset.json is missing; give the folder of a task",
    ),
    "description cut": (
        lambda f: (f / "dataset.json").write_text("{"),
        "dataset.json: expected the description",
    ),
    "no labels": (lambda f: edit(f, lambda c: c.pop("labels")), "found no 'labels'"),
    "labels of one value": (
        lambda f: edit(f, lambda c: c.update(labels={"a": 0, "b": 0})),
        "one whole number for each of",
    ),
    "regions": (
        lambda f: edit(f, lambda c: c.update(labels={"a": 0, "b": [1, 2]})),
        "one whole number for each of",
    ),
    "missing label": (lambda f: (f / LABEL).unlink(), f"{LABEL} is missing"),
    "missing image": (lambda f: (f / IMAGE).unlink(), f"{IMAGE} is missing"),
    "label of another shape": (
        lambda f: rewrite(f, LABEL, lambda a: a[:-1]),
        r"expected the shape of .*imagesTr/b.nii.gz, \(9, 14, 11\), found \(8, ",
    ),
    "label in another place": (lambda f: turned(f, LABEL, 90), "expected the place of"),
    "cut image": (lambda f: cut(f, IMAGE), f"{IMAGE} is damaged or cut"),
    "cut label": (lambda f: cut(f, LABEL), f"{LABEL} is .* damaged"),
    "cut inside": (lambda f: cut_inside(f, IMAGE), f"{IMAGE} is damaged or cut"),
    "no volume": (
        lambda f: (f / IMAGE).write_text("no volume"),
        f"{IMAGE} is no NIfTI file",
    ),
    "unknown label": (
        lambda f: rewrite(f, LABEL, lambda a: a + np.uint8(1)),
        f"{LABEL}: expected the labels of dataset.json, 0, 1, 2, found 3",
    ),
    "fraction as label": (
        lambda f: rewrite(f, LABEL, lambda a: a * np.float32(0.5)),
        f"{LABEL}: expected the labels of dataset.json, 0, 1, 2, found 0.5",
    ),
    "nan": (
        lambda f: rewrite(f, IMAGE, with_nan),
        f"{IMAGE}: expected finite voxels, found 2 that are NaN",
    ),
    "one channel": (
        lambda f: rewrite(f, IMAGE, lambda a: a[..., 0]),
        rf"{IMAGE}: expected 2 channel\(s\), so the shape \(x, y, z, 2\), found",
    ),
    "label in 4-D": (
        lambda f: rewrite(f, LABEL, lambda a: np.stack([a, a], -1)),
        rf"{LABEL}: expected 1 channel\(s\), so the shape \(x, y, z\), found",
    ),
    "oblique": (
        lambda f: (turned(f, IMAGE, 30), turned(f, LABEL, 30)),
        f"{IMAGE}: expected voxels along the axes .* oblique orientation of 30 degrees",
    ),
    "one volume": (
        lambda f: edit(f, lambda c: c.update(training=c["training"][:1])),
        "expected two labelled volumes or more",
    ),
    "two of one name": (
        lambda f: edit(f, lambda c: c.update(training=c["training"] * 2)),
        "expected a name for each volume",
    ),
}


@pytest.mark.parametrize("damage, hint", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_before_anything_is_written(folder, damage, hint):
    damage(folder)
    with pytest.raises((ValueError, OSError)) as error:
        load(folder)
    assert re.search(hint, str(error.value)), error.value
    assert not (folder.parent / "run").exists()


def test_all_damages_are_named_in_one_line_and_begin_no_run(folder, capsys):
    cut(folder, IMAGE)
    (folder / "labelsTr" / "d.nii.gz").unlink()
    run_dir = folder.parent / "run"
    argv = ["--recipe", "decathlon_revunet", "--data-dir", folder, "--run-dir", run_dir]
    with pytest.raises(SystemExit) as exit_:
        train.main([str(word) for word in argv])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "2 of 5 volumes cannot be used" in err
    assert "b.nii.gz is damaged or cut" in err and "d.nii.gz is missing" in err
    assert not run_dir.exists()


def test_damaged_volumes_are_left_out_where_that_is_asked_for(folder, capsys):
    cut(folder, IMAGE)
    images = load(folder, skip_corrupt=True)
    assert len(images.train) + len(images.test) == 4
    assert len(images.corrupt) == 1 and "b.nii.gz" in images.corrupt[0]
    assert capsys.readouterr().err.startswith("Skipping ")


def test_slightly_oblique_volume_is_read_as_it_lies(folder):
    for name in (IMAGE, LABEL):
        turned(folder, name, 5)
    assert len(load(folder).train) == 4


def test_data_set_of_volumes_needs_a_unet():
    with pytest.raises(ValueError, match="dataset='brain': a RevNet needs"):
        RECIPES["digits_revnet"].replace(dataset="brain")
    with pytest.raises(ValueError, match="dataset='digits': a RevUNet needs"):
        RECIPES["brain_revunet"].replace(dataset="digits")
    with pytest.raises(ValueError, match="give it as --data-dir"):
        data.load(RECIPE, run_dir=Path("run"))
    with pytest.raises(ValueError, match="part of nilearn; leave --data-dir out"):
        data.load(RECIPES["brain_revunet"], ".", run_dir=Path("run"))


def logits_of(labels, classes, score=30.0):
    return tf.one_hot(labels, classes) * score


def test_loss_and_scores_are_those_of_their_formulas():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (2, 4, 5, 6)).astype(np.uint8)
    logits = rng.normal(size=(2, 4, 5, 6, 3)).astype(np.float32)
    found = segmentation.DiceCrossEntropy()(truth, logits)
    p, one_hot = tf.nn.softmax(logits).numpy(), np.eye(3)[truth]
    axes = (1, 2, 3)
    dice = 2 * (p * one_hot).sum(axes) / (p.sum(axes) + one_hot.sum(axes))
    entropy = losses.sparse_categorical_crossentropy(truth, p).numpy().mean()
    assert float(found) == pytest.approx(entropy + (1 - dice[:, 1:]).mean(), rel=1e-5)

    metrics = {m.name: m for m in segmentation.metrics(3, from_logits=True)}
    for metric in metrics.values():
        for i in range(2):  # over the whole set, not the mean of batches
            metric.update_state(truth[i : i + 1], logits[i : i + 1])
    label = logits.argmax(-1)
    scores = [
        2
        * ((label == k) & (truth == k)).sum()
        / ((label == k).sum() + (truth == k).sum())
        for k in range(3)
    ]
    assert float(metrics["dice_1"].result()) == pytest.approx(scores[1])
    assert float(metrics["dice_2"].result()) == pytest.approx(scores[2])
    assert float(metrics["dice"].result()) == pytest.approx(np.mean(scores[1:]))
    assert float(metrics["cross_entropy"].result()) == pytest.approx(entropy, rel=1e-5)


def test_voxels_without_a_label_count_nowhere():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (1, 4, 4, 4)).astype(np.uint8)
    logits = rng.normal(size=(1, 4, 4, 4, 3)).astype(np.float32)
    wide = np.pad(truth, [(0, 0), (0, 3), (0, 0), (0, 0)], constant_values=UNLABELED)
    more = np.concatenate([logits, rng.normal(size=(1, 3, 4, 4, 3))], 1)
    more = more.astype(np.float32)
    loss = segmentation.DiceCrossEntropy()
    assert float(loss(wide, more)) == pytest.approx(float(loss(truth, logits)), 1e-5)
    for metric in segmentation.metrics(3, from_logits=True):
        metric.update_state(truth, logits)
        expected = float(metric.result())
        metric.reset_state()
        metric.update_state(wide, more)
        assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


def test_class_that_occurs_nowhere_has_the_score_0_and_is_left_out_of_the_mean():
    truth = np.array([[0, 1, 1, 0]])
    metrics = {m.name: m for m in segmentation.metrics(3, from_logits=True)}
    for metric in metrics.values():
        metric.update_state(truth, logits_of(truth, 3))
    assert float(metrics["dice"].result()) == 1
    assert float(metrics["dice_2"].result()) == 0


@pytest.mark.thorough
def test_brain_is_split_from_front_to_back(tmp_path):
    images = data.load(RECIPES["brain_revunet"], run_dir=tmp_path)
    (back,), (front,) = images.train, images.test
    assert images.class_names == ["outside", "rest", "grey_matter", "white_matter"]
    assert images.spacing == (2.0, 2.0, 2.0)
    for half in (back, front):
        shares = np.bincount(half.label.ravel(), minlength=4) / half.label.size
        assert all(shares > 0.01), shares
        # White matter is brighter than grey matter in T1.
        grey, white = (half.image[..., 0][half.label == k].mean() for k in (2, 3))
        assert white > 1.1 * grey
    # The planes of the cut are neighbours.
    last, first = back.image[:, -1, :, 0], front.image[:, 0, :, 0]
    assert np.corrcoef(last.ravel(), first.ravel())[0, 1] > 0.97
