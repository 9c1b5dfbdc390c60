"""The README is true: its code runs, and the commands that it names exist."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from training.recipes import RECIPES

README = pathlib.Path(__file__).parents[1] / "README.md"


# Run by tests/training/test_workers.py, which has a data set and two devices for it.
OWN_SCRIPT = "<!-- a script of one's own -->\n"


def blocks(language):
    pattern = rf"(?<!{OWN_SCRIPT})^```{language}\n(.*?)^```"
    return re.findall(pattern, README.read_text(), re.M | re.S)


def test_python_blocks_run_one_after_the_other(tmp_path):
    # Clients need a server: tests/training/test_serving.py has one.
    alone = [code for code in blocks("python") if "localhost" not in code]
    assert alone
    # `memory.measure` needs oneDNN, which TensorFlow uses on some processors only.
    environment = {"PYTHONPATH": str(README.parent), "TF_ENABLE_ONEDNN_OPTS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(alone)],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "served" / "1" / "saved_model.pb").exists()


def test_lines_for_slurm_and_kubernetes_tell_a_worker_its_place():
    (lines,) = [block for block in blocks("sh") if "SLURM_PROCID" in block]
    slurm, kubernetes = lines.split("# Kubernetes")
    hosts = {
        "scontrol() { printf 'n0\\nn1\\n'; }; SLURM_PROCID=1\n" + slurm: ["n0", "n1"],
        "HOSTNAME=train-1 #" + kubernetes: [f"train-{i}.train" for i in range(4)],
    }
    for script, names in hosts.items():
        script += '\nprintf %s "$TF_CONFIG"'
        config = json.loads(subprocess.check_output(["bash", "-c", script], text=True))
        assert config == {
            "cluster": {"worker": [f"{name}:12345" for name in names]},
            "task": {"type": "worker", "index": 1},
        }


def test_every_recipe_named_exists():
    named = re.findall(r"--recipe[ =](\w+)", README.read_text())
    assert named
    assert set(named) <= set(RECIPES)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README.read_text()))
def test_every_file_linked_to_exists(path):
    assert (README.parent / path).exists()
