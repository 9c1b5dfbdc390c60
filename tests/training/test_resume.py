"""Runs that end at any moment, and resume as if they had not been interrupted."""

import json
import random
import signal
import time

import numpy as np
import pytest

from training import outputs

# A run with BatchNorm, dropout and augmentation. Its epochs have 28 steps, the last one
# fewer.
FLAGS = "--flip --decay-steps 100 --save-every 10 --deterministic --train-steps".split()


class Run:
    """A run folder, and the program on it."""

    def __init__(self, start, run, folder, steps):
        self.folder = folder / "run"
        self.weights = folder / "weights"
        self.flags = ["--run-dir", self.folder, *FLAGS, steps]
        self.options = {"network": "dropout", "weights": str(self.weights)}
        self._start, self._run = start, run

    def go_on(self, **options):
        (done,) = self._run(*self.flags, **self.options, **options)
        return done

    def start(self):
        (process,) = self._start(*self.flags, **self.options)
        return process

    def checkpoints(self):
        found = self.folder.glob("checkpoints/step-*")
        return sorted(found, key=lambda path: int(path.name[5:]))

    def outcome(self):
        """Returns the weights and the results of a run, without times and memory."""
        rows = outputs.read_table(self.folder / "metrics.csv")
        result = json.loads((self.folder / "result.json").read_text())
        for row in rows:
            del row["seconds"], row["images_per_second"], row["peak_memory_mib"]
        del result["train_seconds"]
        return np.load(f"{self.weights}0.npy").tobytes(), rows, result


def uninterrupted(start, run, folder, steps):
    straight = Run(start, run, folder, steps)
    done = straight.go_on()
    assert done.returncode == 0, done.stderr[-2000:]
    return straight.outcome()


def kill_at_random(run, rng, **options):
    done = run.go_on(**options)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (run.folder / "result.json").exists()


def end(run):
    done = run.go_on()
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.thorough
def test_run_ended_killed_and_damaged_equals_an_uninterrupted_one_bit_for_bit(
    start, run, tmp_path
):
    expected = uninterrupted(start, run, tmp_path / "straight", 150)
    broken = Run(start, run, tmp_path / "broken", 150)
    rng = random.Random(0)

    process = broken.start()
    deadline = time.monotonic() + 300
    while not broken.checkpoints() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    line = err.splitlines()[-1]
    step = broken.checkpoints()[-1].name.removeprefix("step-")
    assert f"ended by SIGTERM after step {step}; the same command goes on" in line

    kill_at_random(broken, rng, kill=rng.uniform(0, 0.2))
    kill_at_random(broken, rng, kill_in_save=rng.uniform(0, 0.02))
    last = broken.checkpoints()[-1]
    data = last / "variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-100])
    done = end(broken)
    assert f"{last} is damaged and passed over" in done.stderr
    assert broken.outcome() == expected


@pytest.mark.slow
def test_run_killed_20_times_equals_an_uninterrupted_one_bit_for_bit(
    start, run, tmp_path
):
    expected = uninterrupted(start, run, tmp_path / "straight", 3000)
    broken = Run(start, run, tmp_path / "broken", 3000)
    rng = random.Random(0)
    for _ in range(10):
        kill_at_random(broken, rng, kill=rng.uniform(0, 0.5))
        kill_at_random(broken, rng, kill_in_save=rng.uniform(0, 0.02))
    end(broken)
    assert broken.outcome() == expected
