"""`recipe.json`: runs of older versions resume, and damaged files are named."""

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
OPTIONAL = (
    "pad flip test_in_mean schedule decay_steps warmup_steps momentum recompute "
    "fraction_bits seed precision jit deterministic"
).split()
REQUIRED = [key for key in json.loads(OLD) if key not in (*OPTIONAL, "versions")]


def check_free(run_dir, *flags):
    """What the program does first, with the folder and with its flags."""
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


def test_run_of_an_older_version_goes_on(tmp_path):
    check_free(begun(tmp_path, OLD), *FLAGS)
    _, _, recipe, _ = train.parse(FLAGS)
    assert runs.recipe_of(tmp_path) == recipe


@pytest.mark.parametrize("field", OPTIONAL)
def test_run_that_is_older_than_a_field_goes_on_with_its_default(field, tmp_path):
    content = json.loads(OLD)
    del content[field]
    # The two whose values are not the defaults.
    flags = {"pad": ["--pad", "0"], "decay_steps": ["--decay-steps"]}.get(field, [])
    check_free(begun(tmp_path, json.dumps(content)), *FLAGS, *flags)


@pytest.mark.parametrize("field", REQUIRED)
def test_required_field_that_is_missing_is_named_with_the_file(field, tmp_path, capsys):
    content = json.loads(OLD)
    del content[field]
    begun(tmp_path, json.dumps(content))
    line = error_line(capsys, train.main, "--run-dir", tmp_path, *FLAGS)
    assert f"{tmp_path / 'recipe.json'} is damaged: " in line
    assert f"'{field}'" in line and "is missing" in line


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
    (tmp_path / "result.json").write_text('{"test_accuracy": 1, "test_loss": 0}')
    line = error_line(capsys, main, tmp_path)
    assert f"{tmp_path / 'recipe.json'} is damaged: " in line


def test_field_that_differs_is_named(tmp_path):
    begun(tmp_path, OLD)
    with pytest.raises(FileExistsError, match="unfinished run with seed=0, not 1"):
        check_free(tmp_path, *FLAGS, "--seed", "1")
    with pytest.raises(FileExistsError, match="recipe='digits_revnet', not 'cifar10"):
        check_free(tmp_path, "--recipe", "cifar10_revnet38")
