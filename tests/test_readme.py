"""The README is true: its code runs, and the commands that it names exist."""

import pathlib
import re

import pytest

from training.recipes import RECIPES

README = pathlib.Path(__file__).parents[1] / "README.md"


# Run by tests/training/test_workers.py, which has a data set and two devices for it.
OWN_SCRIPT = "<!-- a script of one's own -->\n"


def blocks(language):
    pattern = rf"(?<!{OWN_SCRIPT})^```{language}\n(.*?)^```"
    return re.findall(pattern, README.read_text(), re.M | re.S)


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert blocks("python")
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "served" / "1" / "saved_model.pb").exists()


def test_every_recipe_named_exists():
    named = re.findall(r"--recipe[ =](\w+)", README.read_text())
    assert named
    assert set(named) <= set(RECIPES)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README.read_text()))
def test_every_file_linked_to_exists(path):
    assert (README.parent / path).exists()
