"""The training program: from a recipe to a run folder.

`python -m training.train` trains, `training.evaluate` scores a finished run and
`training.export` exports it again. The program runs from a checkout, and is no part of
the wheel.
"""

import os

# At its start TensorFlow logs the drivers and instructions that it did not find.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
