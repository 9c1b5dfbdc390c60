"""The forward and backward passes with which `numerics` measures a model."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from revnet_tf._layer import Observer
from revnet_tf.layers import RevBlock


class BlockError(NamedTuple):
    """The difference between the reconstructed and the true inputs of a block.

    Attributes:
        relative: float, the norm of the difference, divided by that of the true inputs.
        absolute: float, the largest difference of two values.
    """

    relative: float
    absolute: float


class GradientAngle(NamedTuple):
    """The angles in degrees between two gradients of one training step.

    The first gradient uses reconstructed activations, the second stored activations.

    Attributes:
        overall: float, the angle of the gradients for all trainable variables as one
            vector.
        by_variable: dict from the path of a variable to its angle. Equal paths get a
            number: `kernel`, `kernel_1`.
    """

    overall: float
    by_variable: dict[str, float]


class Pass:
    """Forward and backward pass of a training step. It does not change the model.

    Args:
        layer: built model or layer.
        loss: function, `loss(outputs, *data)` returns a scalar.
        data: list, the arguments of `loss`. The first is the input of the layer.
        stored: bool, whether the pass stores all activations. Defaults to `False`.

    Attributes:
        blocks: dict from a unique name to a block whose inputs the pass reconstructs,
            in forward order.
    """

    def __init__(self, layer, loss: Callable, data: list, stored: bool = False):
        if not layer.built:
            raise ValueError(
                f"Expected a layer with weights; {layer.name} has none yet. Call or "
                "build it first."
            )
        self.layer = layer
        self.loss = loss
        self.stored = stored
        self.blocks = {}
        self._data = tf.nest.map_structure(tf.convert_to_tensor, data)
        self._function = _as_trained(layer, self._run, self._data)

    def __call__(self) -> tuple[list, dict[str, BlockError]]:
        """Returns the gradients, as arrays or `None`, and the errors by block."""
        gradients, errors = self._function(*self._data)
        gradients = [None if d is None else d.numpy() for d in gradients]
        errors = [BlockError(*map(float, error)) for error in errors]
        return gradients, dict(zip(self.blocks, errors, strict=True))

    def _run(self, x, *targets):
        observer = Observer(store=True) if self.stored else _Errors()
        variables = self.layer.trainable_variables
        weights = [tf.convert_to_tensor(v.value) for v in variables]
        inputs = [t for t in tf.nest.flatten(x) if t.dtype.is_floating]
        # The scope collects assignments and losses of the pass.
        scope = keras.StatelessScope(
            list(zip(variables, weights, strict=True)), collect_losses=True
        )
        with observer, scope, tf.GradientTape() as tape:
            tape.watch([*inputs, *weights])
            loss = self.loss(self.layer(x, training=True), x, *targets)
        gradients = tape.gradient(loss, [*inputs, *weights])[len(inputs) :]
        # The gradient of a lookup is sparse.
        gradients = [d if d is None else tf.convert_to_tensor(d) for d in gradients]
        # The backward pass goes from the last block to the first.
        errors = {} if self.stored else observer.errors
        blocks = list(reversed(errors))
        self.blocks = dict(zip(_unique(b.path for b in blocks), blocks, strict=True))
        return gradients, [errors[block] for block in blocks]


class _Errors(Observer):
    """Collects the error of each block as a tensor, the largest of all its calls."""

    def __init__(self):
        super().__init__()
        self.errors = {}

    def reconstructed(self, block, inputs, reconstructed):
        if isinstance(block, RevBlock):
            error = _error(inputs, reconstructed)
            self.errors[block] = tf.maximum(error, self.errors.get(block, error))


class Probe:
    """Measures a compiled model on one batch, any number of times."""

    def __init__(self, model, x, y, sample_weight=None):
        if not getattr(model, "compiled", False):
            raise ValueError(
                f"Expected a compiled model; {model.name} is not compiled. Call "
                "`model.compile` with the loss whose gradient is measured."
            )
        self.model = model
        self._data = [x, y] if sample_weight is None else [x, y, sample_weight]
        self._stored = Pass(model, self._loss, self._data, stored=True)
        self._reconstructed = Pass(model, self._loss, self._data)

    @property
    def blocks(self) -> dict[str, RevBlock]:
        """The blocks of the last measurement by name, in forward order."""
        return self._reconstructed.blocks

    def measure(self) -> tuple[dict[str, BlockError], GradientAngle]:
        """Measures the errors of the blocks and the angle of the gradient.

        Raises:
            ValueError: the model reconstructs nothing.
        """
        reconstructed, errors = self._reconstructed()
        if not errors:
            raise ValueError(
                "Expected a `RevBlock` that reconstructs activations in training; "
                f"{self.model.name} has none, so there is nothing to watch. Set "
                "`recompute=True` on a block."
            )
        stored, _ = self._stored()
        return errors, angle(reconstructed, stored, self.model.trainable_variables)

    def set_anchors(self, max_error: float, max_angle: float) -> list[str]:
        """Sets anchors as `numerics.set_anchors` does, and returns their names."""
        errors, found = self.measure()
        blocks = list(self.blocks.values())
        spacing = max(len(blocks) // 2, 1)
        for distance, error in enumerate(reversed(errors.values())):
            if not error.relative <= max_error:
                spacing = max(distance, 1)
                break
        while spacing and not within(errors, found, max_error, max_angle):
            for distance, block in enumerate(reversed(blocks), 1):
                block.anchor = distance % spacing == 0
            self._reconstructed = Pass(self.model, self._loss, self._data)
            errors, found = self.measure()
            spacing //= 2
        return [name for name, block in self.blocks.items() if block.anchor]

    def _loss(self, outputs, x, y, sample_weight=None):
        loss = self.model.compute_loss(x, y, outputs, sample_weight)
        if self.model.optimizer is None:
            return loss
        # Without the scale of training, small float16 gradients would become zero.
        return self.model.optimizer.scale_loss(loss)


def within(errors, found: GradientAngle, max_error: float, max_angle: float) -> bool:
    """Returns whether both bounds hold. NaN violates only the bound of the error."""
    error = errors[worst(errors)].relative
    return error <= max_error and not found.overall > max_angle


def worst(errors: dict[str, BlockError]) -> str:
    """Returns the block with the largest relative error. NaN counts as the largest."""
    return max(errors, key=lambda name: nan_last(errors[name].relative))


def nan_last(value: float) -> tuple:
    """Returns a sort key that puts NaN after all other values."""
    return math.isnan(value), value


def angle(reconstructed, stored, variables) -> GradientAngle:
    """Returns the angles between two lists of gradients for `variables`."""
    names = _unique(v.path for v in variables)
    triples = [
        (name, np.asarray(a, "float64"), np.asarray(b, "float64"))
        for name, a, b in zip(names, reconstructed, stored, strict=True)
        if b is not None
    ]
    return GradientAngle(
        degrees([(a, b) for _, a, b in triples]),
        {name: degrees([(a, b)]) for name, a, b in triples},
    )


def degrees(pairs) -> float:
    """Returns the angle between two vectors, given as a list of pairs of parts.

    The angle is twice the arc tangent of the norms of difference and sum of the unit
    vectors. Unlike the arc cosine of their product it is exact for small angles.
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


def _unique(paths: Iterable[str]) -> list[str]:
    """Returns the paths, with a number after each that occurred before."""
    paths, names = list(paths), []
    for path in paths:
        name, number = path, 0
        while name in names or (number and name in paths):
            number += 1
            name = f"{path}_{number}"
        names.append(name)
    return names


def _as_trained(layer, function, data):
    """Returns `function` in the mode of a training step, for data of these shapes."""
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


def _error(inputs, reconstructed):
    """Returns relative and absolute error as one tensor, computed in float64."""
    true, got = (
        tf.concat([tf.reshape(tf.cast(t, tf.float64), [-1]) for t in pair], 0)
        for pair in (inputs, reconstructed)
    )
    difference = got - true
    norm = tf.norm(difference)
    relative = tf.where(norm == 0, norm, norm / tf.norm(true))
    return tf.stack([relative, tf.reduce_max(tf.abs(difference))])
