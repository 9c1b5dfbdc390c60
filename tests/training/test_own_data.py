"""Pictures of one's own in folders, and data sets of TFDS that no recipe names."""

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from training import data, evaluate, export, train
from training.images import decode_picture, held_out
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
COLORS = {"grass": (40, 170, 60), "sea": (30, 70, 200), "sunset": (210, 60, 40)}
RECIPE = RECIPES["pictures_revnet"].replace(image_size=8)
TINY = (
    "--recipe pictures_revnet --num-blocks 1 --channels 8 8 --image-size 8 --pad 1 "
    "--global-batch-size 8 --train-steps 40 --warmup-steps 4"
).split()


def picture(color, size):
    """Returns a noisy picture of one color."""
    rng = np.random.default_rng(sum(size))
    noise = rng.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8))


def fill(folder, count=5, names=tuple(COLORS)):
    """Writes a folder of pictures of several sizes for each class."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            ending = ("jpg", "png")[i % 2]
            image = picture(COLORS[name], (12 + 9 * i, 60 - 7 * i))
            image.save(folder / name / f"{i}.{ending}")
    return folder


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run. Beside it lie the pictures."""
    folder = tmp_path_factory.mktemp("own")
    fill(folder / "photos", 8)
    where = ["--dataset", "photos", "--data-dir", str(folder)]
    train.main(["--run-dir", str(folder / "run"), *TINY, *where])
    return folder / "run"


def load(folder, skip_corrupt=False, **changes):
    return data.load(RECIPE.replace(dataset=str(folder), **changes), None, skip_corrupt)


def test_run_and_export_name_the_classes_as_the_folders(run):
    result = json.loads((run / "result.json").read_text())
    card = json.loads((run / "export" / "1" / "model_card.json").read_text())
    assert result["class_names"] == card["class_names"] == list(COLORS)
    assert card["recipe"]["task"]["dataset"] == "photos"
    assert result["test_accuracy"] > 0.8


def test_run_is_scored_where_its_folder_lies_now(run, tmp_path, capsys):
    shutil.copytree(run.parent / "photos", tmp_path / "photos")
    evaluate.main([str(run), "--data-dir", str(tmp_path)])
    _, accuracy, loss = capsys.readouterr().out.splitlines()
    for line in (accuracy, loss):
        scored, recorded = re.findall(r"\d\.\d{4}", line)
        assert scored == recorded


def test_folder_with_other_classes_is_not_scored(run, tmp_path, capsys):
    fill(tmp_path / "photos", 2, ["grass", "sea"])
    line = refusal(capsys, evaluate.main, run, "--data-dir", tmp_path)
    assert f"{run} was trained on other classes" in line


def test_exported_model_resizes_files_as_the_training_does(run, tmp_path):
    signatures = tf.saved_model.load(run / "export" / "1").signatures
    files = []
    for i, size in enumerate([(300, 200), (8, 8), (5, 40)]):
        picture(COLORS["sea"], size).save(tmp_path / f"{i}.png")
        files.append((tmp_path / f"{i}.png").read_bytes())
    found = signatures["encoded"](image_bytes=tf.constant(files))
    images = np.stack([decode_picture(file, 3, 8) for file in files])
    expected = export.load(run)(images)
    np.testing.assert_allclose(found["predictions"], expected, atol=1e-5)
    assert set(found["class_name"].numpy()) == {b"sea"}


def page_blocks(language):
    page = (ROOT / "docs" / "own-data.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def test_commands_of_the_guide_have_the_flags_of_the_program():
    commands = [c for c in page_blocks("sh") if "training.train" in c]
    assert commands
    for command in "".join(commands).replace("\\\n", "").splitlines():
        if "training.train" in command:
            train.parse(command.partition("training.train")[2].split())


@pytest.fixture
def server(run):
    """The REST interface of TensorFlow Serving, for the model of the run."""
    encoded = tf.saved_model.load(run / "export" / "1").signatures["encoded"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/models/photos:predict"
            size = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(size))
            assert request["signature_name"] == "encoded"
            files = [base64.b64decode(row["b64"]) for row in request["instances"]]
            names = encoded(image_bytes=tf.constant(files))["class_name"].numpy()
            rows = [{"class_name": name.decode()} for name in names]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"predictions": rows}).encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield f"127.0.0.1:{started.server_port}"
        started.shutdown()
        thread.join()


def test_curl_of_the_guide_is_answered_with_the_class(server, tmp_path):
    (command,) = [code for code in page_blocks("sh") if "localhost" in code]
    picture(COLORS["sunset"], (640, 480)).save(tmp_path / "picture.jpg")
    done = subprocess.run(
        ["bash", "-euc", command.replace("localhost:8501", server)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predictions"] == [{"class_name": "sunset"}]


def test_fifth_of_each_class_is_for_the_test_with_every_seed(photos):
    images = load(photos, seed=1)
    assert np.bincount(images.train_labels).tolist() == [4, 4, 4]
    assert np.bincount(images.test_labels).tolist() == [1, 1, 1]
    again = load(photos, seed=2)
    np.testing.assert_array_equal(images.train_images, again.train_images)
    np.testing.assert_array_equal(images.test_images, again.test_images)


def test_class_of_one_example_has_none_for_the_test():
    assert held_out(np.array([0, 1, 1, 2])).sum() == 1
    assert not held_out(np.array([0, 1, 1, 2]))[[0, 3]].any()


@pytest.mark.parametrize("name", ["test", "validation", "val"])
def test_pictures_of_a_test_folder_are_those_of_the_test(tmp_path, name):
    fill(tmp_path / "train", 3)
    fill(tmp_path / name, 2, ["sea", "sunset"])
    images = load(tmp_path)
    assert images.class_names == list(COLORS)
    assert np.bincount(images.train_labels).tolist() == [3, 3, 3]
    assert images.test_labels.tolist() == [1, 1, 2, 2]
    file = (tmp_path / name / "sea" / "0.jpg").read_bytes()
    np.testing.assert_array_equal(images.test_images[0], decode_picture(file, 3, 8))


def test_folder_train_without_test_is_divided(tmp_path):
    fill(tmp_path / "train")
    assert len(load(tmp_path).test_images) == 3


def test_class_can_be_called_train(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "sea").rename(tmp_path / "train")
    assert load(tmp_path).class_names == ["grass", "sunset", "train"]


@pytest.mark.parametrize(
    "mode, ending",
    [
        ("L", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("1", "png"),
        ("I;16", "png"),
        ("P", "gif"),
        ("RGB", "bmp"),
        ("RGB", "webp"),
    ],
)
def test_picture_of_every_kind_becomes_an_image_in_color(tmp_path, mode, ending):
    fill(tmp_path, 2)
    gray = np.linspace(0, 255, 35).reshape(5, 7)
    if mode == "I;16":
        image = Image.fromarray((257 * gray).astype(np.uint16))
    else:
        image = Image.fromarray(gray.astype(np.uint8)).convert(mode)
    image.save(tmp_path / "sea" / f"picture.{ending}")
    images = load(tmp_path)
    assert images.image_shape == (8, 8, 3)
    assert len(images.train_images) + len(images.test_images) == 7
    found = decode_picture((tmp_path / "sea" / f"picture.{ending}").read_bytes(), 3)
    assert found.shape == (5, 7, 3)
    if mode != "1":
        difference = found.numpy().astype(float) - gray[..., np.newaxis]
        # JPEG and the palette of a GIF are not exact.
        assert abs(difference).mean() < 20


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (8, 8), (1000, 700)])
def test_picture_of_any_size_is_resized_as_a_whole(tmp_path, size):
    picture((100, 150, 200), size).save(tmp_path / "picture.png")
    image = decode_picture((tmp_path / "picture.png").read_bytes(), 3, 8).numpy()
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    np.testing.assert_allclose(image.mean(axis=(0, 1)), [100, 150, 200], atol=31)
    if size == (8, 8):
        np.testing.assert_array_equal(image, np.array(picture((100, 150, 200), size)))
    if size == (1000, 700):  # Each pixel is the mean of thousands.
        assert image.std(axis=(0, 1)).max() < 1


def test_pictures_of_one_size_need_no_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture((9, 9, 9), (6, 4)).save(tmp_path / name / f"{i}.png")
    assert load(tmp_path, image_size=None).image_shape == (4, 6, 3)


def test_hidden_files_and_those_of_the_system_are_ignored(photos):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (photos / "sea" / name).write_text("no picture")
    (photos / ".cache").mkdir()
    (photos / "LICENSE").write_text("no class")
    images = load(photos)
    assert len(images.train_images) + len(images.test_images) == 15
    assert images.class_names == list(COLORS)


def test_damaged_pictures_are_left_out_and_counted_where_that_is_asked_for(
    photos, capsys
):
    whole = load(photos)
    for path in (photos / "sea" / "1.png", photos / "sunset" / "0.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    images = load(photos, skip_corrupt=True)
    total = len(whole.train_images) + len(whole.test_images)
    assert len(images.train_images) + len(images.test_images) == total - 2
    assert [text.split(":")[0] for text in images.corrupt] == [
        str(photos / "sea" / "1.png"),
        str(photos / "sunset" / "0.jpg"),
    ]
    assert capsys.readouterr().err.count("Skipping") == 2
    assert data.failure(images) is None


def refusal(capsys, main, *argv):
    """Runs a program that has to refuse, and returns its line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("\n") and err.count("\n") == 1
    return err


def add_text(photos):
    (photos / "sea" / "notes.txt").write_text("the sea is blue")


def cut_a_png(photos):
    path = photos / "sea" / "1.png"
    path.write_bytes(path.read_bytes()[:-200])


def cut_a_jpeg(photos):
    path = photos / "sea" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def empty_a_file(photos):
    (photos / "sea" / "0.jpg").write_bytes(b"")


def add_a_folder(photos):
    (photos / "sea" / "more").mkdir()


def add_a_pipe(photos):
    os.mkfifo(photos / "sea" / "pipe")


def empty_a_class(photos):
    shutil.rmtree(photos / "sea")
    (photos / "sea").mkdir()
    (photos / "sea" / ".DS_Store").write_text("")


def add_a_class_to_the_test(photos):
    for name in ("train", "test"):
        fill(photos / name, 2, ["sea", "sunset"])
    (photos / "test" / "sea").rename(photos / "test" / "see")


def empty_the_test(photos):
    fill(photos / "train", 2)
    (photos / "test").mkdir()


def leave_one_class(photos):
    shutil.rmtree(photos / "sea")
    shutil.rmtree(photos / "grass")


def leave_one_picture_a_class(photos):
    for name in COLORS:
        for path in sorted((photos / name).iterdir())[1:]:
            path.unlink()


def remove_all(photos):
    shutil.rmtree(photos)


def nothing(photos):
    pass


@pytest.mark.parametrize(
    "change, flags, hint",
    [
        (add_text, "", "1 of 16 files .*sea/notes.txt: Unknown image file format"),
        (cut_a_png, "", "sea/1.png: Invalid PNG data"),
        (cut_a_jpeg, "", "sea/0.jpg: .*Invalid JPEG data.*--skip-corrupt"),
        (empty_a_file, "", "sea/0.jpg: Input is empty"),
        (add_a_folder, "", "sea/more: is no file"),
        (add_a_pipe, "", "sea/pipe: is no file"),
        (empty_a_class, "", "photos/sea: expected pictures of this class, found none"),
        (add_a_class_to_the_test, "", "test/see: expected one of the training classes"),
        (empty_the_test, "", "photos/test: expected pictures for the test"),
        (leave_one_class, "", "two or more classes, found 1;"),
        (leave_one_picture_a_class, "", "photos: expected pictures for the test"),
        (remove_all, "", "expected a data set of TFDS or a folder of pictures"),
        (nothing, "--classes 4", "classes=4, but .*photos has 3; use --classes 3"),
        (nothing, "--global-batch-size 13", "more than the 12 training images"),
        (nothing, "--recipe digits_revnet", "--image-size"),
    ],
)
def test_mistake_in_a_folder_is_named_in_one_line_and_begins_no_run(
    photos, change, flags, hint, capsys
):
    change(photos)
    run_dir = photos.with_name("run")
    where = ["--run-dir", run_dir, "--dataset", photos]
    if "digits" not in flags:
        where += TINY
    line = refusal(capsys, train.main, *where, *flags.split())
    assert re.search(hint, line), line
    assert not run_dir.exists()


def test_class_without_any_good_picture_is_named_with_skip_corrupt(photos):
    for path in (photos / "sea").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="sea: expected a picture that can be read"):
        load(photos, skip_corrupt=True)


def test_sizes_that_differ_are_named_without_image_size(photos):
    with pytest.raises(ValueError) as error:
        load(photos, image_size=None)
    first, second = photos / "grass" / "0.jpg", photos / "grass" / "1.png"
    assert str(error.value) == (
        f"expected pictures of one size, found 21x53 in {second} and 12x60 in {first}; "
        "give --image-size."
    )


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Made-up copies of two data sets of TFDS that no recipe names."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder, rng = tmp_path_factory.mktemp("tfds"), np.random.default_rng(0)

    def examples(size, shape, classes):
        images = (rng.integers(0, 256, shape(), dtype=np.uint8) for _ in range(size))
        return [(i, {"image": x, "label": i % classes}) for i, x in enumerate(images)]

    def store(name, image_shape, class_names, **splits):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="3.0.1",
            data_dir=folder,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=image_shape),
                    "label": tfds.features.ClassLabel(names=class_names),
                }
            ),
            split_datasets=splits,
            disable_shuffling=True,
        )

    digits = {name: examples(20, lambda: (28, 28, 1), 10) for name in ("train", "test")}
    store("mnist", (28, 28, 1), list("0123456789"), **digits)
    flowers = ["dandelion", "daisy", "tulips", "sunflowers", "roses"]
    photos = examples(25, lambda: (*rng.integers(9, 50, 2), 3), 5)
    store("tf_flowers", (None, None, 3), flowers, train=photos)
    return folder


def test_data_set_that_no_recipe_names_is_read_by_its_name(tfds_dir):
    recipe = RECIPES["digits_revnet"].replace(dataset="mnist")
    images = data.load(recipe, tfds_dir)
    assert images.train_images.shape == images.test_images.shape == (20, 28, 28, 1)
    assert images.class_names == list("0123456789")
    small = data.load(recipe.replace(image_size=14), tfds_dir)
    assert small.image_shape == (14, 14, 1)


def test_data_set_without_test_images_is_divided_and_resized(tfds_dir):
    images = data.load(RECIPE.replace(dataset="tf_flowers"), tfds_dir)
    assert images.train_images.shape == (20, 8, 8, 3)
    assert images.test_images.shape == (5, 8, 8, 3)
    assert sorted(images.test_labels) == list(range(5))
    assert images.class_names[2] == "tulips"


@pytest.mark.parametrize(
    "dataset, hint",
    [
        (
            "imdb_reviews",
            "expected images with the features image .* found text, label",
        ),
        ("mnist/letters", r"dataset=mnist/letters: expected one .*\(none\)"),
        ("emnist/leters", "byclass, bymerge, balanced, letters, digits, mnist"),
        ("mnits", "found no folder .*mnits; did you mean mnist"),
        (
            "tf_flowers",
            "images of tf_flowers have several sizes; give --image-size",
        ),
    ],
)
def test_data_set_that_does_not_fit_is_named(dataset, hint, tfds_dir):
    recipe = RECIPES["digits_revnet"].replace(dataset=dataset)
    with pytest.raises((ValueError, OSError), match=hint):
        data.load(recipe, tfds_dir)


def test_folder_with_the_name_of_a_data_set_is_given_by_a_path(tmp_path, monkeypatch):
    fill(tmp_path / "mnist", 2)
    monkeypatch.chdir(tmp_path)
    assert load("./mnist").class_names == list(COLORS)
