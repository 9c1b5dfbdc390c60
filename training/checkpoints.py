"""Checkpoints of a run: written whole, two of them kept, damaged ones passed over."""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import tensorflow as tf

from revnet_tf._files import replacing

KEPT = 2


class Checkpoints:
    """The checkpoints in a folder, each a folder `step-N` of its own.

    Args:
        folder: path; it need not exist.
        is_chief: whether this process writes them. The other workers save too, since
            they take part in reading variables that they share, but do not keep it.
        **objects: what a checkpoint holds, as `tf.train.Checkpoint` takes it.
    """

    def __init__(self, folder, is_chief=True, **objects):
        self.folder = folder
        self.is_chief = is_chief
        self._checkpoint = tf.train.Checkpoint(**objects)

    def save(self, step):
        if not self.is_chief:
            with tempfile.TemporaryDirectory() as folder:
                self._checkpoint.write(str(Path(folder, "variables")))
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step}"
        shutil.rmtree(path, ignore_errors=True)  # It was damaged, or passed over.
        with replacing(path) as part:
            self._checkpoint.write(str(part / "variables"))
        for old in self._saved()[:-KEPT]:
            shutil.rmtree(old)

    def restore(self):
        """Restores the last checkpoint that can be read, and returns its step, or 0.

        Raises:
            OSError: there are checkpoints, and none can be read.
        """
        if self.is_chief:
            for part in self.folder.glob("part-*"):
                shutil.rmtree(part)
        saved = self._saved()
        for path in reversed(saved):
            try:
                self._checkpoint.read(str(path / "variables")).assert_consumed()
                return _step(path)
            except (tf.errors.OpError, IndexError) as error:
                reason = str(error).splitlines()[0]
                print(f"{path} is damaged and passed over: {reason}", file=sys.stderr)
        if saved:
            raise OSError(
                f"none of the checkpoints in {self.folder} can be read; remove the "
                "folder to begin the run anew."
            )
        return 0

    def _saved(self):
        paths = [p for p in self.folder.glob("step-*") if re.search(r"-\d+$", p.name)]
        return sorted(paths, key=_step)


def _step(path):
    return int(path.name.removeprefix("step-"))
