"""Exports a finished run: `python -m training.export RUN_DIR [--format FORMAT]`.

A version of the SavedModel is a numbered folder, as TensorFlow Serving expects; without
`--output` it is the next one under `RUN_DIR/export`. The other formats are files: ONNX,
and LiteRT for small devices, in float32 or int8 arithmetic.
"""

import contextlib

from training import paths, runs, signals
from training.command import Parser, io_errors, load_tensorflow, one_of, path
from training.recipe import Task

# The formats that are files, with the name of the file in the run folder.
FILES = {
    "litert": "model.tflite",
    "litert_int8": "model_int8.tflite",
    "onnx": "model.onnx",
}
# The ranges of int8 values change little after the first hundred images.
NUM_REPRESENTATIVE_IMAGES = 300


def export(run_dir, output, result):
    """Writes the run's `model.keras` as a SavedModel folder at `output`.

    Args:
        run_dir: path of the run folder.
        output: path of the new folder.
        result: dictionary, the content of `result.json`.
    """
    from revnet_tf.export import export_saved_model

    model = load(run_dir)
    card = {
        "class_names": result["class_names"],
        "recipe": runs.read_json(run_dir / "recipe.json"),
        "result": result,
    }
    options = runs.recipe_of(run_dir).task.export_options(model, result)
    export_saved_model(model, output, card=card, **options)


def export_file(run_dir, output, file_format, images=None):
    """Writes the run's `model.keras` as a file, with `images` for int8 arithmetic."""
    from revnet_tf.export import export_litert, export_onnx

    if file_format == "onnx":
        export_onnx(load(run_dir), output)
    else:
        export_litert(load(run_dir), output, representative_images=images)


def representative_images(run_dir, data_dir):
    """Returns augmented training images of a run, `uint8`."""
    import numpy as np

    from training import data

    recipe = runs.recipe_of(run_dir)
    images = data.load(recipe, data_dir)
    batches = images.training_batches(recipe).unbatch().take(NUM_REPRESENTATIVE_IMAGES)
    normalized = np.stack([image for image, _ in batches.as_numpy_iterator()])
    pixels = np.rint(normalized * images.scale + images.mean)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def load(run_dir):
    """Returns the model of a run.

    Raises:
        OSError: it cannot be read.
    """
    import keras

    # They register the layers of the models.
    import revnet_tf  # noqa: F401
    from training import windows  # noqa: F401

    path = run_dir / "model.keras"
    try:
        return keras.models.load_model(path)
    # Keras raises any of these for a file that another version or program wrote.
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise OSError(f"{path} cannot be loaded: {error}") from error


def main(argv=None):
    parser = Parser(
        prog="python -m training.export",
        description="Exports a finished run, for servers or devices.",
    )
    parser.add_argument("run_dir", type=path, help="folder of the run.")
    parser.add_argument(
        "--format",
        type=one_of(Task.formats),
        default="saved_model",
        metavar="NAME",
        help=f"{', '.join(Task.formats)}. Defaults to saved_model.",
    )
    parser.add_argument("--output", type=path, help="path that does not exist yet.")
    parser.add_argument(
        "--data-dir", type=path, help="as in training.train, for litert_int8."
    )
    args = parser.parse_args(argv)
    if args.data_dir and args.format != "litert_int8":
        parser.error(
            f"--data-dir={args.data_dir}: only --format litert_int8 reads a data set; "
            "leave it out"
        )
    with contextlib.ExitStack() as stack:
        try:
            result = runs.finished(args.run_dir)
            # An error here comes before any work.
            formats = runs.recipe_of(args.run_dir).task.formats
            if args.format not in formats:
                raise ValueError(
                    f"format={args.format}: the model of this run needs a loop over "
                    f"windows; use one of {', '.join(formats)}."
                )
            load_tensorflow()
            if not args.output:
                # Two exports at a time would take the same version.
                stack.enter_context(runs.locked(args.run_dir))
            output = args.output or default_output(args.run_dir, args.format)
            paths.check_encoding(output)
            if args.format == "saved_model":
                paths.check_literal(output)
            if output.exists():
                raise FileExistsError(f"output={output} exists; give another --output.")
            images = None
            if args.format == "litert_int8":
                images = representative_images(args.run_dir, args.data_dir)
        except (ValueError, OSError) as error:
            parser.error(error)
        try:
            with signals.raised_interrupt():
                output.parent.mkdir(parents=True, exist_ok=True)
                if args.format == "saved_model":
                    export(args.run_dir, output, result)
                else:
                    export_file(args.run_dir, output, args.format, images)
        except (ImportError, RuntimeError, ValueError, *io_errors()) as error:
            parser.fail(1, error)
        except KeyboardInterrupt:
            parser.fail(signals.STATUS, f"interrupted; {output} is not written")
    print(output)


def default_output(run_dir, file_format):
    """Returns the path in a run folder to which the program exports."""
    if file_format in FILES:
        return run_dir / FILES[file_format]
    return next_version(run_dir / "export")


def next_version(folder):
    """Returns the path of the version after the highest one in `folder`."""
    versions = [int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()]
    return folder / str(max(versions, default=0) + 1)


if __name__ == "__main__":
    signals.run("python -m training.export", main)
