"""The checkpoints of a run, each written as a whole. Damaged ones are passed over."""

import shutil
import sys
import tempfile
from pathlib import Path

import tensorflow as tf

from revnet_tf._files import replacing
from training import outputs, runs

NUM_STORED = 2


class Checkpoints:
    """The checkpoints in a folder, each a folder `step-N` with variables and a record.

    Args:
        folder: path of the folder; it need not exist.
        is_chief: bool, whether this process writes the checkpoints. The other workers
            take part in reading the variables that they share, and write nothing.
        **objects: the variables, as `tf.train.Checkpoint` takes them.
    """

    def __init__(self, folder, is_chief=True, **objects):
        self.folder = folder
        self.is_chief = is_chief
        self._checkpoint = tf.train.Checkpoint(**objects)

    def save(self, step, record):
        """Writes a checkpoint, and removes all but the last `NUM_STORED`.

        Args:
            step: int, the number of steps that are done.
            record: dictionary of the state beside the variables, as JSON has it.
        """
        if not self.is_chief:
            with tempfile.TemporaryDirectory() as folder:
                self._checkpoint.write(str(Path(folder, "variables")))
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step}"
        shutil.rmtree(path, ignore_errors=True)  # It was damaged and passed over.
        with replacing(path) as part:
            self._checkpoint.write(str(part / "variables"))
            outputs.write_json(part / runs.RECORD, record)
        for old in list(runs.checkpoints(self.folder).values())[:-NUM_STORED]:
            shutil.rmtree(old)

    def restore(self):
        """Restores the last checkpoint that can be read.

        Returns:
            The step and the record. Without a checkpoint the step is 0. The record is
            empty without a checkpoint, and in a checkpoint of an older version.

        Raises:
            OSError: no checkpoint can be read, or a checkpoint has other variables.
        """
        if self.is_chief:
            outputs.remove_parts(self.folder)
        found = runs.checkpoints(self.folder)
        for step, path in reversed(found.items()):
            try:
                record = runs.record(path)
                self._checkpoint.read(str(path / "variables")).assert_consumed()
                return step, record
            except (
                AssertionError,
                ValueError,
                tf.errors.InvalidArgumentError,
            ) as error:
                raise OSError(
                    f"{path} holds other variables than the network of this run; "
                    "remove it, or resume with the version that wrote it."
                ) from error
            except (tf.errors.OpError, IndexError, OSError) as error:
                reason = str(error).splitlines()[0]
                print(f"{path} is damaged and passed over: {reason}", file=sys.stderr)
        if found:
            raise OSError(
                f"none of the checkpoints in {self.folder} can be read; remove the "
                "folder to begin the run again."
            )
        return 0, {}
