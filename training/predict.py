"""Predicts with a finished run: `python -m training.predict RUN_DIR INPUT ...`.

A run on volumes writes a label volume for each NIfTI file, in the space of the file. A
run on images writes a table with the class of each picture.
"""

from training import paths, runs, signals
from training.command import Parser, io_errors, load_tensorflow, path


def main(argv=None):
    parser = Parser(
        prog="python -m training.predict",
        description="Predicts the labels of volumes, or the classes of pictures.",
    )
    parser.add_argument("run_dir", type=path, help="folder of the run.")
    parser.add_argument(
        "input",
        type=path,
        nargs="+",
        help="NIfTI file, or picture. A volume with a file for each channel needs all "
        "of them, NAME_0000.nii.gz, NAME_0001.nii.gz and so on.",
    )
    parser.add_argument(
        "--output",
        type=path,
        required=True,
        help="folder to write to, other than the folder of an input.",
    )
    args = parser.parse_args(argv)
    output = args.output
    try:
        result = runs.finished(args.run_dir)
        task = runs.recipe_of(args.run_dir).task
        paths.check_encoding(output)
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"output={output} is a file; give another --output.")
        for file in args.input:
            if file.parent.resolve() == output.resolve():
                raise ValueError(
                    f"output={output} is the folder of {file}; give another --output."
                )
            if not file.is_file():
                reason = "is no file" if file.exists() else "is missing"
                raise FileNotFoundError(f"{file} {reason}; give files.")
        load_tensorflow()
        inputs = task.inputs(args.input, result)
        for name in inputs:
            if (output / name).exists():
                raise FileExistsError(
                    f"{output / name} exists; remove it, or give another --output."
                )
        from training import export

        model = export.load(args.run_dir)
    except (ValueError, OSError) as error:
        parser.error(error)
    made = not output.exists()
    try:
        with signals.raised_interrupt():
            output.mkdir(parents=True, exist_ok=True)
            try:
                task.predict(model, inputs, output, result)
            finally:
                if made and not any(output.iterdir()):
                    output.rmdir()
    except (ValueError, *io_errors()) as error:
        parser.fail(1, error)
    except KeyboardInterrupt:
        parser.fail(signals.STATUS, "interrupted; the files written so far are whole")


if __name__ == "__main__":
    signals.run("python -m training.predict", main)
