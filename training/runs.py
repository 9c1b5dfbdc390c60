"""The run folder: its contents, and which process may write there.

No TensorFlow here: a start that is refused ends before TensorFlow is loaded. The
program writes `result.json` last. A folder that holds it holds a finished run.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import sys
import zipfile
import zlib

from training import paths
from training.recipe import Recipe

# The name, in a checkpoint, of the file with the state beside the variables.
RECORD = "record.json"
_PACKAGES = ("tensorflow", "keras", "numpy")


def describe(name, recipe):
    """Returns the content of `recipe.json`: the name, every field, and versions."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "recipe": name,
        **recipe.to_json(),
        "versions": {"python": platform.python_version(), **versions},
    }


def recipe_of(run_dir):
    """Returns the `Recipe` of a run.

    Raises:
        ValueError: `recipe.json` does not describe a recipe.
    """
    return _recipe_file(run_dir)[1]


def _recipe_file(run_dir):
    """Returns the name of a run's recipe, and the `Recipe`."""
    path = run_dir / "recipe.json"
    try:
        return _described(read_json(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; bring back a copy, or use another run folder."
        ) from error


def _described(description):
    """Returns the name and the `Recipe` that `describe` has described."""
    if not isinstance(description, dict):
        raise ValueError(f"expected an object, found a {type(description).__name__}")
    if not isinstance(description.get("recipe"), str):
        raise ValueError("the field 'recipe', a name, is missing")
    about = ("recipe", "run", "versions")
    fields = {k: v for k, v in description.items() if k not in about}
    return description["recipe"], Recipe.from_json(fields)


def check_free(run_dir, description):
    """Raises an error unless this run may begin or resume in `run_dir`."""
    paths.check_literal(run_dir)
    existing = next(
        p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists()
    )
    if not existing.is_dir():
        raise FileExistsError(f"{existing} is a file; give another --run-dir.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(
            f"{existing} cannot be written to; give another --run-dir."
        )
    if not run_dir.exists() or all(map(_is_of_a_start, run_dir.iterdir())):
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
    (found_name, found), (name, recipe) = _recipe_file(run_dir), _described(description)
    found = {"recipe": found_name} | found.values()
    wanted = {"recipe": name} | recipe.values()
    for field in wanted | found:
        there, here = found.get(field), wanted.get(field)
        if there != here:
            raise FileExistsError(
                f"{run_dir} holds an unfinished run with {field}={there!r}, not "
                f"{here!r}; give another --run-dir, or repeat its flags."
            )


def _is_of_a_start(path):
    """Whether a start that was killed can leave a path, before it writes a recipe."""
    return path.name in ("lock", "volumes") or path.name.startswith("part-")


@contextlib.contextmanager
def locked(run_dir):
    """Holds a run folder for this process. The system ends the lock with the process.

    Args:
        run_dir: path of an existing folder.

    Raises:
        FileExistsError: another process holds the folder.
    """
    # NFS locks a file only if it is open for writing.
    with (run_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{run_dir} is in use by another process; wait for its end, or give "
                "another folder."
            ) from None
        except OSError as error:
            print(
                f"{run_dir} cannot be locked ({error.strerror}); start no second "
                "process on it",
                file=sys.stderr,
            )
        yield


def check_checkpoints(run_dir, train_steps):
    """Raises `FileExistsError` if a checkpoint in `run_dir` belongs to another run.

    A run of an older version has no identifier, and its checkpoints have no record.
    Such a checkpoint is accepted in such a run only.

    Args:
        run_dir: path of a run folder.
        train_steps: int, the number of steps of the whole run.
    """
    run = identifier(run_dir)
    for step, path in checkpoints(run_dir / "checkpoints").items():
        try:
            found = {"run": None, "step": step} | record(path)
        except OSError:
            continue  # It is damaged, and passed over.
        if found["run"] != run or found["step"] != step or step > train_steps:
            raise FileExistsError(
                f"{path} is not a checkpoint of the run in {run_dir}; remove it, or "
                "give another --run-dir."
            )


def identifier(run_dir):
    """Returns the string that names a run, or `None` for a run of an older version."""
    return read_json(run_dir / "recipe.json").get("run")


def finished(run_dir):
    """Returns `result.json` of the finished run in `run_dir`.

    Raises:
        OSError: the run is not finished, or one of its files is missing or damaged.
    """
    paths.check_encoding(run_dir)
    if (run_dir / "result.json").is_file():
        result = read_json(run_dir / "result.json")
        if missing := {"test_loss", "class_names"} - set(result):
            raise OSError(f"{run_dir / 'result.json'} has no {', '.join(missing)}.")
        check_archive(run_dir / "model.keras")
        return result
    if (run_dir / "recipe.json").is_file():
        raise FileNotFoundError(
            f"{run_dir} holds an unfinished run; if it is not running, repeat its "
            "python -m training.train command, and it goes on from its last checkpoint."
        )
    raise FileNotFoundError(
        f"{run_dir} is no run folder; give the --run-dir of a python -m training.train "
        "that has finished."
    )


def check_archive(path):
    """Raises `OSError` unless a model file is there and whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        damaged = getattr(error, "strerror", None) or error
    if damaged:
        raise OSError(f"{path} is missing or damaged ({damaged}); bring back a copy.")


def checkpoints(folder):
    """Returns the checkpoints in a folder: their paths by step, in increasing order."""
    found = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def record(checkpoint):
    """Returns the record of a checkpoint. It is empty for one of an older version."""
    path = checkpoint / RECORD
    return read_json(path) if path.exists() else {}


def read_json(path):
    """Returns the dictionary in a JSON file.

    Raises:
        OSError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is damaged: it holds no JSON object")
    return content
