"""Scores a finished run: `python -m training.evaluate RUN_DIR [--data-dir DIR]`."""

from training import runs, signals
from training.command import Parser, io_errors, load_tensorflow, path


def score(run_dir, images):
    """Returns accuracy and loss of the run's `model.keras` on the test images.

    The loss is the cross-entropy without the regularization of the training.
    """
    import keras

    from training import export

    model = export.load(run_dir)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(),
        weighted_metrics=[
            keras.metrics.SparseCategoricalAccuracy("accuracy"),
            keras.metrics.SparseCategoricalCrossentropy("cross_entropy"),
        ],
    )
    batches = images.test_batches(batch_size=100, normalize=False)
    scores = model.evaluate(batches, verbose=0, return_dict=True)
    return scores["accuracy"], scores["cross_entropy"]


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
        images = data.load(recipe, args.data_dir, args.skip_corrupt)
        if images.class_names != result["class_names"]:
            raise ValueError(
                f"{args.run_dir} was trained on other classes than those of "
                f"{recipe.task.dataset} now; give the --data-dir of its data set."
            )
    except (ValueError, OSError) as error:
        parser.error(error)
    try:
        accuracy, loss = score(args.run_dir, images)
    except io_errors() as error:
        parser.fail(1, data.failure(images) or error)
    print(f"test accuracy  {accuracy:.4f}  (recorded {result['test_accuracy']:.4f})")
    print(f"test loss      {loss:.4f}  (recorded {result['test_loss']:.4f})")


if __name__ == "__main__":
    signals.run("python -m training.evaluate", main)
