"""The backend of Keras that the package needs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from revnet_tf import _backend

ROOT = pathlib.Path(__file__).parents[2]


def last_line_of_import(program="import revnet_tf", **environment):
    """Returns the last line that a failing process writes to stderr."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KERAS_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def expected(backend):
    return (
        "ImportError: Expected Keras with the backend 'tensorflow'; Keras uses "
        f"{backend!r}. Set the environment variable KERAS_BACKEND=tensorflow before "
        'Keras is imported, or "backend": "tensorflow" in keras.json.'
    )


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy", "openvino", "unknown"])
def test_other_backend_in_the_environment_is_refused_in_one_sentence(backend):
    assert last_line_of_import(KERAS_BACKEND=backend) == expected(backend)


@pytest.mark.parametrize("place", ["KERAS_HOME", "HOME"])
def test_other_backend_in_keras_json_is_refused(place, tmp_path):
    folder = tmp_path if place == "KERAS_HOME" else tmp_path / ".keras"
    folder.mkdir(exist_ok=True)
    (folder / "keras.json").write_text(json.dumps({"backend": "jax"}))
    assert last_line_of_import(**{place: str(tmp_path)}) == expected("jax")


@pytest.mark.thorough
def test_other_backend_of_an_imported_keras_is_refused():
    # Keras imports OpenVINO's backend lazily, so it starts without its modules.
    program = (
        "import os, keras; os.environ['KERAS_BACKEND'] = 'tensorflow'; import revnet_tf"
    )
    line = last_line_of_import(program, KERAS_BACKEND="openvino")
    assert line == expected("openvino")


@pytest.fixture
def keras_home(tmp_path, monkeypatch):
    """A folder for `keras.json`, as if Keras had not been imported."""
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path


def test_environment_comes_before_keras_json(keras_home, monkeypatch):
    (keras_home / "keras.json").write_text(json.dumps({"backend": "jax"}))
    assert _backend.chosen() == "jax"
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert _backend.chosen() == "tensorflow"


@pytest.mark.parametrize("content", ["", "{}", "{", "[]"])
def test_keras_json_without_a_backend_means_tensorflow(content, keras_home):
    (keras_home / "keras.json").write_text(content)
    assert _backend.chosen() == "tensorflow"
