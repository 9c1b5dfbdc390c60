import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from training import evaluate, export, fit, runs, train
from training.checkpoints import Checkpoints
from training.recipe import Task
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
# Epochs of 7 steps, and a last epoch of 3.
TINY = (
    "--num-blocks 1 --channels 8 8 --global-batch-size 200 --train-steps 17 "
    "--decay-steps 8 --flip --weight-decay 0.01"
).split()


def command(run_dir, *flags):
    return ["--run-dir", str(run_dir), *TINY, *flags]


def rows_of(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(run_dir):
    return keras.models.load_model(run_dir / "model.keras").get_weights()


def listing(folder):
    """Returns every path under a folder, with its time and a hash of its content."""
    return {
        path: (
            path.stat().st_mtime_ns,
            path.is_file() and hashlib.sha256(path.read_bytes()).digest(),
        )
        for path in [folder, *folder.rglob("*")]
    }


def refusal(capsys, program, *argv):
    """Runs a program that has to refuse, and returns its line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        program.main([str(word) for word in argv])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train.main(command(run_dir))
    return run_dir


@pytest.fixture
def unexported(monkeypatch):
    """Skips the export in tests of the training."""
    monkeypatch.setattr(export, "export", lambda *_: None)


class Interrupted(Exception):
    pass


@pytest.fixture
def unfinished_run(tmp_path, monkeypatch):
    """Returns a run that stopped in its second epoch, between row and checkpoint.

    The run was monitored. The monitor is no part of the recipe, so the run may resume
    without it.
    """
    run_dir = tmp_path / "unfinished"
    save = Checkpoints.save

    def interrupted_save(checkpoints, step, record):
        if step == 14:
            raise Interrupted
        return save(checkpoints, step, record)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted_save)
        with pytest.raises(Interrupted):
            train.main(command(run_dir, "--monitor", "3"))
    assert len(rows_of(run_dir)) == 2
    return run_dir


def test_finished_run_holds_its_files_and_no_others(finished_run):
    assert {path.name for path in finished_run.iterdir()} == {
        "lock",
        "recipe.json",
        "metrics.csv",
        "result.json",
        "curves.png",
        "checkpoints",
        "model.keras",
        "export",
    }
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished_run / "export" / "1" / "saved_model.pb").is_file()


def test_recipe_file_holds_every_field_as_it_was_resolved_and_versions(finished_run):
    found = json.loads((finished_run / "recipe.json").read_text())
    versions = found.pop("versions")
    assert found.pop("recipe") == "digits_revnet"
    assert re.fullmatch("[0-9a-f]{32}", found.pop("run"))
    assert found == {
        "network": {
            "kind": "RevNet",
            "num_blocks": [1],
            "channels": [8, 8],
            "bottleneck": False,
            "recompute": True,
            "fraction_bits": None,
        },
        "task": {
            "kind": "SmallImageClassification",
            "dataset": "digits",
            "classes": 10,
            "image_size": None,
            "pad": 1,
            "flip": True,
            "test_in_mean": False,
            "standardize": False,
        },
        "optimizer": {"kind": "SGD", "weight_decay": 0.01, "momentum": 0.9},
        "schedule": {
            "kind": "Piecewise",
            "learning_rate": 0.1,
            "decay_steps": [8],
            "decay_factor": 0.1,
        },
        "global_batch_size": 200,
        "train_steps": 17,
        "seed": 0,
        "precision": "float32",
        "jit": None,
        "deterministic": False,
    }
    assert versions["tensorflow"] == tf.__version__
    assert versions["keras"] == keras.__version__


def test_steps_are_exact_where_the_last_epoch_is_not_whole(finished_run):
    rows = rows_of(finished_run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["7", "14", "17"]
    assert [row["learning_rate"] for row in rows] == ["0.1", "0.01", "0.01"]
    assert json.loads((finished_run / "result.json").read_text())["steps"] == 17


@pytest.mark.thorough
def test_fewer_steps_than_an_epoch_are_exact_and_progress(
    tmp_path, unexported, monkeypatch
):
    progress = []

    @contextlib.contextmanager
    def watched(cluster):
        yield lambda batch, logs: progress.append(batch)

    monkeypatch.setattr(fit, "watched", watched)
    train.main(command(tmp_path, "--train-steps", "2"))
    assert [row["step"] for row in rows_of(tmp_path)] == ["2"]
    # Two steps, and two batches of 360 test images.
    assert progress == [0, 1, 0, 1]


def test_result_is_that_of_the_saved_model(finished_run):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images[..., None] * 255 / 16).astype("uint8")
    _, x, _, y = train_test_split(
        pixels, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    model = keras.models.load_model(finished_run / "model.keras")
    probabilities = model.predict(x, verbose=0).astype("float64")
    loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
    result = json.loads((finished_run / "result.json").read_text())
    accuracy = np.mean(probabilities.argmax(-1) == y)
    assert result["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    # The loss excludes the penalty, which is several times the tolerance.
    assert result["test_loss"] == pytest.approx(loss, rel=1e-4)
    last = rows_of(finished_run)[-1]
    assert float(last["test_loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(last["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    trainable = sum(weight.numpy().size for weight in model.trainable_weights)
    assert result["num_parameters"] == trainable
    assert result["recipe"] == "digits_revnet"
    assert result["train_seconds"] > 0


def test_saved_model_takes_images_as_they_are_and_gives_the_same_probabilities(
    finished_run,
):
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    serve = tf.saved_model.load(finished_run / "export" / "1").signatures[
        "serving_default"
    ]
    ((name, spec),) = serve.structured_input_signature[1].items()
    assert spec.dtype == tf.uint8
    outputs = serve(**{name: tf.constant(x)})
    expected = keras.models.load_model(finished_run / "model.keras")(x)
    np.testing.assert_allclose(outputs["predictions"], expected, atol=1e-5)
    np.testing.assert_allclose(tf.reduce_sum(expected, -1), 1, rtol=1e-5)


def test_saved_model_of_a_run_has_its_logits_features_and_card(finished_run):
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    path = finished_run / "export" / "1"
    signatures = tf.saved_model.load(path).signatures
    assert set(signatures) == {"serving_default", "logits", "features", "encoded"}
    model = keras.models.load_model(finished_run / "model.keras")
    logits = signatures["logits"](inputs=tf.constant(x))["logits"]
    np.testing.assert_allclose(tf.nn.softmax(logits), model(x), atol=1e-5)
    features = signatures["features"](inputs=tf.constant(x))["features"]
    dense = next(
        layer for layer in model._flatten_layers() if layer.name == "predictions"
    )
    np.testing.assert_allclose(dense(features), logits, rtol=1e-4, atol=1e-5)
    card = json.loads((path / "model_card.json").read_text())
    assert card["result"] == json.loads((finished_run / "result.json").read_text())
    assert card["recipe"] == json.loads((finished_run / "recipe.json").read_text())
    assert card["class_names"] == list("0123456789")


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    unfinished_run, finished_run, unexported, capsys
):
    # A spreadsheet has saved the table. The run does not depend on it.
    table = unfinished_run / "metrics.csv"
    table.write_text(table.read_text().replace(",", ";"), encoding="utf-8-sig")
    train.main(command(unfinished_run))
    out, err = capsys.readouterr()
    assert "Going on from step 7 of 17" in out
    assert err.count("metrics-damaged-1.csv\n") == 1
    # The order of sums in convolutions on several threads is not fixed.
    for resumed, straight in zip(
        weights_of(unfinished_run), weights_of(finished_run), strict=True
    ):
        np.testing.assert_allclose(resumed, straight, rtol=1e-4, atol=1e-5)
    rows, straight_rows = rows_of(unfinished_run), rows_of(finished_run)
    assert [row["step"] for row in rows] == ["7", "14", "17"]
    for row, straight in zip(rows, straight_rows, strict=True):
        assert row["learning_rate"] == straight["learning_rate"]
        for column in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert float(row[column]) == pytest.approx(float(straight[column]), 1e-3)


@pytest.mark.thorough
def test_monitored_run_goes_on_with_its_measurements(unfinished_run):
    train.main(command(unfinished_run, "--monitor", "4"))
    with (unfinished_run / "reversibility.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # The run resumed at step 7, and measured there, too.
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 7, 11, 15]
    assert all(0 < float(row["reconstruction_error"]) < 1e-5 for row in rows)
    assert all(0 < float(row["gradient_angle"]) < 0.1 for row in rows)
    assert all(row["block"].startswith("stage1/rev_block") for row in rows)
    assert (unfinished_run / "reversibility.png").exists()


@pytest.mark.parametrize("flags", ["--monitor 0", "--monitor 5 --no-recompute"])
def test_monitor_that_has_nothing_to_do_is_refused(flags, tmp_path, capsys):
    argv = command(tmp_path / "run", *flags.split())
    assert "monitor" in refusal(capsys, train, *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_run_stopped_between_training_and_result_is_finished(
    tmp_path, finished_run, monkeypatch
):
    def interrupted(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score", interrupted)
        with pytest.raises(Interrupted):
            train.main(command(tmp_path))
    assert not (tmp_path / "result.json").exists()
    train.main(command(tmp_path))
    assert (tmp_path / "result.json").is_file()
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["1"]
    assert [row["step"] for row in rows_of(tmp_path)] == ["7", "14", "17"]


def test_finished_run_is_refused_and_untouched(finished_run, capsys):
    before = listing(finished_run)
    line = refusal(capsys, train, *command(finished_run))
    assert f"{finished_run} holds a finished run" in line
    assert listing(finished_run) == before


def test_unfinished_run_of_another_recipe_is_refused_and_untouched(
    unfinished_run, capsys
):
    before = listing(unfinished_run)
    line = refusal(capsys, train, *command(unfinished_run, "--seed", "1"))
    assert "unfinished run with seed=0, not 1" in line
    assert listing(unfinished_run) == before


def test_folder_of_something_else_is_refused_and_untouched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    line = refusal(capsys, train, *command(tmp_path))
    assert f"{tmp_path} is not empty and is no run folder" in line
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--recipe digits_revnte", "did you mean digits_revnet?"),
        ("--recipe mnist", "use one of digits_revnet, cifar10_resnet32"),
        ("--learning-rat 0.1", "did you mean --learning-rate?"),
        ("--learning-rat=0.1", "did you mean --learning-rate?"),
        ("--zzz", "use one of -h"),
        ("--train-steps many", "argument --train-steps: invalid int value: 'many'"),
        ("--train-steps 0", "train_steps=0: use a number above 0"),
        ("--train-steps", "argument --train-steps: expected one argument"),
        ("--recompute False", "unexpected 'False'"),
        ("--dataset cifar11", "did you mean cifar10_1 or cifar10"),
        ("--strategy many", "use one of auto, single, mirrored, multiworker"),
        ("--strategy multiworker", "needs the environment variable TF_CONFIG"),
        ("--precision float16", "use one of float32, mixed_bfloat16, mixed_float16"),
        ("--save-every 0", "save_every=0: use a number above 0"),
        ("--num-blocks 1 2 3", "channels=(32, 32, 64): give the stem's channels"),
        ("--channels 33 33 33", "33"),
        ("--global-batch-size 2000", "1437 training images"),
    ],
)
def test_mistake_is_answered_in_one_line_and_begins_no_run(
    flags, hint, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    assert hint in refusal(capsys, train, "--run-dir", run_dir, *flags.split())
    assert not run_dir.exists()


def test_loss_that_is_not_finite_ends_the_run_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(command(tmp_path, "--learning-rate", "1e30"))
    assert exit_.value.code == 1
    assert "lower learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_worker_lost_before_the_training_is_one_line(tmp_path, capsys, monkeypatch):
    def lost(*_):
        message = "Collective ops is aborted by: Socket closed\nMore of it."
        raise tf.errors.UnavailableError(None, None, message)

    monkeypatch.setattr(fit, "build", lost)
    with pytest.raises(SystemExit) as exit_:
        train.main(command(tmp_path / "run"))
    assert exit_.value.code == 1
    err = capsys.readouterr().err
    assert err.endswith("has ended or cannot be reached: Socket closed\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error, status, hint",
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (tf.errors.UnknownError(None, None, "read-only"), 1, "read-only; when that is"),
    ],
)
def test_run_that_is_stopped_says_how_it_goes_on(
    error, status, hint, tmp_path, capsys, monkeypatch
):
    def stop(*_):
        raise error

    monkeypatch.setattr(fit, "fit", stop)
    with pytest.raises(SystemExit) as exit_:
        train.main(command(tmp_path))
    assert exit_.value.code == status
    err = capsys.readouterr().err
    assert hint in err and "goes on from the last checkpoint" in err
    assert err.count("\n") == 1


def test_run_dir_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "is a file; give another" in refusal(capsys, train, *command(run_dir))


def test_data_dir_that_is_no_folder_is_refused(tmp_path, capsys):
    flags = ["--recipe", "cifar10_revnet38", "--data-dir", tmp_path / "none"]
    line = refusal(capsys, train, "--run-dir", tmp_path / "run", *flags)
    assert "is no folder" in line
    assert not (tmp_path / "none").exists()


def test_evaluate_repeats_the_recorded_score(finished_run, capsys):
    evaluate.main([str(finished_run)])
    accuracy, loss = capsys.readouterr().out.splitlines()
    _, _, scored, _, recorded = accuracy.split()
    assert scored == recorded.rstrip(")")
    _, _, scored, _, recorded = loss.split()
    assert scored == recorded.rstrip(")")


@pytest.mark.thorough
def test_export_writes_the_next_version_or_to_output(finished_run, tmp_path, capsys):
    output = tmp_path / "elsewhere" / "7"
    with runs.locked(finished_run):  # by an export into the run folder
        export.main([str(finished_run), "--output", str(output)])
    assert (output / "saved_model.pb").is_file()
    export.main([str(finished_run)])
    second = finished_run / "export" / "2"
    assert (second / "saved_model.pb").is_file()
    assert capsys.readouterr().out.split() == [str(output), str(second)]
    for file_format in Task.formats:
        line = refusal(
            capsys, export, finished_run, "--output", output, "--format", file_format
        )
        assert f"output={output} exists" in line


def test_unknown_format_is_refused(finished_run, capsys):
    line = refusal(capsys, export, finished_run, "--format", "tflite")
    assert "did you mean litert?" in line


def test_missing_extra_is_one_line(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(SystemExit) as exit_:
        output = str(tmp_path / "model.onnx")
        export.main([str(finished_run), "--format", "onnx", "--output", output])
    assert exit_.value.code == 1
    err = capsys.readouterr().err
    assert "Install revnet-tf[onnx]" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file, damage, hint",
    [
        ("model.keras", Path.unlink, "No such file or directory"),
        ("model.keras", cut, "File is not a zip file"),
        ("model.keras", flip_a_bit, "model.weights.h5"),
        ("model.keras", lambda path: path.write_bytes(b""), "File is not a zip file"),
        ("result.json", cut, "is damaged: "),
        ("result.json", lambda path: path.write_text("[]"), "holds no JSON object"),
        ("result.json", lambda path: path.write_text("{}"), "has no "),
        ("result.json", lambda path: path.write_text("[" * 10**5), "recursion"),
    ],
)
def test_damaged_file_of_a_finished_run_is_named(
    file, damage, hint, finished_run, tmp_path, capsys
):
    for name in ("recipe.json", "result.json", "model.keras"):
        shutil.copy(finished_run / name, tmp_path)
    damage(tmp_path / file)
    for program in (evaluate, export):
        line = refusal(capsys, program, tmp_path)
        assert str(tmp_path / file) in line and hint in line


def test_file_of_another_program_is_no_model(finished_run, tmp_path, capsys):
    for name in ("recipe.json", "result.json"):
        shutil.copy(finished_run / name, tmp_path)
    shutil.make_archive(tmp_path / "model", "zip", finished_run, "recipe.json")
    (tmp_path / "model.zip").rename(tmp_path / "model.keras")
    for program in (evaluate, export):
        with pytest.raises(SystemExit) as exit_:
            program.main([str(tmp_path)])
        assert exit_.value.code == 1
        err = capsys.readouterr().err
        assert f"{tmp_path / 'model.keras'} cannot be loaded: " in err
        assert err.count("\n") == 1


def test_export_into_a_folder_in_use_is_refused(finished_run, capsys):
    with runs.locked(finished_run):
        line = refusal(capsys, export, finished_run)
    assert f"{finished_run} is in use by another process" in line


@pytest.mark.parametrize("character", "*?[\\")
def test_path_that_tensorflow_takes_for_a_pattern_is_refused(
    character, finished_run, tmp_path, capsys
):
    path = tmp_path / f"a{character}b" / "c"
    for program, argv in (
        (train, ["--run-dir", path]),
        (export, [finished_run, "--output", path]),
    ):
        line = refusal(capsys, program, *argv)
        assert f"{path} has {character}, with which TensorFlow cannot read" in line
    assert list(tmp_path.iterdir()) == []


def test_path_that_is_not_utf_8_is_refused(finished_run, tmp_path, capsys):
    path = tmp_path / "\udcff"
    for program, argv in (
        (train, ["--run-dir", path]),
        (evaluate, [path]),
        (export, [path]),
        (export, [finished_run, "--format", "onnx", "--output", path]),
    ):
        assert "udcff' is not UTF-8" in refusal(capsys, program, *argv)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_run_is_neither_scored_nor_exported(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text("{}")
    for program in (evaluate, export):
        assert "holds an unfinished run" in refusal(capsys, program, tmp_path)
        assert "is no run folder" in refusal(capsys, program, tmp_path / "none")


@pytest.mark.thorough
def test_every_step_counts_once_under_a_mirrored_strategy(tmp_path, finished_run, run):
    flags = command(tmp_path / "run", "--strategy", "mirrored")
    (done,) = run(*flags, devices=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 replica(s)" in done.stdout
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == ["7", "14", "17"]
    # BatchNorm sees half of the batch, so the runs are similar, not equal.
    straight = float(rows_of(finished_run)[-1]["train_loss"])
    assert float(rows[-1]["train_loss"]) == pytest.approx(straight, rel=0.2)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    last = float(rows[-1]["test_accuracy"])
    assert result["test_accuracy"] == pytest.approx(last, abs=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--train-steps", "40"], id="40-steps"),
        pytest.param([], id="whole", marks=pytest.mark.slow),
    ],
)
def test_fixed_point_streams_train_as_stored_activations_do_bit_for_bit(
    tmp_path, run, flags
):
    exact = ["--fraction-bits", "14", "--deterministic", *flags]
    outcomes = []
    for way in ("recompute", "no-recompute"):
        run_dir, weights = tmp_path / way, tmp_path / f"{way}-weights"
        argv = ["--run-dir", run_dir, f"--{way}", *exact]
        (done,) = run(*argv, weights=str(weights), fit_only=True)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = rows_of(run_dir)
        for row in rows:
            del row["seconds"], row["images_per_second"], row["peak_memory_mib"]
        outcomes.append((np.load(f"{weights}0.npy").tobytes(), rows))
    assert outcomes[0] == outcomes[1]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "precision",
    ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)],
)
def test_branches_of_a_mixed_precision_run_compute_in_16_bits(
    precision, tmp_path, finished_run, unexported
):
    train.main(command(tmp_path, "--precision", precision))
    assert keras.config.dtype_policy().name == "float32"
    network = keras.models.load_model(tmp_path / "model.keras").layers[-2]
    block = network.get_layer("stage1")
    assert block.variable_dtype == "float32"
    conv = block.blocks[0].f.layers[-1]
    assert conv.compute_dtype == precision.removeprefix("mixed_")
    row, straight = rows_of(tmp_path)[-1], rows_of(finished_run)[-1]
    assert float(row["train_loss"]) == pytest.approx(
        float(straight["train_loss"]), rel=0.02
    )
    assert row["train_loss"] != straight["train_loss"]


def test_loss_of_a_float16_run_is_scaled():
    recipe = RECIPES["digits_revnet"].replace(precision="mixed_float16")
    network = keras.Sequential([keras.layers.Dense(2)])
    network.build((None, 3))
    fit.compile_network(network, recipe)
    assert isinstance(network.optimizer, keras.optimizers.LossScaleOptimizer)


@pytest.mark.thorough
def test_run_compiled_by_xla_trains_the_same(tmp_path, finished_run, unexported):
    train.main(command(tmp_path, "--jit"))
    for row, straight in zip(rows_of(tmp_path), rows_of(finished_run), strict=True):
        loss = float(straight["train_loss"])
        assert float(row["train_loss"]) == pytest.approx(loss, rel=1e-3)


@pytest.mark.thorough
def test_xla_on_several_replicas_is_refused(tmp_path, run):
    flags = command(tmp_path / "run", "--strategy", "mirrored", "--jit")
    (done,) = run(*flags, devices=2)
    assert done.returncode == 2
    assert "jit=True: Keras cannot have XLA compile" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_metrics_have_speed_and_memory(finished_run):
    for row in rows_of(finished_run):
        images = 600 if row["step"] == "17" else 1400
        speed = images / float(row["seconds"])
        assert float(row["images_per_second"]) == pytest.approx(speed, rel=0.02)
        assert 100 < float(row["peak_memory_mib"]) < 100_000


@pytest.mark.thorough
def test_tensorboard_shows_curves_and_a_histogram_of_each_weight(tmp_path, unexported):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(command(tmp_path, "--tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    tags = events.Tags()
    for name in ("learning_rate", "cross_entropy", "images_per_second"):
        assert f"epoch_{name}" in tags["tensors"]
    network = keras.models.load_model(tmp_path / "model.keras").layers[-2]
    histograms = [tag for tag in tags["tensors"] if "/histogram" in tag]
    assert len(set(histograms)) == len(histograms) == len(network.weights)


def test_without_tensorboard_the_flag_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    line = refusal(capsys, train, *command(tmp_path, "--tensorboard"))
    assert "pip install tensorboard" in line


def users_environment():
    """Returns the environment without the log level of the tests."""
    return {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}


def run_in_shell(folder, *flags):
    """Runs the program as a user does, in a folder that is not the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "training.train", *flags],
        cwd=folder,
        env=users_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.thorough
def test_default_run_folder_and_output_without_messages_of_tensorflow(tmp_path):
    done = run_in_shell(tmp_path, "--train-steps", "30")
    assert done.returncode == 0, done.stderr[-2000:]
    run_dir = tmp_path / "runs" / "digits_revnet"
    assert (run_dir / "result.json").is_file()
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert len(epochs) == len(rows_of(run_dir)) == 2
    for shown in ("test accuracy", "test loss", "model.keras", "curves.png"):
        assert shown in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_command_without_arguments_learns_the_digits(tmp_path):
    done = run_in_shell(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "runs/digits_revnet/result.json").read_text())
    assert result["test_accuracy"] > 0.97


def test_interrupt_while_tensorflow_loads_is_one_line(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "training.train", "--run-dir", tmp_path / "run"],
        cwd=ROOT,
        env=users_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtensorflow" not in maps.read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "python -m training.train: error: interrupted\n"


def test_mistake_in_a_shell_is_one_line_before_tensorflow_is_loaded(tmp_path):
    done = run_in_shell(tmp_path, "--recipe", "cifar10_revnet39")
    assert done.returncode == 2
    assert done.stderr == (
        "python -m training.train: error: argument --recipe: invalid value "
        "'cifar10_revnet39': did you mean cifar10_revnet38?\n"
    )


def test_serving_model_normalizes_as_the_pipeline_does():
    from training import data

    images = data.load(RECIPES["digits_revnet"])
    inputs = keras.Input(images.image_shape)
    logits = keras.layers.Flatten()(inputs)
    task = RECIPES["digits_revnet"].task
    serving = task.serving_model(keras.Model(inputs, logits), images)
    x = images.test_images[:5]
    expected = tf.nn.softmax(tf.reshape(images.normalize(x), (5, -1)))
    np.testing.assert_allclose(serving(x), expected, rtol=1e-5)
