"""Command lines that answer a mistake in one line."""

import argparse
import difflib
import os
import sys
import tempfile
from pathlib import Path

import training


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without usage before an error and guesses at flags."""

    def __init__(self, **kwargs):
        self.flags = []
        super().__init__(allow_abbrev=False, **kwargs)

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        self.flags += action.option_strings
        return action

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), None)
            if flag is None:
                self.error(f"unexpected {unknown[0]!r}: it belongs to no flag")
            flag = flag.partition("=")[0]
            self.error(f"unexpected {flag}: {suggestion(flag, self.flags)}")
        return parsed

    def error(self, message):
        self.fail(2, message)

    def fail(self, status, message):
        """Ends the program with one line on stderr."""
        self.exit(status, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def load_tensorflow():
    """Imports TensorFlow and Keras, without the messages of their start on stderr.

    The libraries of TensorFlow write some messages before they read the log level. The
    variable `TF_CPP_MIN_LOG_LEVEL` shows them, as it does where the import ends the
    process.
    """
    if not training.QUIET or "tensorflow" in sys.modules:
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        try:
            import keras  # noqa: F401
        except BaseException:
            messages.seek(0)
            os.write(stderr, messages.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def io_errors():
    """Returns the errors of a full or read-only disk, TensorFlow's own included."""
    import tensorflow as tf  # It takes seconds to load.

    return OSError, tf.errors.OpError


def one_of(options):
    """Returns an argument type that accepts the words in `options`."""

    def parse(word):
        if word not in options:
            raise argparse.ArgumentTypeError(
                f"invalid value {word!r}: {suggestion(word, options)}"
            )
        return word

    return parse


def path(text):
    """Returns the path of an argument that is not empty, as an unset variable is."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, received an empty string")
    return Path(text)


def suggestion(word, options):
    near = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(options)}"
