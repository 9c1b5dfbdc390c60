"""The files that a run writes. Each exists as a whole or not at all."""

import csv
import json

# It loads TensorFlow: the checks of `runs`, which come before, are in their own module.
from revnet_tf._files import replacing


def write_json(path, content):
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def read_table(path):
    """Returns the rows of a CSV file, dictionaries of strings; none without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path, rows):
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(path, rows, title):
    """Draws loss and error over the epochs of `metrics.csv`."""
    # A Figure of its own needs no display and leaves the state of pyplot alone.
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
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
