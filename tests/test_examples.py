"""The examples run from top to bottom, and print what they promise."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    # It fixes the devices of the process, so it comes first.
    "mirrored_and_serving": "--epochs 2 --output served/1",
    "cifar10_own_network": "--epochs 1 --steps 3",
    "memory_budget": "--blocks 4 --batch-size 16 --budgets 2 --steps 2",
    "drift": "--blocks 4 --steps 3 --plot drift.png",
    "features": "--blocks 2 --steps 3 --plot features.png",
}
# All examples in one process. TFDS draws random images where it has not prepared any.
RUN = """
import contextlib, os, pathlib, runpy, sys
folder, examples = sys.argv[1], [line.split() for line in sys.argv[2:]]
data = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
with contextlib.ExitStack() as stack:
    if not (data.expanduser() / "cifar10").is_dir():
        import tensorflow_datasets as tfds
        stack.enter_context(tfds.testing.mock_data(num_examples=300))
    for name, *arguments in examples:
        print("example", name)
        sys.argv = [name, *arguments]
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The output of each example, and the folder in which they run."""
    folder = tmp_path_factory.mktemp("examples")
    lines = [f"{name} {arguments}" for name, arguments in ARGUMENTS.items()]
    done = subprocess.run(
        [sys.executable, "-c", RUN, EXAMPLES, *lines],
        cwd=folder,
        # `memory_budget` sets the option too late: its process uses TensorFlow already.
        env={
            **os.environ,
            "PYTHONPATH": str(EXAMPLES.parent),
            "TF_ENABLE_ONEDNN_OPTS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, *parts = re.split(r"^example (\w+)\n", done.stdout, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True)), folder


def number_after(text, output):
    return float(re.search(rf"{text}:? +([\d.e+-]+)", output)[1])


def test_every_example_has_a_run_a_title_and_at_most_119_lines():
    paths = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in paths] == sorted(ARGUMENTS)
    for path in paths:
        text = path.read_text()
        assert re.match(r'"""\nTitle: .+\nDescription: .+\n', text)
        assert len(text.splitlines()) < 120


@pytest.mark.thorough
def test_own_network_is_trained_tested_and_inverted(outputs):
    output = outputs[0]["cifar10_own_network"]
    assert "3/3" in output
    assert 0 <= number_after("test accuracy", output) <= 1
    assert number_after("reconstructed input of stage2", output) < 1e-3


@pytest.mark.thorough
def test_plans_store_more_blocks_with_more_budget_and_stay_within_it(outputs):
    output = outputs[0]["memory_budget"]
    table = re.findall(r"^ +([\d.]+) +(\d+) +([\d.]+)$", output, re.M)
    budgets, stored, peaks = zip(*(map(float, row) for row in table), strict=True)
    assert stored[0] < stored[1] == 4
    # The estimate is within a tenth of the measurement: tests/revnet_tf/test_memory.py.
    assert all(p < 1.1 * budget for p, budget in zip(peaks, budgets, strict=True))


@pytest.mark.thorough
def test_drift_is_ruled_out_by_fixed_point_and_bounded_by_anchors(outputs):
    results, folder = outputs
    output = results["drift"]
    fixed, bfloat16 = (
        number_after(name, output) for name in ("float32, fixed point", "bfloat16  ")
    )
    anchored = number_after(r"bfloat16, \d+ anchors", output)
    assert fixed == 0 < anchored < bfloat16
    assert output.count("'reconstruction_error'") >= 1
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_features_of_each_stage_return_the_images(outputs):
    results, folder = outputs
    output = results["features"]
    for stage in ("stage1", "stage2", "stage3"):
        assert number_after(f"images from {stage}", output) < 1e-3
    assert number_after("difference of the two interpolations", output) > 1e-3
    assert (folder / "features.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_two_devices_train_a_model_that_is_served(outputs):
    results, folder = outputs
    output = results["mirrored_and_serving"]
    assert "2 devices" in output
    assert number_after("largest difference from the live model", output) < 1e-5
    assert len(re.findall(r"'\d'", output)) == 8
    assert (folder / "served" / "1" / "saved_model.pb").exists()
