"""Exports a finished run again: `python -m training.export RUN_DIR [--output DIR]`.

A version is a numbered folder, as TensorFlow Serving expects; without `--output` it is
the next one under `RUN_DIR/export`.
"""

import sys
from pathlib import Path

from training import runs
from training.command import Parser, io_errors


def export(run_dir, output, class_names):
    """Writes the run's `model.keras` as a SavedModel folder at `output`."""
    import keras

    import revnet_tf  # It also registers the model's layers.

    output.parent.mkdir(parents=True, exist_ok=True)
    model = keras.models.load_model(run_dir / "model.keras")
    revnet_tf.export.export_saved_model(model, output, class_names=class_names)


def main(argv=None):
    parser = Parser(prog="python -m training.export", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, metavar="DIR", help="must not exist yet")
    args = parser.parse_args(argv)
    try:
        result = runs.finished(args.run_dir)
        output = args.output or next_version(args.run_dir / "export")
        if output.exists():
            raise FileExistsError(f"output={output} exists; give another --output.")
    except (ValueError, OSError) as error:
        parser.error(error)
    try:
        export(args.run_dir, output, result["class_names"])
    except io_errors() as error:
        parser.fail(1, error)
    print(output)


def next_version(folder):
    """Returns the path of the version after the highest one in `folder`."""
    versions = [int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()]
    return folder / str(max(versions, default=0) + 1)


if __name__ == "__main__":
    sys.exit(main())
