"""README and guide are true: their code runs, and what they name exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
GUIDE = [f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))]
PAGES = ["README.md", *GUIDE]
LANGUAGES = {"python", "sh", "text", "json", "yaml", "bibtex"}

# Run by tests/training/test_workers.py, which has a data set and two devices for it.
OWN_SCRIPT = "<!-- a script of one's own -->"

# Runs the pages of a JSON file in one process, each in a folder of its own. Prints the
# traceback of each page that fails.
RUN_PAGES = """
import json, os, sys, traceback
import keras

failed = {}
for page, code in json.load(open("pages.json")).items():
    folder = os.path.abspath(page)
    os.makedirs(folder)
    keras.backend.clear_session()
    home = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    except Exception:
        failed[page] = traceback.format_exc()
    os.chdir(home)
json.dump(failed, open("failed.json", "w"))
"""


def blocks(page):
    """Yields language, code, number of the first line, and the line before a block."""
    lines = ["", *(ROOT / page).read_text().splitlines()]
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        code = "\n".join(lines[start + 1 : number]) + "\n"
        yield lines[start].strip("` "), code, start + 1, lines[start - 1]
        start = None
    assert start is None, f"{page}:{start}: a block without an end"


def script(page):
    """Returns the Python of a page, on the lines on which it stands in the page."""
    text = ""
    for language, code, first_line, before in blocks(page):
        # Clients need a server: tests/training/test_serving.py has one.
        if language == "python" and before != OWN_SCRIPT and "localhost" not in code:
            text += "\n" * (first_line - 1 - text.count("\n")) + code
    return text


def failures(pages, folder):
    """Returns the tracebacks of the pages whose code fails."""
    scripts = {page: script(page) for page in pages}
    (folder / "pages.json").write_text(json.dumps(scripts))
    # `memory.measure` needs oneDNN, which TensorFlow uses on some processors only.
    environment = {"PYTHONPATH": str(ROOT), "TF_ENABLE_ONEDNN_OPTS": "1"}
    subprocess.run(
        [sys.executable, "-c", RUN_PAGES],
        cwd=folder,
        env=os.environ | environment,
        check=True,
    )
    return json.loads((folder / "failed.json").read_text())


def test_code_of_the_readme_runs_from_top_to_bottom(tmp_path):
    assert script("README.md")
    assert failures(["README.md"], tmp_path) == {}


@pytest.fixture(scope="module")
def failures_of_the_guide(tmp_path_factory):
    return failures(GUIDE, tmp_path_factory.mktemp("guide"))


@pytest.mark.thorough
@pytest.mark.parametrize("page", [page for page in GUIDE if script(page)])
def test_code_of_a_page_runs_from_top_to_bottom(page, failures_of_the_guide):
    assert page not in failures_of_the_guide, failures_of_the_guide[page]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_known_language(page):
    found = {language for language, *_ in blocks(page)}
    assert found <= LANGUAGES


def test_readme_has_its_first_command_on_the_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    first = min(number for language, _, number, _ in blocks("README.md"))
    assert first <= 30


def test_lines_for_slurm_and_kubernetes_tell_a_worker_its_place():
    found = [code for _, code, *_ in blocks("docs/long-runs.md")]
    (lines,) = [code for code in found if "SLURM_PROCID" in code]
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
    text = "".join((ROOT / page).read_text() for page in PAGES)
    named = re.findall(r"--recipe[ =](\w+)", text)
    assert named
    assert set(named) <= set(RECIPES)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_linked_to_exists(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert ((ROOT / page).parent / path).exists(), path


def test_algorithm_1_stands_beside_lines_of_the_code():
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    table = text.partition("| Algorithm 1 |")[2].partition("\n\n")[0]
    quoted = re.findall(r"\| `([^`]+)` \|$", table, re.M)
    assert len(quoted) >= 7
    code = (ROOT / "revnet_tf" / "_coupling.py").read_text()
    assert [line for line in quoted if line not in code] == []


def test_every_test_that_cases_names_exists():
    cases = (ROOT / "tests" / "CASES.md").read_text()
    code = "".join(path.read_text() for path in ROOT.glob("tests/*/test_*.py"))
    defined = re.findall(r"^def (test_\w+)", code, re.M)
    named = re.findall(r"`(test_\w+)`", cases)
    assert len(named) > 100
    assert [n for n in named if not any(d.startswith(n) for d in defined)] == []
