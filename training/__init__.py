"""The training program: from a recipe to a run folder.

`python -m training.train` trains, `training.evaluate` scores a finished run and
`training.export` writes it again. Runs from a checkout, and is no part of the wheel.
"""

import os

# TensorFlow reports at its start which drivers and instructions it did not find; what
# matters of that here is that it chose a device.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
