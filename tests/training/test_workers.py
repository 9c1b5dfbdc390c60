"""Two workers and two replicas train the same weights as one device."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from program import NETWORKS

from training import data, outputs
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
THREE_STEPS = "--flip --train-steps 3 --decay-steps 2".split()
RECIPE = RECIPES["digits_revnet"].replace(flip=True)


def rows_of(run_dir):
    return outputs.read_table(run_dir / "metrics.csv")


def succeed(processes):
    for done in processes:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "ran out of data" not in done.stderr
    return processes


def trained(run, folder, flags, network, **options):
    """Returns the weights of every worker, and the last row of the metrics."""
    flags = ["--run-dir", folder / "run", *flags]
    options |= {"network": network, "weights": f"{folder / 'w'}", "fit_only": True}
    done = succeed(run(*flags, **options))
    weights = [np.load(f"{folder / 'w'}{i}.npy") for i in range(len(done))]
    return weights, rows_of(folder / "run")[-1]


@pytest.mark.thorough
def test_two_workers_train_the_digits_to_equal_weights(run, tmp_path):
    flags = ["--run-dir", tmp_path / "run", "--train-steps", "56"]
    chief, other = succeed(run(*flags, workers=2, weights=f"{tmp_path / 'w'}"))
    assert "2 replica(s)" in chief.stdout
    assert other.stdout == ""
    weights = [np.load(tmp_path / f"w{i}.npy") for i in (0, 1)]
    np.testing.assert_array_equal(*weights)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == ["28", "56"]
    # Each worker has tested its half, and the run's model all of the images.
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for name in ("test_accuracy", "test_loss"):
        assert float(rows[-1][name]) == pytest.approx(result[name], rel=1e-4)
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {"step-28", "step-56"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "network", [pytest.param("plain", marks=pytest.mark.slow), "synchronized"]
)
def test_one_device_two_replicas_and_two_workers_train_the_same(network, run, tmp_path):
    ways = {
        "one": [],
        "replicas": ["--strategy", "mirrored"],
        "workers": ["--strategy", "multiworker"],
    }
    options = {"one": {}, "replicas": {"devices": 2}, "workers": {"workers": 2}}
    outcomes = {}
    for way, flags in ways.items():
        (tmp_path / way).mkdir()
        outcomes[way] = trained(
            run, tmp_path / way, [*THREE_STEPS, *flags], network, **options[way]
        )
    ((straight,), row) = outcomes.pop("one")
    for weights, other_row in outcomes.values():
        for found in weights:
            np.testing.assert_allclose(found, straight, rtol=1e-5, atol=1e-5)
        for column in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert float(other_row[column]) == pytest.approx(float(row[column]), 1e-5)


@pytest.mark.thorough
def test_two_replicas_scale_the_loss_of_float16(run, tmp_path):
    flags = [*THREE_STEPS, "--strategy", "mirrored"]
    rows = []
    for precision in ("float32", "mixed_float16"):
        (tmp_path / precision).mkdir()
        options = [*flags, "--precision", precision]
        _, row = trained(run, tmp_path / precision, options, "plain", devices=2)
        rows.append(float(row["train_loss"]))
    assert rows[1] == pytest.approx(rows[0], rel=0.01)
    assert rows[1] != rows[0]


def step_by_halves(halves):
    """Returns the mean of two steps of ordinary Keras, one on each half."""
    weights = []
    for x, y in halves:
        keras.utils.set_random_seed(RECIPE.seed)
        network = NETWORKS["batch_norm"](
            (), (), False, input_shape=x.shape[1:], classes=10
        )
        network.compile(
            keras.optimizers.SGD(RECIPE.schedule.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        network.train_on_batch(x, y)
        weights.append([weight.numpy().ravel() for weight in network.weights])
    # Weights and moving statistics are linear in the contribution of a replica.
    return np.mean([np.concatenate(each) for each in weights], axis=0)


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["replicas", "workers"])
def test_batch_norm_sees_the_images_of_its_replica(way, run, tmp_path):
    ((x, y),) = data.load(RECIPE).training_batches(RECIPE).take(1)
    n = len(x) // 2
    if way == "replicas":
        halves, options, flags = (x[:n], y[:n]), {"devices": 2}, ["mirrored"]
        halves = [halves, (x[n:], y[n:])]
    else:
        halves, options, flags = [], {"workers": 2}, ["multiworker"]
        halves = [(x[i::2], y[i::2]) for i in (0, 1)]
    flags = ["--flip", "--train-steps", "1", "--decay-steps", "--strategy", *flags]
    weights, _ = trained(run, tmp_path, flags, "batch_norm", **options)
    for found in weights:
        np.testing.assert_allclose(found, step_by_halves(halves), rtol=1e-5, atol=1e-6)


def wait_for_a_checkpoint(folder):
    deadline = time.monotonic() + 300
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_where_one_worker_dies_the_other_ends_and_the_job_goes_on(
    victim, start, run, tmp_path
):
    flags = ["--run-dir", tmp_path, "--train-steps", "400", "--strategy", "auto"]
    workers = start(*flags, workers=2, network="plain")
    wait_for_a_checkpoint(tmp_path)
    workers.pop(victim).kill()
    (survivor,) = workers
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode == 1
    last = err.splitlines()[-1]
    assert re.search("error: another worker has ended or cannot be reached: ", last)
    assert "the same command goes on" in last

    chief, _ = succeed(run(*flags, workers=2, network="plain"))
    assert re.search(r"Going on from step [1-9]\d* of 400", chief.stdout)
    rows = rows_of(tmp_path)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 16))


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [0, 1])
def test_where_one_worker_hangs_both_end_with_one_line(hangs, run, tmp_path):
    # The first step, which compiles, takes less time than this.
    options = {"hang": hangs, "timeout": 30, "network": "plain"}
    flags = ["--run-dir", tmp_path, "--train-steps", "400"]
    lines = []
    for done in run(*flags, workers=2, **options):
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        lines.append(done.stderr.splitlines()[-1])
    # The worker that ends first can end before the timeout of the other.
    assert any("this worker has waited 30 s for the others" in line for line in lines)
    ends = "waited 30 s for the others|another worker has ended or cannot be reached"
    assert all(re.search(ends, line) for line in lines)


@pytest.mark.thorough
def test_sigterm_to_one_worker_saves_and_ends_both(start, tmp_path):
    flags = ["--run-dir", tmp_path, "--train-steps", "20000"]
    workers = start(*flags, workers=2, network="plain")
    wait_for_a_checkpoint(tmp_path)
    workers[1].send_signal(signal.SIGTERM)
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [128 + signal.SIGTERM] * 2
    steps = {re.search(r"SIGTERM after step (\d+)", error)[1] for error in errors}
    (step,) = steps
    assert (tmp_path / "checkpoints" / f"step-{step}").is_dir()


@pytest.mark.slow
def test_data_that_is_not_prepared_ends_all_workers(run, tmp_path):
    (tmp_path / "tfds").mkdir()
    flags = ["--recipe", "cifar10_revnet38", "--data-dir", tmp_path / "tfds"]
    for done in run("--run-dir", tmp_path / "run", *flags, workers=2):
        assert done.returncode == 2
        assert "prepare it with TFDS before" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "tfds").iterdir()) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_workers_train_from_one_file_of_tfds(run, prepared, tmp_path):
    flags = ["--recipe", "cifar10_revnet38", "--data-dir", prepared]
    flags += "--num-blocks 1 --channels 8 8 --global-batch-size 8".split()
    flags += "--train-steps 4 --decay-steps".split()
    succeed(run("--run-dir", tmp_path, *flags, workers=2))
    assert [row["step"] for row in rows_of(tmp_path)] == ["2", "4"]


@pytest.mark.thorough
def test_script_of_ones_own_in_the_guide_trains_on_two_devices(prepared, tmp_path):
    page = (ROOT / "docs" / "long-runs.md").read_text()
    _, _, rest = page.partition("<!-- a script of one's own -->\n")
    script = re.match(r"```python\n(.*?)^```", rest, re.M | re.S)[1]
    # The devices of the test, which are no GPUs, and its 20 images.
    devices = """
import tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
"""
    for theirs, ours in (
        ("MirroredStrategy()", "MirroredStrategy(['CPU:0', 'CPU:1'])"),
        ("batch(128,", "batch(4,"),
    ):
        assert theirs in script
        script = script.replace(theirs, ours)
    check = "assert strategy.num_replicas_in_sync == 2; print(model.history.history)"
    done = subprocess.run(
        [sys.executable, "-c", devices + script + check],
        env=os.environ | {"TFDS_DATA_DIR": str(prepared)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(ast.literal_eval(done.stdout.splitlines()[-1])["loss"]) == 10
