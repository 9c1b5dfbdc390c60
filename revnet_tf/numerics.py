"""Rounding in reconstructed activations, and its effect on gradients.

The backward pass reconstructs activations. Because of rounding, they differ from those
of the forward pass. The difference grows with each block.

- `reconstruction_error` measures the difference by block.
- `gradient_angle` measures its effect on the gradient.
- `ReversibilityMonitor` watches both while a model is trained.
- `set_anchors` bounds both.

Reference: Gomez et al., 2017, section 3.3, https://arxiv.org/abs/1707.04585
"""

import os
import warnings
from typing import Any

import keras
import tensorflow as tf

from revnet_tf import _probe
from revnet_tf._files import replacing
from revnet_tf._probe import BlockError, GradientAngle

__all__ = [
    "BlockError",
    "GradientAngle",
    "ReversibilityMonitor",
    "draw",
    "gradient_angle",
    "reconstruction_error",
    "set_anchors",
]

# The task decides which bounds training needs. A gradient in float32 is itself some
# tenths of a degree away from that in float64. A gradient that is 10 degrees off has
# 98 % of its length in the right direction.
MAX_ERROR = 0.1
MAX_ANGLE = 10.0


def reconstruction_error(
    model_or_layer: keras.layers.Layer, x: Any
) -> dict[str, BlockError]:
    """Measures reconstructed activations against those of the forward pass.

    The function calls the model with `training=True` and makes the backward pass of a
    training step. The compiled model decides between eager mode, a graph and XLA. A
    layer runs as a graph. Nothing in the model changes: no weight, statistic, seed or
    loss. The pass stores the inputs of all blocks, as ordinary backpropagation does.

    Args:
        model_or_layer: built `keras.Model` or layer.
        x: tensor or nested tensors, one batch of inputs.

    Returns:
        A dict from the path of a `RevBlock` to its `BlockError`, in forward order.
        Equal paths get a number: `block`, `block_1`. The dict has no blocks with
        `recompute=False`. For a block that is called several times it has the largest
        error.

    Raises:
        ValueError: the model or layer is not built.
    """
    _, errors = _probe.Pass(model_or_layer, _sum, [x])()
    return errors


def gradient_angle(
    model: keras.Model, x: Any, y: Any, sample_weight: Any = None
) -> GradientAngle:
    """Measures the angle between the gradients with and without reconstruction.

    Both are gradients of the compiled loss, with regularization and loss scaling, at
    the same weights, statistics and dropout masks. The passes are those of a training
    step, as in `reconstruction_error`; nothing in the model changes. The second pass
    needs the memory of ordinary backpropagation for the batch.

    Args:
        model: built and compiled `keras.Model`.
        x, y, sample_weight: one batch, the arguments of `model.train_on_batch`.

    Returns:
        A `GradientAngle`. An angle is infinite if only the gradient with reconstructed
        activations is not finite. It is NaN if the other gradient is not finite, and 90
        degrees if one of the two is zero.

    Raises:
        ValueError: the model is not built, or not compiled.
    """
    return _probe.Probe(model, x, y, sample_weight).measure()[1]


def set_anchors(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    max_error: float = MAX_ERROR,
    max_angle: float = MAX_ANGLE,
) -> list[str]:
    """Sets `anchor` on every k-th block, with a k that bounds error and angle.

    The first `k` is the distance from the last block at which the error exceeds its
    bound. The function halves `k` until both measurements on the batch are below their
    bounds, or all blocks are anchors. An anchor costs the memory of the block's two
    inputs. Afterwards trace the training step again:
    `model.make_train_function(force=True)`.

    Args:
        model, x, y, sample_weight: the arguments of `gradient_angle`.
        max_error: float, the highest relative reconstruction error.
        max_angle: float, the highest overall gradient angle, in degrees.

    Returns:
        The names of the anchors in forward order, the keys of `reconstruction_error`.
    """
    return _probe.Probe(model, x, y, sample_weight).set_anchors(max_error, max_angle)


class ReversibilityMonitor(keras.callbacks.Callback):
    """Watches reconstruction error and gradient angle while a model is trained.

    The monitor measures both on one batch, before the first step and then after every
    `every_steps` steps. It does not change the result of the training.

    A measurement costs the CPU time of 2.05 training steps with as many samples. It has
    7 evaluations of the branches, a step has 4. One measurement every 100 steps adds
    2 %. It needs the memory of ordinary backpropagation for its batch, which can be
    small.

    The monitor writes the largest values of an epoch to its logs: the
    `reconstruction_error` (relative, of the worst block) and the `gradient_angle`
    (degrees). `History` reads them there. `CSVLogger` and `TensorBoard` also do, if
    they follow the monitor in the list of callbacks.

    A training loop of your own calls the monitor as `fit` does, after
    `monitor.set_model(model)`. Compile the model with the loss first.

    Args:
        x, y: tensors or nested tensors, the batch.
        every_steps: int, the number of training steps between two measurements.
        max_error, max_angle: floats, the bounds of `set_anchors`. The monitor warns if
            a value exceeds its bound, and names the block.
        anchor: bool; `True`: after such a value, call `set_anchors` and continue the
            training with the anchors. A training loop of your own must trace its step
            again after the warning. Defaults to `False`.
        plot: path of an image that the monitor draws after each epoch. It needs
            Matplotlib. Defaults to `None`, no image.

    Attributes:
        rows: list of a dict for each measurement: `step`, `reconstruction_error`,
            `block` (the worst), `gradient_angle`. `step` counts the iterations of the
            model's optimizer. If the loop does not use it, `step` counts the batches.

    Reference:
        Gomez et al., 2017, section 3.3, https://arxiv.org/abs/1707.04585
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        every_steps: int = 100,
        *,
        max_error: float = MAX_ERROR,
        max_angle: float = MAX_ANGLE,
        anchor: bool = False,
        plot: str | os.PathLike | None = None,
    ):
        super().__init__()
        if type(every_steps) is not int or every_steps < 1:
            raise ValueError(
                "every_steps must be an integer above 0; got "
                f"every_steps={every_steps!r}."
            )
        if plot is not None:
            import matplotlib  # noqa: F401  Fails now if it is missing, not after hours.
        self.x = x
        self.y = y
        self.every_steps = every_steps
        self.max_error = max_error
        self.max_angle = max_angle
        self.anchor = anchor
        self.plot = plot
        self.rows = []
        self._probe = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self.model is None:
            raise ValueError(
                "Expected a model; ReversibilityMonitor has none yet. Call "
                "`monitor.set_model(model)` before training."
            )
        self._probe = _probe.Probe(self.model, self.x, self.y)
        self._first_step = self._iterations()
        self._ended_batches = 0
        self._epoch_rows = []
        self._warned = False
        self._measure()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._begin_once()
        self._ended_batches += 1
        steps = self._step() - self.rows[-1]["step"]
        # With `steps_per_execution` one call ends several steps.
        if steps >= self.every_steps:
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._begin_once()
        rows = self._epoch_rows or self.rows[-1:]
        if logs is not None:
            for name in ("reconstruction_error", "gradient_angle"):
                logs[name] = max((row[name] for row in rows), key=_probe.nan_last)
        self._epoch_rows = []
        if self.plot is not None:
            draw(self.plot, self.rows, self.max_error, self.max_angle)

    def _begin_once(self):
        """Calls `on_train_begin` if the loop has not called it with this model."""
        if self._probe is None or self._probe.model is not self.model:
            self.on_train_begin()

    def _iterations(self):
        optimizer = self.model.optimizer
        return 0 if optimizer is None else int(optimizer.iterations.numpy())

    def _step(self):
        iterations = self._iterations()
        if iterations > self._first_step:
            return iterations
        return self._first_step + self._ended_batches

    def _measure(self):
        errors, angle = self._probe.measure()
        block = _probe.worst(errors)
        error = errors[block].relative
        row = {
            "step": self._step(),
            "reconstruction_error": error,
            "block": block,
            "gradient_angle": angle.overall,
        }
        self.rows.append(row)
        self._epoch_rows.append(row)
        if _probe.within(errors, angle, self.max_error, self.max_angle):
            return
        found = (
            f"After step {row['step']}, the reconstructed inputs of {block} differ by "
            f"{error:.2g} of their norm (max_error={self.max_error:g}). The gradient "
            f"differs by {angle.overall:.2g} degrees from that of stored activations "
            f"(max_angle={self.max_angle:g}). "
        )
        if self.anchor and not all(b.anchor for b in self._probe.blocks.values()):
            anchors = self._probe.set_anchors(self.max_error, self.max_angle)
            self.model.make_train_function(force=True)
            warnings.warn(
                f"{found}{len(anchors)} of {len(errors)} blocks are anchors from now "
                f"on, and store their inputs: {', '.join(anchors)}.",
                stacklevel=2,
            )
            self._measure()
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{found}Set `anchor=True` on some blocks (here, or with "
                "`revnet_tf.numerics.set_anchors`), give the blocks `fraction_bits`, "
                "use float32 for their streams, or normalize the outputs of their "
                "branches.",
                stacklevel=2,
            )


def draw(
    path: str | os.PathLike, rows: list[dict], max_error: float, max_angle: float
) -> None:
    """Draws the rows of a `ReversibilityMonitor` over the steps, into an image file."""
    # This class needs no display and does not change pyplot's state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        ("reconstruction_error", "gradient_angle"),
        ("relative reconstruction error", "gradient angle, degrees"),
        (max_error, max_angle),
        strict=True,
    )
    steps = [row["step"] for row in rows]
    for ax, name, label, bound in panels:
        ax.plot(steps, [row[name] for row in rows], marker=".")
        ax.axhline(bound, color="C3", linestyle="--", label="bound")
        ax.set(xlabel="step", ylabel=label, yscale="log")
        ax.grid(alpha=0.3)
        ax.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def _sum(outputs, x):
    return tf.add_n(
        [
            tf.reduce_sum(tf.cast(y, tf.float32))
            for y in tf.nest.flatten(outputs)
            if y.dtype.is_floating
        ]
    )
