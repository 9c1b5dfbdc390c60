"""How far rebuilt activations are from the true ones, and what that does to gradients.

Rounding makes what the backward pass rebuilds differ from what the forward pass had,
more with every block. `reconstruction_error` measures it by block, `gradient_angle`
measures what it does to the gradient, `ReversibilityMonitor` watches both while a model
is trained, and `set_anchors` bounds them.

Reference: Gomez et al., 2017, section 3.3, https://arxiv.org/abs/1707.04585
"""

import math
import warnings
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from revnet_tf._files import replacing
from revnet_tf._layer import Observer
from revnet_tf.layers import RevBlock

# Where training begins to suffer is for the task to say. A gradient of float32 is
# itself some tenths of a degree away from that of float64, and one that is 10 degrees
# off has still 98 % of its length in the right direction.
MAX_ERROR = 0.1
MAX_ANGLE = 10.0


class BlockError(NamedTuple):
    """How far the rebuilt inputs of a block are from the true ones.

    Attributes:
        relative: norm of the difference, divided by that of the true inputs.
        absolute: largest difference of two numbers.
    """

    relative: float
    absolute: float


class GradientAngle(NamedTuple):
    """Angles between the gradients with rebuilt and with stored activations, degrees.

    Attributes:
        overall: of all trainable variables as one vector.
        by_variable: by the path of the variable.
    """

    overall: float
    by_variable: dict


def reconstruction_error(model_or_layer, x):
    """Measures what the backward pass rebuilds, against what the forward pass had.

    The model is called with `training=True`, and the backward pass of a training step
    is made: in eager mode, as a graph or with XLA, as the model is compiled (a layer as
    a graph). Nothing in the model changes: no weight, statistic, seed or loss. All
    inputs of blocks are kept meanwhile, as in ordinary backpropagation.

    Args:
        model_or_layer: a built `keras.Model` or layer.
        x: one batch of inputs.

    Returns:
        A dict of `BlockError`s by the path of the `RevBlock`, in forward order. Blocks
        that are not rebuilt (`recompute=False`) are not in it; of a block that is
        called several times it has the largest.

    Raises:
        ValueError: the model or layer is not built.
    """
    _, errors = _Pass(model_or_layer, _sum, [x])()
    return errors


def gradient_angle(model, x, y, sample_weight=None):
    """Measures the angle between the gradients with rebuilt and stored activations.

    Both are gradients of the compiled loss, with regularization and loss scaling, at
    the same weights, statistics and dropout masks, made as by a training step (see
    `reconstruction_error`); nothing in the model changes. The second needs the memory
    of ordinary backpropagation for the batch.

    Args:
        model: a built and compiled `keras.Model`.
        x, y, sample_weight: one batch, as `model.train_on_batch` takes it.

    Returns:
        A `GradientAngle`. An angle is infinite where only the gradient with rebuilt
        activations is not finite, NaN where the other one is not either, and 90
        degrees where one of both is zero.

    Raises:
        ValueError: the model is not built, or not compiled.
    """
    return _Probe(model, x, y, sample_weight).measure()[1]


def set_anchors(
    model, x, y, sample_weight=None, *, max_error=MAX_ERROR, max_angle=MAX_ANGLE
):
    """Sets `anchor` on every k-th block, with a k that keeps error and angle bounded.

    `k` starts where the error passes its bound, and is halved until both measurements
    on the batch are below their bounds, or all blocks are anchors. An anchor costs the
    memory of the block's two inputs. The training step has to be traced anew:
    `model.make_train_function(force=True)`.

    Args:
        model, x, y, sample_weight: as for `gradient_angle`.
        max_error: highest relative reconstruction error.
        max_angle: highest overall gradient angle, in degrees.

    Returns:
        The paths of the blocks that are anchors now, in forward order.
    """
    return _Probe(model, x, y, sample_weight).set_anchors(max_error, max_angle)


class ReversibilityMonitor(keras.callbacks.Callback):
    """Watches reconstruction error and gradient angle while a model is trained.

    Both are measured on one batch, before the first step and after every
    `every_steps` more; training ends in the very same weights as without. A measurement
    computes as much as 2 training steps with as many samples (2.05 in CPU time; 7
    evaluations of the branches where a step has 4): one every 100 steps adds 2 %. It
    needs the memory of ordinary backpropagation for its batch, which can be small.

    The largest values of an epoch go to its logs, as `reconstruction_error` (relative,
    of the worst block) and `gradient_angle` (degrees), where `History`, and a
    `CSVLogger` or `TensorBoard` further on in the list of callbacks, find them.

    Args:
        x, y: the batch.
        every_steps: number of training steps between two measurements.
        max_error, max_angle: a warning that names the block says when one of them is
            passed; as for `set_anchors`.
        anchor: whether to `set_anchors` then, and to train on with them.
        plot: path of an image that is drawn anew after each epoch; needs Matplotlib.

    Attributes:
        rows: a dict for each measurement: `step`, `reconstruction_error`, `block` (the
            worst), `gradient_angle`.

    Reference:
        Gomez et al., 2017, section 3.3, https://arxiv.org/abs/1707.04585
    """

    def __init__(
        self,
        x,
        y,
        every_steps=100,
        *,
        max_error=MAX_ERROR,
        max_angle=MAX_ANGLE,
        anchor=False,
        plot=None,
    ):
        super().__init__()
        if type(every_steps) is not int or every_steps < 1:
            raise ValueError(f"every_steps={every_steps!r} must be an integer above 0.")
        if plot is not None:
            import matplotlib  # noqa: F401  Its absence is said now, not after hours.
        self.x = x
        self.y = y
        self.every_steps = every_steps
        self.max_error = max_error
        self.max_angle = max_angle
        self.anchor = anchor
        self.plot = plot
        self.rows = []

    def on_train_begin(self, logs=None):
        self._probe = _Probe(self.model, self.x, self.y)
        self._epoch_rows = []
        self._warned = False
        self._measure()

    def on_train_batch_end(self, batch, logs=None):
        steps = self._step() - self.rows[-1]["step"]
        # With `steps_per_execution` several steps end at once.
        if steps >= self.every_steps:
            self._measure()

    def on_epoch_end(self, epoch, logs=None):
        rows = self._epoch_rows or self.rows[-1:]
        for name in ("reconstruction_error", "gradient_angle"):
            logs[name] = max((row[name] for row in rows), key=_nan_last)
        self._epoch_rows = []
        if self.plot is not None:
            draw(self.plot, self.rows, self.max_error, self.max_angle)

    def _step(self):
        return int(self.model.optimizer.iterations.numpy())

    def _measure(self):
        errors, angle = self._probe.measure()
        block = _worst(errors)
        error = errors[block].relative
        row = {
            "step": self._step(),
            "reconstruction_error": error,
            "block": block,
            "gradient_angle": angle.overall,
        }
        self.rows.append(row)
        self._epoch_rows.append(row)
        if _within(errors, angle, self.max_error, self.max_angle):
            return
        what = (
            f"After step {row['step']}, what is rebuilt of the inputs of {block} "
            f"differs by {error:.2g} of their norm (max_error={self.max_error:g}), and "
            f"the gradient by {angle.overall:.2g} degrees from that of stored "
            f"activations (max_angle={self.max_angle:g}). "
        )
        if self.anchor and not all(block.anchor for block in self._probe.blocks):
            anchors = self._probe.set_anchors(self.max_error, self.max_angle)
            self.model.make_train_function(force=True)
            warnings.warn(
                f"{what}{len(anchors)} of {len(errors)} blocks are anchors from now "
                f"on, and keep their inputs: {', '.join(anchors)}.",
                stacklevel=2,
            )
            self._measure()
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{what}Set `anchor=True` on some blocks (here, or with "
                "`revnet_tf.numerics.set_anchors`), give the blocks `fraction_bits`, "
                "keep their streams in float32, or normalize the outputs of their "
                "branches.",
                stacklevel=2,
            )


def draw(path, rows, max_error, max_angle):
    """Draws the rows of a `ReversibilityMonitor` over the steps, into an image file."""
    # A Figure of its own needs no display and leaves pyplot's state alone.
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


class _Pass:
    """Forward and backward pass of a training step that leaves the model as it was.

    Args:
        layer: a model or layer.
        loss: `loss(outputs, *data)` returns a scalar.
        data: list of what `loss` takes; the first one is the input of the layer.
        stored: whether activations are stored, whatever the layers say.

    Attributes:
        blocks: the blocks that are rebuilt, by path, in forward order.
    """

    def __init__(self, layer, loss, data, stored=False):
        if not layer.built:
            raise ValueError(
                f"{layer.name} has no weights yet; call or build it first."
            )
        self.layer = layer
        self.loss = loss
        self.stored = stored
        self.blocks = {}
        self._data = tf.nest.map_structure(tf.convert_to_tensor, data)
        self._function = _as_trained(layer, self._run, self._data)

    def __call__(self):
        """Returns the gradients, arrays or `None`, and a dict of `BlockError`s."""
        gradients, errors = self._function(*self._data)
        gradients = [None if d is None else d.numpy() for d in gradients]
        return gradients, {
            path: BlockError(*map(float, errors[path])) for path in self.blocks
        }

    def _run(self, x, *targets):
        observer = Observer(store=True) if self.stored else _Errors()
        variables = self.layer.trainable_variables
        weights = [tf.convert_to_tensor(v.value) for v in variables]
        inputs = [t for t in tf.nest.flatten(x) if t.dtype.is_floating]
        # The scope catches what is assigned and added meanwhile.
        scope = keras.StatelessScope(
            list(zip(variables, weights, strict=True)), collect_losses=True
        )
        with observer, scope, tf.GradientTape() as tape:
            tape.watch([*inputs, *weights])
            loss = self.loss(self.layer(x, training=True), x, *targets)
        gradients = tape.gradient(loss, [*inputs, *weights])[len(inputs) :]
        errors = {}
        if not self.stored:
            self.blocks = dict(reversed(observer.blocks.items()))
            errors = observer.errors
        # (that of a lookup is sparse)
        gradients = [d if d is None else tf.convert_to_tensor(d) for d in gradients]
        return gradients, errors


class _Errors(Observer):
    """Collects the error of each block, a tensor, by the path of the block."""

    def __init__(self):
        super().__init__()
        self.blocks, self.errors = {}, {}

    def reconstructed(self, block, inputs, rebuilt):
        if isinstance(block, RevBlock):
            error, path = _error(inputs, rebuilt), block.path
            self.errors[path] = tf.maximum(error, self.errors.get(path, error))
            self.blocks[path] = block


class _Probe:
    """Measures a compiled model on one batch, again and again."""

    def __init__(self, model, x, y, sample_weight=None):
        if not getattr(model, "compiled", False):
            raise ValueError(
                f"{model.name} is not compiled; the gradient is that of the loss that "
                "`model.compile` is given."
            )
        self.model = model
        self._data = [x, y] if sample_weight is None else [x, y, sample_weight]
        self._stored = _Pass(model, self._loss, self._data, stored=True)
        self._rebuilt = _Pass(model, self._loss, self._data)

    @property
    def blocks(self):
        """The blocks that were rebuilt when it was measured last, in forward order."""
        return list(self._rebuilt.blocks.values())

    def measure(self):
        """Returns the `BlockError`s by path, and the `GradientAngle`.

        Raises:
            ValueError: the model rebuilds nothing.
        """
        rebuilt, errors = self._rebuilt()
        if not errors:
            raise ValueError(
                f"{self.model.name} has no `RevBlock` whose activations are rebuilt in "
                "training; there is nothing to watch."
            )
        stored, _ = self._stored()
        return errors, _angle(rebuilt, stored, self.model.trainable_variables)

    def set_anchors(self, max_error, max_angle):
        errors, angle = self.measure()
        blocks = self.blocks
        spacing = max(len(blocks) // 2, 1)
        for distance, error in enumerate(reversed(errors.values())):
            if not error.relative <= max_error:
                spacing = max(distance, 1)
                break
        while spacing and not _within(errors, angle, max_error, max_angle):
            for distance, block in enumerate(reversed(blocks), 1):
                block.anchor = distance % spacing == 0
            self._rebuilt = _Pass(self.model, self._loss, self._data)
            errors, angle = self.measure()
            spacing //= 2
        return [block.path for block in blocks if block.anchor]

    def _loss(self, outputs, x, y, sample_weight=None):
        loss = self.model.compute_loss(x, y, outputs, sample_weight)
        # Without it, small gradients of float16 are lost that training keeps.
        return self.model.optimizer.scale_loss(loss)


def _as_trained(layer, function, data):
    """Returns `function` as it is executed in a training step, for such data."""
    strategy, jit_compile = tf.distribute.get_strategy(), None
    if isinstance(layer, keras.Model):
        strategy, jit_compile = layer.distribute_strategy, layer.jit_compile

    def on_one_replica(*data):
        return tf.nest.map_structure(
            lambda result: strategy.experimental_local_results(result)[0],
            strategy.run(function, args=data),
        )

    if isinstance(layer, keras.Model) and layer.run_eagerly:
        return on_one_replica
    return tf.function(
        on_one_replica, autograph=False, jit_compile=jit_compile
    ).get_concrete_function(*data)


def _sum(outputs, x):
    return tf.add_n(
        [
            tf.reduce_sum(tf.cast(y, tf.float32))
            for y in tf.nest.flatten(outputs)
            if y.dtype.is_floating
        ]
    )


def _error(inputs, rebuilt):
    """Returns relative and absolute error as one tensor, computed in float64."""
    true, got = (
        tf.concat([tf.reshape(tf.cast(t, tf.float64), [-1]) for t in pair], 0)
        for pair in (inputs, rebuilt)
    )
    difference = got - true
    norm = tf.norm(difference)
    relative = tf.where(norm == 0, norm, norm / tf.norm(true))
    return tf.stack([relative, tf.reduce_max(tf.abs(difference))])


def _within(errors, angle, max_error, max_angle):
    """Whether both bounds are kept; NaN is not within, except as an angle."""
    error = errors[_worst(errors)].relative
    return error <= max_error and not angle.overall > max_angle


def _worst(errors):
    """Returns the path of the largest relative error; NaN is larger than any."""
    return max(errors, key=lambda path: _nan_last(errors[path].relative))


def _nan_last(value):
    return math.isnan(value), value


def _angle(rebuilt, stored, variables):
    """Returns the `GradientAngle` of two lists of gradients."""
    triples = [
        (v.path, np.asarray(a, "float64"), np.asarray(b, "float64"))
        for v, a, b in zip(variables, rebuilt, stored, strict=True)
        if b is not None
    ]
    return GradientAngle(
        _degrees([(a, b) for _, a, b in triples]),
        {path: _degrees([(a, b)]) for path, a, b in triples},
    )


def _degrees(pairs):
    """Returns the angle between two vectors, given in pairs of pieces.

    Twice the arc tangent of the norms of difference and sum of the unit vectors: unlike
    the arc cosine of their product it is right for small angles, too.
    """
    a_norm, b_norm = (
        math.sqrt(sum(np.vdot(pair[i], pair[i]) for pair in pairs)) for i in (0, 1)
    )
    if not math.isfinite(b_norm):
        return math.nan
    if not math.isfinite(a_norm):
        return math.inf
    if a_norm == 0 or b_norm == 0:
        return 0.0 if a_norm == b_norm else 90.0
    difference, total = (
        math.sqrt(sum(np.sum((a / a_norm + sign * b / b_norm) ** 2) for a, b in pairs))
        for sign in (-1, 1)
    )
    return math.degrees(2 * math.atan2(difference, total))
