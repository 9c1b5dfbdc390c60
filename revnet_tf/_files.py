"""Files and folders that appear as a whole or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path beside `path`, and renames it after a block without error.

    After an error, the function removes the partial file or folder and leaves `path` as
    it was.

    Args:
        path: path of a file, or of a new folder. Its parent folder must exist.
    """
    path = pathlib.Path(path)
    # The prefix keeps the suffix: Keras and Matplotlib choose the format by it.
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
