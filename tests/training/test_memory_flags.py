"""`--memory-report` and `--memory-budget` of the training program."""

import argparse
import re

import keras
import numpy as np
import pytest

from training import export, train

TINY = (
    "--num-blocks 2 2 --channels 8 8 16 --global-batch-size 200 --train-steps 2 "
    "--seed 3"
).split()


@pytest.fixture(autouse=True)
def unexported(monkeypatch):
    monkeypatch.setattr(export, "export", lambda *_: None)


def trained(run_dir, *flags):
    train.main(["--run-dir", str(run_dir), *TINY, *flags])
    network = keras.models.load_model(run_dir / "model.keras").layers[-2]
    return network, [
        block.recompute
        for layer in network.layers
        if hasattr(layer, "recompute")
        for block in getattr(layer, "blocks", [layer])
    ]


def test_report_comes_before_training_and_changes_nothing_in_it(tmp_path, capsys):
    plain, _ = trained(tmp_path / "plain")
    capsys.readouterr()
    reported, recomputed = trained(tmp_path / "reported", "--memory-report")
    out = capsys.readouterr().out
    assert re.search(r"peak of a training step +\d+\.\d\d MB", out)
    assert out.index("peak of a training step") < out.index("test accuracy")
    assert all(recomputed)
    for a, b in zip(plain.get_weights(), reported.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_budget_decides_what_is_recomputed(tmp_path):
    _, recomputed = trained(tmp_path / "large", "--memory-budget", "1GiB")
    assert recomputed == [False] * len(recomputed)


def test_budget_that_is_too_small_is_refused_before_a_run_begins(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        trained(tmp_path / "small", "--memory-budget", "10kB")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "below the minimum" in error and error.count("\n") == 1
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("6GiB", 6 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 GB", 15 * 10**8),
        ("1e9", 10**9),
    ],
)
def test_sizes(text, expected):
    assert train.size(text) == expected


@pytest.mark.parametrize("text", ["", "6G", "GiB", "six", "6 GiBs", "1..2MB", "-1MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write it as 6GiB"):
        train.size(text)
