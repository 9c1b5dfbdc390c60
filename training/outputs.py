"""The files that a run writes. Each exists as a whole or not at all."""

import csv
import itertools
import json
import os
import shutil
import sys

# It loads TensorFlow: the checks of `runs`, which come before, are in their own module.
from revnet_tf._files import replacing


def remove_parts(folder):
    """Removes the files and folders that a killed process was writing."""
    for part in folder.glob("part-*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def write_json(path, content):
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def read_table(path):
    """Returns the rows of a CSV file, dictionaries of strings; none without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_own_table(path, columns):
    """Returns the rows of a table of the run, with the types of their values.

    A run does not depend on its tables. If another program has changed a table, the
    function renames it and prints the new name.

    Args:
        path: path of the file; it need not exist.
        columns: dictionary from the name of each column to the type of its values.

    Returns:
        A list of dictionaries. It is empty for a missing and for a damaged table.
    """
    if not os.path.lexists(path):
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = file.readlines()
        header, *rows = csv.reader(lines, strict=True)
        if header == list(columns) and lines[-1].endswith("\n"):
            return [
                {name: columns[name](x) for name, x in zip(header, row, strict=True)}
                for row in rows
            ]
    except (OSError, ValueError, csv.Error):
        pass
    names = (f"{path.stem}-damaged-{i}{path.suffix}" for i in itertools.count(1))
    aside = next(p for p in map(path.with_name, names) if not os.path.lexists(p))
    path.rename(aside)
    print(
        f"{path} is not the table that this run wrote; it is now {aside}",
        file=sys.stderr,
    )
    return []


def write_table(path, rows):
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        # A row of an older version can have fewer columns.
        columns = dict.fromkeys(itertools.chain.from_iterable(rows))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(path, rows, title, score, label):
    """Draws loss and error over the epochs of `metrics.csv`.

    Args:
        path: path of the picture.
        rows: list of dictionaries, the rows of the table.
        title: string, the title.
        score: string, the name of the score. The error is 100 % less the score.
        label: string, the label of the error.
    """
    # A Figure of its own needs no display and leaves the state of pyplot alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, error = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for split in ("train", "test"):
        loss.plot(epochs, [row[f"{split}_loss"] for row in rows], label=split)
        percent = [100 * (1 - row[f"{split}_{score}"]) for row in rows]
        error.plot(epochs, percent, label=split)
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    error.set(xlabel="epoch", ylabel=label, ylim=(0, None))
    for axes in (loss, error):
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
