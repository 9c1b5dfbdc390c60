"""Scores a finished run: `python -m training.evaluate RUN_DIR [--data-dir DIR]`."""

import dataclasses

from training import runs, signals
from training.command import Parser, io_errors, load_tensorflow, path


def score(run_dir, images, draw=False):
    """Returns the scores of the run's `model.keras` on the test images, by their names.

    The loss is the cross-entropy without the regularization of the training. With
    `draw`, the pictures of the test go to the run folder.
    """
    from training import export

    task = runs.recipe_of(run_dir).task
    return task.evaluate(export.load(run_dir), images, run_dir if draw else None)


def main(argv=None):
    parser = Parser(
        prog="python -m training.evaluate",
        description="Scores a finished run on its test images.",
    )
    parser.add_argument("run_dir", type=path, help="folder of the run.")
    parser.add_argument("--data-dir", type=path, help="as in training.train.")
    parser.add_argument(
        "--skip-corrupt", action="store_true", help="as in training.train."
    )
    args = parser.parse_args(argv)
    try:
        result = runs.finished(args.run_dir)
        load_tensorflow()
        from training import data

        recipe = runs.recipe_of(args.run_dir)
        recipe = dataclasses.replace(recipe, task=recipe.task.as_trained(result))
        images = data.load(
            recipe, args.data_dir, args.skip_corrupt, run_dir=args.run_dir
        )
        if images.class_names != result["class_names"]:
            raise ValueError(
                f"{args.run_dir} was trained on other classes than those of "
                f"{recipe.task.dataset} now; give the --data-dir of its data set."
            )
    except (ValueError, OSError) as error:
        parser.error(error)
    try:
        scores = score(args.run_dir, images)
    except io_errors() as error:
        parser.fail(1, data.failure(images) or error)
    for name, value in scores.items():
        recorded = result[f"test_{name}"]
        print(f"{f'test {name}':<14} {value:.4f}  (recorded {recorded:.4f})")


if __name__ == "__main__":
    signals.run("python -m training.evaluate", main)
