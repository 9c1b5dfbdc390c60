"""Scores a finished run: `python -m training.evaluate RUN_DIR [--data-dir DIR]`."""

import sys
from pathlib import Path

from training import runs
from training.command import Parser


def score(run_dir, images):
    """Returns accuracy and loss of the run's `model.keras` on the test images.

    The loss is the cross-entropy, without the regularization that training adds.
    """
    import keras

    import revnet_tf  # noqa: F401  It registers the model's layers.
    from training import data

    model = keras.models.load_model(run_dir / "model.keras")
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy("accuracy"),
            keras.metrics.SparseCategoricalCrossentropy("cross_entropy"),
        ],
    )
    batches = data.test_batches(images, batch_size=100, normalize=False)
    scores = model.evaluate(batches, verbose=0, return_dict=True)
    return scores["accuracy"], scores["cross_entropy"]


def main(argv=None):
    parser = Parser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--data-dir", type=Path, help="as in training.train")
    args = parser.parse_args(argv)
    try:
        result = runs.finished(args.run_dir)
        from training import data

        recipe = runs.read_json(args.run_dir / "recipe.json")
        images = data.load(recipe["dataset"], args.data_dir)
    except (ValueError, OSError) as error:
        parser.error(error)
    accuracy, loss = score(args.run_dir, images)
    print(f"test accuracy  {accuracy:.4f}  (recorded {result['test_accuracy']:.4f})")
    print(f"test loss      {loss:.4f}  (recorded {result['test_loss']:.4f})")


if __name__ == "__main__":
    sys.exit(main())
