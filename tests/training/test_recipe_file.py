"""`recipe.json`: runs of older versions resume, and damaged files are named."""

import copy
import functools
import json
import zipfile

import pytest

from training import evaluate, export, runs, train

# As written before recipes had parts, for the command `training.train` with FLAGS.
FLAGS = "--train-steps 20 --decay-steps 8".split()
OLD = """{
  "recipe": "digits_revnet",
  "dataset": "digits",
  "classes": 10,
  "reversible": true,
  "num_blocks": [
    2,
    2
  ],
  "channels": [
    32,
    32,
    64
  ],
  "bottleneck": false,
  "global_batch_size": 50,
  "learning_rate": 0.1,
  "train_steps": 20,
  "weight_decay": 0.0002,
  "pad": 1,
  "flip": false,
  "test_in_mean": false,
  "schedule": "piecewise",
  "decay_steps": [
    8
  ],
  "warmup_steps": 0,
  "momentum": 0.9,
  "recompute": true,
  "fraction_bits": null,
  "seed": 0,
  "precision": "float32",
  "jit": null,
  "deterministic": false,
  "versions": {
    "python": "3.11.7",
    "tensorflow": "2.21.0",
    "keras": "3.15.1",
    "numpy": "2.4.6"
  }
}
"""
NEW = """{
  "recipe": "digits_revnet",
  "network": {
    "kind": "RevNet",
    "num_blocks": [2, 2],
    "channels": [32, 32, 64],
    "bottleneck": false,
    "recompute": true,
    "fraction_bits": null
  },
  "task": {
    "kind": "SmallImageClassification",
    "dataset": "digits",
    "classes": 10,
    "image_size": null,
    "pad": 1,
    "flip": false,
    "test_in_mean": false,
    "standardize": false
  },
  "optimizer": {
    "kind": "SGD",
    "weight_decay": 0.0002,
    "momentum": 0.9
  },
  "schedule": {
    "kind": "Piecewise",
    "learning_rate": 0.1,
    "decay_steps": [8],
    "decay_factor": 0.1
  },
  "global_batch_size": 50,
  "train_steps": 20,
  "seed": 0,
  "precision": "float32",
  "jit": null,
  "deterministic": false,
  "versions": {
    "python": "3.11.7",
    "tensorflow": "2.21.0",
    "keras": "3.15.1",
    "numpy": "2.4.6"
  }
}
"""
OPTIONAL = (
    "pad flip test_in_mean schedule decay_steps warmup_steps momentum recompute "
    "image_size fraction_bits seed precision jit deterministic standardize decay_factor"
).split()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Replaces the reset of Keras, which these many short tests do not need."""


def fields(content):
    """Returns the path of every field of a file: one key, or a part and a key."""
    for key, value in content.items():
        if key != "versions":
            yield (key,)
            if isinstance(value, dict):
                yield from ((key, inner) for inner in value)


FILES = {"old": json.loads(OLD), "new": json.loads(NEW)}
OPTIONAL_FIELDS, REQUIRED_FIELDS = (
    [
        pytest.param(version, path, id=f"{version}-{'.'.join(path)}")
        for version, content in FILES.items()
        for path in fields(content)
        # In a new file, `schedule` is the object of a part, not a field.
        if (path[-1] in OPTIONAL and (version, path) != ("new", ("schedule",)))
        == wanted
    ]
    for wanted in (True, False)
)


def without(version, path):
    """Returns the text of a file without one of its fields."""
    content = copy.deepcopy(FILES[version])
    *parts, field = path
    del functools.reduce(dict.get, parts, content)[field]
    return json.dumps(content)


def check_free(run_dir, *flags):
    """Checks the folder and the flags, as the program does first."""
    _, name, recipe, _ = train.parse(flags)
    runs.check_free(run_dir, runs.describe(name, recipe))


def begun(run_dir, text):
    """Returns a run folder with this `recipe.json`."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "recipe.json").write_text(text)
    return run_dir


def error_line(capsys, main, *argv):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("text", [OLD, NEW])
def test_run_of_an_older_version_goes_on(text, tmp_path):
    check_free(begun(tmp_path, text), *FLAGS)
    _, _, recipe, _ = train.parse(FLAGS)
    assert runs.recipe_of(tmp_path) == recipe


@pytest.mark.parametrize(
    "flags, old",
    [
        (
            "--recipe imagenet_resnet50",
            {
                "recipe": "imagenet_resnet50",
                "dataset": "imagenet2012",
                "classes": 1000,
                "reversible": False,
                "num_blocks": [3, 4, 6, 3],
                "channels": [64, 64, 128, 256, 512],
                "bottleneck": True,
                "global_batch_size": 256,
                "train_steps": 600_000,
                "weight_decay": 1e-4,
                "pad": 0,
                "decay_steps": [160_000, 320_000, 480_000],
            },
        ),
        (
            "--schedule cosine --warmup-steps 9 --train-steps 20 --fraction-bits 14",
            {
                "schedule": "cosine",
                "decay_steps": [],
                "warmup_steps": 9,
                "fraction_bits": 14,
            },
        ),
        # A ResNet had a field that this version removed.
        ("--no-reversible", {"reversible": False, "recompute": False}),
    ],
)
def test_older_run_of_every_network_task_and_schedule_goes_on(flags, old, tmp_path):
    flags = flags.split()
    if "--recipe" not in flags and "--schedule" not in flags:
        flags += FLAGS
    check_free(begun(tmp_path, json.dumps(json.loads(OLD) | old)), *flags)


def test_file_of_a_new_run_has_an_object_for_each_part():
    _, name, recipe, _ = train.parse(FLAGS)
    written = json.loads(json.dumps(runs.describe(name, recipe)))
    assert written.pop("versions").keys() == FILES["new"]["versions"].keys()
    expected = {k: v for k, v in FILES["new"].items() if k != "versions"}
    assert list(written.items()) == list(expected.items())


@pytest.mark.parametrize("version, path", OPTIONAL_FIELDS)
def test_run_that_is_older_than_a_field_goes_on_with_its_default(
    version, path, tmp_path
):
    # The values of these two fields are not the defaults.
    flags = {"pad": ["--pad", "0"], "decay_steps": ["--decay-steps"]}.get(path[-1], [])
    check_free(begun(tmp_path, without(version, path)), *FLAGS, *flags)


@pytest.mark.parametrize("version, path", REQUIRED_FIELDS)
def test_required_field_that_is_missing_is_named_with_the_file(
    version, path, tmp_path, capsys
):
    begun(tmp_path, without(version, path))
    line = error_line(capsys, train.main, "--run-dir", tmp_path, *FLAGS)
    assert f"{tmp_path / 'recipe.json'} is damaged: " in line
    for name in path:
        assert name in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[1, 2]",
        "null",
        "3",
        '"digits_revnet"',
        100_000 * "[",
        OLD[: len(OLD) // 2],
        OLD.replace('"seed": 0', '"seed": "zero"'),
        OLD.replace('"seed": 0', '"seed": 1.5'),
        OLD.replace('"seed": 0', '"seed": true'),
        OLD.replace('"seed": 0', '"seed": ' + 5000 * "9"),
        OLD.replace('"seed": 0', '"sead": 0'),
        OLD.replace('"digits"', "null"),
        OLD.replace('"digits"', '["digits"]'),
        OLD.replace("0.1", "NaN"),
        OLD.replace("0.1", "1e999"),
        OLD.replace("0.1", "null"),
        OLD.replace('"num_blocks": [', '"num_blocks": [[1],'),
        OLD.replace('"num_blocks": [', '"num_blocks": ["a",'),
        OLD.replace('"num_blocks": [', '"num_blocks": 2, "decay_steps": ['),
        OLD.replace('"flip": false', '"flip": 0'),
        OLD.replace('"digits_revnet"', "null"),
        NEW.replace('"RevNet"', '"revnet"'),
        NEW.replace('"RevNet"', '["RevNet"]'),
        NEW.replace('"RevNet"', '"SGD"'),
        NEW.replace('"kind": "RevNet"', '"kind": "ResNet"'),
        NEW.replace('"momentum"', '"momentun"'),
        NEW.replace('"digits",', '"imagenet2012",'),
        NEW.replace('"network": {', '"network": 3, "net": {'),
        NEW.replace("[32, 32, 64]", "[[32], 32, 64]"),
        NEW.replace('"seed"', '"sead"'),
        b"\xff\xfe{}",
    ],
)
def test_damaged_file_is_named_in_one_line(text, tmp_path, capsys):
    begun(tmp_path, "")
    path = tmp_path / "recipe.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = error_line(capsys, train.main, "--run-dir", tmp_path, *FLAGS)
    assert f"{path} is damaged: " in line and len(line) < 600
    assert path.exists()


@pytest.mark.parametrize("main", [evaluate.main, export.main])
def test_damaged_file_of_a_finished_run_is_named(main, tmp_path, capsys):
    begun(tmp_path, "[]")
    zipfile.ZipFile(tmp_path / "model.keras", "w").close()
    result = {"test_accuracy": 1, "test_loss": 0, "class_names": []}
    (tmp_path / "result.json").write_text(json.dumps(result))
    line = error_line(capsys, main, tmp_path)
    assert f"{tmp_path / 'recipe.json'} is damaged: " in line


def test_field_that_differs_is_named(tmp_path):
    begun(tmp_path, OLD)
    with pytest.raises(FileExistsError, match="unfinished run with seed=0, not 1"):
        check_free(tmp_path, *FLAGS, "--seed", "1")
    with pytest.raises(FileExistsError, match="recipe='digits_revnet', not 'cifar10"):
        check_free(tmp_path, "--recipe", "cifar10_revnet38")
