"""Paths that TensorFlow cannot use, which are refused before any work is lost."""

import os


def check_encoding(path):
    """Raises `ValueError` unless a path is UTF-8, as TensorFlow expects it."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        # `repr` escapes the bytes that are not UTF-8.
        raise ValueError(f"{str(path)!r} is not UTF-8; rename it.") from None


def check_literal(path):
    """Raises `ValueError` if TensorFlow takes a path for a pattern.

    TensorFlow reads the name of a checkpoint or SavedModel as a pattern of file names.
    The name then does not match itself, or matches another file, too.
    """
    check_encoding(path)
    if found := sorted(set(str(path)) & set("*?[\\")):
        raise ValueError(
            f"{path} has {' '.join(found)}, with which TensorFlow cannot read "
            "checkpoints and SavedModels; rename the folder, or give a relative path."
        )
