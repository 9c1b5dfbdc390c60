"""A run folder as a start of the program finds it."""

import dataclasses
import types

import pytest
import tensorflow as tf

from training import fit, outputs
from training.checkpoints import Checkpoints
from training.recipes import RECIPES

RECIPE = dataclasses.replace(
    RECIPES["digits_revnet"], train_steps=17, decay_steps=(), global_batch_size=200
)
# The table is a row ahead of the last checkpoint.
ROWS = [
    dict.fromkeys(fit.METRICS, 0.5) | {"epoch": i, "step": 7 * i, "peak_memory_mib": 9}
    for i in (1, 2)
]


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run with a checkpoint at step 7."""
    checkpoints_in(tmp_path).save(7, {"step": 7, "rows": ROWS[:1]})
    outputs.write_table(tmp_path / "metrics.csv", ROWS)
    return tmp_path


def checkpoints_in(run_dir):
    return Checkpoints(run_dir / "checkpoints", variable=tf.Variable(0.0))


def resumed(run_dir):
    images = types.SimpleNamespace(steps_per_epoch=lambda batch_size: 7)
    progress, _ = fit.resume(checkpoints_in(run_dir), [], RECIPE, images, run_dir)
    assert progress.step == 7
    return progress.rows


def age(run_dir):
    """Makes the checkpoint one of a version that wrote no records."""
    (run_dir / "checkpoints" / "step-7" / "record.json").unlink()


@pytest.mark.parametrize("version", ["this", "older"])
def test_run_goes_on_with_the_rows_up_to_its_checkpoint(version, run_dir, capsys):
    if version == "older":
        age(run_dir)
    assert resumed(run_dir) == ROWS[:1]
    assert outputs.read_own_table(run_dir / "metrics.csv", fit.METRICS) == ROWS[:1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("table", [None, "epoch;step\n1;7\n"], ids=["none", "damaged"])
def test_rows_do_not_depend_on_the_table(table, run_dir):
    (run_dir / "metrics.csv").unlink()
    if table:
        (run_dir / "metrics.csv").write_text(table)
    assert resumed(run_dir) == ROWS[:1]
    assert outputs.read_own_table(run_dir / "metrics.csv", fit.METRICS) == ROWS[:1]
    assert (run_dir / "metrics-damaged-1.csv").exists() == bool(table)


def test_run_of_an_older_version_goes_on_without_the_rows_of_a_damaged_table(run_dir):
    age(run_dir)
    (run_dir / "metrics.csv").write_text("epoch;step\n1;7\n")
    assert resumed(run_dir) == []
    assert (run_dir / "metrics-damaged-1.csv").exists()
