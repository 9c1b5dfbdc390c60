"""A run folder as a start of the program finds it."""

import contextlib
import errno
import fcntl
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tensorflow as tf

from training import data, fit, outputs, runs, train
from training.checkpoints import Checkpoints
from training.recipes import RECIPES

RECIPE = RECIPES["digits_revnet"].replace(
    train_steps=17, decay_steps=(), global_batch_size=200
)
COLUMNS = fit.columns(["loss", "accuracy"])
# The table is a row ahead of the last checkpoint.
ROWS = [
    dict.fromkeys(COLUMNS, 0.5) | {"epoch": i, "step": 7 * i, "peak_memory_mib": 9}
    for i in (1, 2)
]


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run with a checkpoint at step 7."""
    recipe = runs.describe("digits_revnet", RECIPE) | {"run": "this"}
    outputs.write_json(tmp_path / "recipe.json", recipe)
    record = {"run": "this", "step": 7, "rows": ROWS[:1]}
    checkpoints_in(tmp_path).save(7, record)
    outputs.write_table(tmp_path / "metrics.csv", ROWS)
    return tmp_path


def checkpoints_in(run_dir):
    return Checkpoints(run_dir / "checkpoints", variable=tf.Variable(0.0))


def resumed(run_dir):
    images = types.SimpleNamespace(steps_per_epoch=lambda _: 7, class_names=[])
    progress, _ = fit.resume(checkpoints_in(run_dir), [], RECIPE, images, run_dir)
    assert progress.step == 7
    return progress.rows


def age(run_dir):
    """Changes the run to a run of a version without identifiers and records."""
    (run_dir / "checkpoints" / "step-7" / "record.json").unlink()
    outputs.write_json(run_dir / "recipe.json", runs.describe("digits_revnet", RECIPE))


@pytest.mark.parametrize("version", ["this", "older"])
def test_run_goes_on_with_the_rows_up_to_its_checkpoint(version, run_dir, capsys):
    if version == "older":
        age(run_dir)
    assert resumed(run_dir) == ROWS[:1]
    assert outputs.read_own_table(run_dir / "metrics.csv", COLUMNS) == ROWS[:1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("table", [None, "epoch;step\n1;7\n"], ids=["none", "damaged"])
def test_rows_do_not_depend_on_the_table(table, run_dir):
    (run_dir / "metrics.csv").unlink()
    if table:
        (run_dir / "metrics.csv").write_text(table)
    assert resumed(run_dir) == ROWS[:1]
    assert outputs.read_own_table(run_dir / "metrics.csv", COLUMNS) == ROWS[:1]
    assert (run_dir / "metrics-damaged-1.csv").exists() == bool(table)


def test_run_of_an_older_version_goes_on_without_the_rows_of_a_damaged_table(run_dir):
    age(run_dir)
    (run_dir / "metrics.csv").write_text("epoch;step\n1;7\n")
    assert resumed(run_dir) == []
    assert (run_dir / "metrics-damaged-1.csv").exists()


def test_parts_that_a_killed_process_was_writing_are_removed(run_dir):
    (run_dir / "part-12-metrics.csv").write_text("epoch")
    (run_dir / "checkpoints" / "part-12-step-9").mkdir()
    resumed(run_dir)
    assert not list(run_dir.rglob("part-*"))


FLAGS = "--train-steps 17 --decay-steps --global-batch-size 200".split()


def refusal(run_dir, capsys):
    """Runs the program, which has to refuse before it writes anything but the lock."""

    def listing():
        times = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        times.pop(run_dir / "lock", None)
        return times

    before = listing()
    with pytest.raises(SystemExit) as exit_:
        train.main(["--run-dir", str(run_dir), *FLAGS])
    assert exit_.value.code == 2
    assert listing() == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def marked(record):
    """Returns a function that plants a checkpoint with a record at step 14."""

    def plant(run_dir):
        checkpoints_in(run_dir).save(14, record)
        if record is None:
            (run_dir / "checkpoints" / "step-14" / "record.json").unlink()

    return plant


def renamed(run_dir):
    folder = run_dir / "checkpoints"
    (folder / "step-7").rename(folder / "step-14")


def beyond_the_end(run_dir):
    checkpoints_in(run_dir).save(18, {"run": "this", "step": 18, "rows": []})


def without_a_mark_beyond_the_end(run_dir):
    age(run_dir)
    checkpoints_in(run_dir).save(18, {})


def with_a_mark_in_an_older_run(run_dir):
    age(run_dir)
    marked({"run": "other", "step": 14})(run_dir)


@pytest.mark.parametrize(
    "plant, step",
    [
        (marked({"run": "other", "step": 14, "rows": []}), 14),
        (marked({}), 14),
        (marked(None), 14),
        (renamed, 14),
        (beyond_the_end, 18),
        (without_a_mark_beyond_the_end, 18),
        (with_a_mark_in_an_older_run, 14),
    ],
    ids=["other", "empty", "none", "renamed", "beyond", "old beyond", "old other"],
)
def test_checkpoint_of_another_run_is_refused(plant, step, run_dir, capsys):
    plant(run_dir)
    path = run_dir / "checkpoints" / f"step-{step}"
    expected = f"{path} is not a checkpoint of the run in {run_dir}; remove it"
    assert expected in refusal(run_dir, capsys)


def test_checkpoint_of_the_run_is_accepted(run_dir):
    runs.check_checkpoints(run_dir, 17)
    marked({"run": "this", "step": 14})(run_dir)
    runs.check_checkpoints(run_dir, 17)


def test_checkpoints_of_an_older_version_are_accepted_in_its_run(run_dir):
    age(run_dir)
    runs.check_checkpoints(run_dir, 17)
    # This version goes on with the run, which has no identifier.
    marked({"run": None, "step": 14})(run_dir)
    runs.check_checkpoints(run_dir, 17)


def test_damaged_record_is_not_of_another_run(run_dir):
    (run_dir / "checkpoints" / "step-7" / "record.json").write_text("{")
    runs.check_checkpoints(run_dir, 17)


def test_second_process_in_a_run_folder_is_refused(run_dir, capsys):
    with runs.locked(run_dir):
        assert f"{run_dir} is in use by another process" in refusal(run_dir, capsys)


def test_run_that_another_process_begins_meanwhile_is_refused(
    tmp_path, capsys, monkeypatch
):
    with contextlib.ExitStack() as stack:
        load = data.load

        def begin(*args, **kwargs):
            stack.enter_context(runs.locked(tmp_path))
            return load(*args, **kwargs)

        monkeypatch.setattr(data, "load", begin)
        assert f"{tmp_path} is in use by another process" in refusal(tmp_path, capsys)


def test_run_that_another_process_ends_meanwhile_is_refused(
    run_dir, capsys, monkeypatch
):
    locked = runs.locked

    def end(run_dir):
        (run_dir / "result.json").write_text("{}")
        return locked(run_dir)

    monkeypatch.setattr(runs, "locked", end)
    with pytest.raises(SystemExit):
        train.main(["--run-dir", str(run_dir), *FLAGS])
    assert f"{run_dir} holds a finished run" in capsys.readouterr().err


def test_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time, pathlib; from training import runs\n"
        "with runs.locked(pathlib.Path(sys.argv[1])): print('locked'); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, tmp_path],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(FileExistsError, match="in use by another process"):
            with runs.locked(tmp_path):
                pass
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with runs.locked(tmp_path):
        pass


def test_file_system_without_locks_is_used_with_a_line(tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with runs.locked(tmp_path):
        pass
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path} cannot be locked (No locks available); start no")
    assert err.count("\n") == 1


def test_start_that_was_killed_leaves_a_free_folder(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "part-12-recipe.json").write_text("{")
    runs.check_free(tmp_path, {})
