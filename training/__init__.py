"""The training program: from a recipe to a run folder.

`python -m training.train` trains, `training.evaluate` scores a finished run,
`training.predict` predicts with it, and `training.export` exports it again. The program
runs from a checkout, and is no part of the wheel.
"""

import os

# Whether the programs show their own lines only. At its start TensorFlow logs the
# drivers and instructions that it did not find.
QUIET = "TF_CPP_MIN_LOG_LEVEL" not in os.environ
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
