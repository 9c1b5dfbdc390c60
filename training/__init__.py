"""The training program: from a recipe to a run folder.

`python -m training.train` trains, `training.evaluate` scores a finished run and
`training.export` writes it again. Runs from a checkout, and is no part of the wheel.
"""
