"""The run folder: what lies in it, and who may write there.

Every file is written beside its place and moved into it when it is whole.
`result.json` is the last: a folder that holds it holds a finished run.
"""

import contextlib
import csv
import importlib.metadata
import json
import os
import platform

from training.recipe import Recipe

_PACKAGES = ("tensorflow", "keras", "numpy")


def describe(name, recipe):
    """Returns what `recipe.json` says of a run: name, every field, versions."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "recipe": name,
        **recipe.to_json(),
        "versions": {"python": platform.python_version(), **versions},
    }


def recipe_of(run_dir):
    """Returns the `Recipe` of a run.

    Raises:
        ValueError: `recipe.json` does not describe one.
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


@contextlib.contextmanager
def written_whole(path):
    """Gives the path to write to, and moves it to `path` if nothing went wrong."""
    # In front of the name: Keras and Matplotlib go by what comes after the dot.
    part = path.with_name(f"part-{path.name}")
    yield part
    os.replace(part, path)


def read_json(path):
    return json.loads(path.read_text())


def write_json(path, content):
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def read_metrics(path):
    """Returns the rows of `metrics.csv`, one a finished epoch."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_metrics(path, rows):
    with written_whole(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(path, rows, title):
    """Draws loss and error over the epochs of `metrics.csv`."""
    # A Figure of its own needs no display and leaves pyplot's state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, error = figure.subplots(1, 2)
    epochs = [int(row["epoch"]) for row in rows]
    for split in ("train", "test"):
        loss.plot(epochs, [float(row[f"{split}_loss"]) for row in rows], label=split)
        percent = [100 * (1 - float(row[f"{split}_accuracy"])) for row in rows]
        error.plot(epochs, percent, label=split)
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    error.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
    for axes in (loss, error):
        axes.grid(alpha=0.3)
        axes.legend()
    with written_whole(path) as part:
        figure.savefig(part, dpi=120)
