"""The error of trained networks over several seeds, and its course over the epochs.

    python -m benchmarks.accuracy             # the short CIFAR-10 recipes; 7 hours
    python -m benchmarks.accuracy --recipes brain_revunet --stored brain_revunet
    python -m benchmarks.accuracy --plot      # accuracy.png again, from the CSV files

The script starts `python -m training.train` for one run after the other. The same
command continues after an interruption: it skips runs that have a row, and resumes an
unfinished run from its last checkpoint. accuracy.csv has one row for each run,
accuracy_epochs.csv one row for each epoch; dice.csv and dice_epochs.csv have those of
segmentation. The plot shows the runs on CIFAR-10.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.provenance import FOLDER, IMAGES, provenance
from training import outputs, runs
from training.recipes import RECIPES

RUN = ("recipe", "recompute", "seed")
SHORT = (
    "cifar10_revnet38_short",
    "cifar10_resnet32_short",
    "cifar10_irevnet_short",
)


def wanted(recipes, seeds, stored):
    """Returns the runs, `(recipe, recompute, seed)`, in the order of their seeds."""
    pairs = [(name, True) for name in recipes]
    pairs += [(name, False) for name in stored]
    return [(*pair, seed) for seed in seeds for pair in pairs]


def train(run, run_dir, data_dir):
    """Trains an unfinished run to its end, and writes its rows."""
    recipe, recompute, seed = run
    if not (run_dir / "result.json").exists():
        command = [sys.executable, "-m", "training.train", "--recipe", recipe]
        command += ["--seed", str(seed), "--run-dir", str(run_dir)]
        command += [] if recompute else ["--no-recompute"]
        command += ["--data-dir", str(data_dir)] if data_dir else []
        subprocess.run(command, cwd=FOLDER.parent, check=True)
    result, score = runs.finished(run_dir), RECIPES[recipe].task.score
    scores = [name for name in result if name.startswith("test_")]
    row = {k: result[k] for k in (*scores, "num_parameters", "steps", "train_seconds")}
    write(f"{score}.csv", run, [row | provenance()])
    fields = ("epoch", "step", "train_loss", "test_loss", f"test_{score}")
    epochs = outputs.read_table(run_dir / "metrics.csv")
    rows = [{field: row[field] for field in fields} for row in epochs]
    write(f"{score}_epochs.csv", run, rows)


def read(name):
    return outputs.read_table(FOLDER / name)


def rows_of(run, rows):
    return [row for row in rows if [row[k] for k in RUN] == [str(v) for v in run]]


def write(name, run, rows):
    """Adds the rows of one run to a CSV file."""
    rows = [dict(zip(RUN, run, strict=True)) | row for row in rows]
    outputs.write_table(FOLDER / name, read(name) + rows)


def plot():
    """Draws the mean and range over seeds of test error and training loss by step."""
    from matplotlib.figure import Figure

    curves = {}
    for row in read("accuracy_epochs.csv"):
        point = float(row["train_loss"]), 100 * (1 - float(row["test_accuracy"]))
        curve = curves.setdefault((row["recipe"], row["recompute"]), {})
        curve.setdefault(int(row["step"]), []).append(point)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for (recipe, recompute), curve in curves.items():
        color = f"C{sorted({recipe for recipe, _ in curves}).index(recipe)}"
        label = recipe + ("" if recompute == "True" else ", stored activations")
        style = "-" if recompute == "True" else "--"
        steps = sorted(curve)
        for i, ax in enumerate(panels):
            values = [[point[i] for point in curve[step]] for step in steps]
            means = [sum(v) / len(v) for v in values]
            seeds = max(map(len, values))
            ax.plot(steps, means, style, color=color, label=f"{label}; seeds: {seeds}")
            low, high = [min(v) for v in values], [max(v) for v in values]
            ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    for ax, what in zip(
        panels, ("training cross-entropy", "test error, %"), strict=True
    ):
        ax.set(xlabel="step", ylabel=what, yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize="small")
    figure.savefig(IMAGES / "accuracy.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=SHORT, choices=RECIPES)
    parser.add_argument(
        "--stored",
        nargs="*",
        default=SHORT[:1],
        choices=RECIPES,
        help="recipes to run also with stored activations",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs", "accuracy"),
        help="folder of all runs",
    )
    parser.add_argument("--data-dir", type=Path, help="folder of TFDS data sets")
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    args = parser.parse_args()
    if not args.plot:
        for run in wanted(args.recipes, args.seeds, args.stored):
            recipe, recompute, seed = run
            score = RECIPES[recipe].task.score
            if not rows_of(run, read(f"{score}.csv")):
                name = f"{recipe}{'' if recompute else '_stored'}_seed{seed}"
                train(run, (args.run_dir / name).resolve(), args.data_dir)
            (row,) = rows_of(run, read(f"{score}.csv"))
            print(*run, f"test {score} {float(row[f'test_{score}']):.4f}")
    plot()


if __name__ == "__main__":
    main()
