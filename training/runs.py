"""The run folder: its contents, and which process may write there.

No TensorFlow here: a start that is refused ends before TensorFlow is loaded. The
program writes `result.json` last. A folder that holds it holds a finished run.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re

from training.recipes import Recipe

# The name, in a checkpoint, of the file with the state beside the variables.
RECORD = "record.json"
_PACKAGES = ("tensorflow", "keras", "numpy")


def describe(name, recipe):
    """Returns what `recipe.json` says of a run: name, every field, versions."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "recipe": name,
        # A round trip, so that tuples compare equal to the lists read from a file.
        **json.loads(json.dumps(dataclasses.asdict(recipe))),
        "versions": {"python": platform.python_version(), **versions},
    }


def recipe_of(run_dir):
    """Returns the `Recipe` of a run."""
    found = read_json(run_dir / "recipe.json")
    fields = [field.name for field in dataclasses.fields(Recipe)]
    # A run may be older than a field.
    values = {field: found[field] for field in fields if field in found}
    lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Recipe(**values | lists)


def check_free(run_dir, description):
    """Raises `FileExistsError` unless this run may begin or go on in `run_dir`."""
    existing = next(
        p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists()
    )
    if not existing.is_dir():
        raise FileExistsError(f"{existing} is a file; give another --run-dir.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(
            f"{existing} cannot be written to; give another --run-dir."
        )
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / "recipe.json").is_file():
        raise FileExistsError(
            f"{run_dir} is not empty and is no run folder (it has no recipe.json); "
            "give another --run-dir."
        )
    if (run_dir / "result.json").is_file():
        raise FileExistsError(
            f"{run_dir} holds a finished run; give another --run-dir, or remove it."
        )
    found = read_json(run_dir / "recipe.json")
    for field, wanted in description.items():
        # A run may go on after an update of a package.
        if field != "versions" and found.get(field) != wanted:
            raise FileExistsError(
                f"{run_dir} holds an unfinished run with {field}={found.get(field)!r}, "
                f"not {wanted!r}; give another --run-dir, or repeat its flags."
            )


def finished(run_dir):
    """Returns `result.json` of the finished run in `run_dir`.

    Raises:
        FileNotFoundError: there is none.
    """
    if (run_dir / "result.json").is_file():
        return read_json(run_dir / "result.json")
    if (run_dir / "recipe.json").is_file():
        raise FileNotFoundError(
            f"{run_dir} holds an unfinished run; repeat the python -m training.train "
            "command that began it, and it goes on from its last checkpoint."
        )
    raise FileNotFoundError(
        f"{run_dir} is no run folder; give the --run-dir of a python -m training.train "
        "that has finished."
    )


def checkpoints(folder):
    """Returns the checkpoints in a folder: their paths by step, in increasing order."""
    found = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def record(checkpoint):
    """Returns the record of a checkpoint; one of an older version has none."""
    path = checkpoint / RECORD
    return read_json(path) if path.exists() else {}


def read_json(path):
    """Returns the dictionary in a JSON file.

    Raises:
        OSError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is damaged: it holds no JSON object")
    return content
