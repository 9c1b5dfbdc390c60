"""What a training step keeps in memory: predicted, measured, and fitted to a budget.

`estimate` runs through the operations of the training step without computing anything,
and counts the bytes that are alive. `measure` makes training steps and asks the
device's allocator. `plan` chooses which blocks are recomputed, so that a step is as
fast as a budget allows.

The step is that of `model.fit`: forward pass, gradient, and update by the model's
optimizer if it is compiled; as a graph, or with XLA if `model.jit_compile` says so. As
the loss stands the mean square of the outputs. Beside it a process has the memory of
Python and TensorFlow themselves, and of the input pipeline.
"""

import dataclasses
import functools
import math
import os
from typing import NamedTuple

import keras
import tensorflow as tf

# The result of XLA's compilation has no public reader. (A test notices if this goes.)
from tensorflow.compiler.xla.service import hlo_pb2

from revnet_tf._executor import num_bytes, simulate, size_of
from revnet_tf._layer import Observer, RunLayer

__all__ = [
    "Memory",
    "Stage",
    "estimate",
    "measure",
    "plan",
    "recomputing_layers",
    "split_large_region",
]

# An estimate can be some percent too low: a plan leaves this much room.
PLAN_MARGIN = 1.08


class Stage(NamedTuple):
    """What a part of the model keeps between the forward and the backward pass.

    Attributes:
        name: of the reversible layer; `"other layers"` stands for all others.
        kept_bytes: size of its tensors that are alive when the loss is there.
    """

    name: str
    kept_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a training step keeps, in bytes.

    Attributes:
        activation_bytes: the peak less weights, gradients and optimizer.
        working_set_bytes: what of `activation_bytes` is not kept from the forward pass,
            but there for a moment: the block that is just differentiated.
        weight_bytes: all variables of the model.
        gradient_bytes: the gradients of all trainable ones.
        optimizer_bytes: the variables of the optimizer, 0 of a model without one.
        peak_bytes: the sum of all but `working_set_bytes`, a part of the activations.
        stages: a `Stage` for each reversible layer, in forward order, and one for all
            other layers. Empty if measured, or with XLA.
    """

    activation_bytes: int
    working_set_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    stages: tuple = ()

    def __str__(self):
        rows = [
            (f"kept for the backward pass: {stage.name}", stage.kept_bytes)
            for stage in self.stages
        ]
        if not rows:
            kept = self.activation_bytes - self.working_set_bytes
            rows.append(("kept for the backward pass", kept))
        rows += [
            ("working set of the backward pass", self.working_set_bytes),
            ("weights", self.weight_bytes),
            ("gradients", self.gradient_bytes),
            ("optimizer", self.optimizer_bytes),
            ("peak of a training step", self.peak_bytes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:{width}} {size / 1e6:12,.2f} MB" for name, size in rows
        )


def estimate(model: keras.Model, batch_size: int) -> Memory:
    """Predicts what a training step keeps, without making one.

    The operations are gone through as TensorFlow's executor does: what has become ready
    last comes first (the largest peak of several such orders counts), as many at a time
    as `tf.config.threading` says; those that can write over an input, as additions
    can, need no memory. What happens within a `tf.while_loop` or a `tf.cond` is not
    seen. With XLA the figures are those of the compiled step.

    Args:
        model: a built functional or sequential `keras.Model`.
        batch_size: samples of a step, on one device.

    Returns:
        A `Memory`.

    Raises:
        ValueError: the shape of the model's inputs is not known.
    """
    step, graph, calls = _traced(model, batch_size)
    if step.jit_compile:
        return step.compiled()
    peak, kept = simulate(graph, step.boundary)
    names = [layer.name for layer in calls.values()]
    stages = dict.fromkeys([*names, "other layers"], 0)
    for name, size in kept:
        owners = [layer for scope, layer in calls.items() if name.startswith(scope)]
        stages[owners[0].name if owners else "other layers"] += size
    return step.memory(peak, sum(stages.values()), stages)


def measure(model: keras.Model, batch_size: int) -> Memory:
    """Measures what a training step keeps, by the device's allocator.

    Three steps are made, on random numbers; the variables have their values back then.
    With XLA the figures are those that the compiler assigns to the step.

    Args:
        model, batch_size: as for `estimate`.

    Returns:
        A `Memory`.

    Raises:
        ValueError: as for `estimate`.
        RuntimeError: the allocator keeps no account. On processors for which TensorFlow
            does not use oneDNN by default, TF_ENABLE_ONEDNN_OPTS=1 has it keep one.
            Tensors below 256 KiB are not in it: `batch_size` should make them larger.
    """
    step = _Step(model, batch_size)
    return step.compiled() if step.jit_compile else step.measured()


def plan(model: keras.Model, batch_size: int, budget_bytes: int) -> keras.Model:
    """Chooses what is recomputed, so that a step is as fast as a budget allows.

    The last blocks store their activations, as many as the budget has room for by
    `estimate` and a margin; the others are recomputed. (What a block stores is in the
    way of all blocks before it, whose backward pass comes later, and of none after it.)

    Args:
        model: as for `estimate`. All its reversible layers have their `recompute` set
            by the plan, whatever it was.
        batch_size: samples of a step, on one device.
        budget_bytes: for activations, weights, gradients and optimizer.

    Returns:
        `model`, with the same weights.

    Raises:
        ValueError: the budget is below what is needed when everything is recomputed, or
            the model has no reversible layer.
    """
    _, _, calls = _traced(model, batch_size)
    layers = list(dict.fromkeys(calls.values()))
    blocks = [block for layer in layers for block, _ in layer.blocks_in_order()]
    if not blocks:
        raise ValueError(f"{model.name} has no reversible layer to plan for.")
    before = {layer: layer.recompute for layer in recomputing_layers(model)}

    def store(num_blocks):
        for layer in before:
            layer.recompute = True
        for i, block in enumerate(blocks):
            block.recompute = i < len(blocks) - num_blocks

    def peak(num_blocks, batch_size=batch_size):
        store(num_blocks)
        return math.ceil(PLAN_MARGIN * estimate(model, batch_size).peak_bytes)

    try:
        minimum = peak(0)
        if minimum > budget_bytes:
            batch = _largest_batch(
                functools.cache(lambda size: peak(0, size)), batch_size, budget_bytes
            )
            raise ValueError(
                f"budget_bytes={budget_bytes:,} is below the minimum of {minimum:,} "
                f"for batch_size={batch_size}; {batch}"
            )
        fits, too_many = 0, len(blocks) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if peak(middle) <= budget_bytes:
                fits = middle
            else:
                too_many = middle
    except BaseException:
        for layer, recompute in before.items():
            layer.recompute = recompute
        raise
    store(fits)
    if getattr(model, "train_function", None):
        model.make_train_function(force=True)
    return model


def recomputing_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers of a model with an attribute `recompute`, nested ones too."""
    # `_flatten_layers` finds layers in all attributes; no public method does.
    return [layer for layer in model._flatten_layers() if isinstance(layer, RunLayer)]


def split_large_region() -> None:
    """Has the CPU's allocator split all that it gives off one region.

    By itself it begins with a small one, and gives a free chunk away whole if it is
    less than twice as large as what is asked for. How much that wastes depends on the
    order in which threads free their tensors.
    """
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    with tf.device("CPU"):
        tf.raw_ops.Empty(shape=[pages // 2, page_bytes], dtype=tf.uint8)


def _largest_batch(peak, batch_size, budget_bytes):
    """Says what batch fits a budget that `batch_size` does not fit."""
    if batch_size == 1 or peak(1) > budget_bytes:
        return "not even a batch of 1 fits."
    # What grows, grows with the batch.
    a_sample = (peak(batch_size) - peak(1)) / (batch_size - 1)
    fits = int(1 + (budget_bytes - peak(1)) / a_sample)
    while peak(fits) > budget_bytes:
        fits -= max(1, fits // 50)
    return f"a batch of {fits} fits."


def _traced(model, batch_size):
    """Returns a `_Step`, its graph, and the reversible layers by the call's scope."""
    step = _Step(model, batch_size)
    with _Calls() as observer:
        graph = step.function.get_concrete_function(*step.specs).graph
    return step, graph, observer.calls


class _Calls(Observer):
    """Collects the layers that are called, by the name scope of the call."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def called(self, layer):
        self.calls[tf.get_current_name_scope() + "/"] = layer


class _Step:
    """A training step of a model, as a function of its inputs.

    Attributes:
        function: a `tf.function`.
        specs: what it takes, list of `tf.TensorSpec`.
        jit_compile: whether XLA compiles it.
        boundary: name of the operation after which, and not before, the backward pass
            begins; there once the function is traced.
    """

    def __init__(self, model, batch_size):
        if not getattr(model, "inputs", None):
            raise ValueError(
                f"{model.name} does not say what its inputs are; give a functional or "
                "sequential model, such as `keras.Model(x, layer(x))`."
            )
        self.model = model
        self.specs = [
            tf.TensorSpec((batch_size, *x.shape[1:]), x.dtype) for x in model.inputs
        ]
        for spec in self.specs:
            if None in spec.shape.as_list():
                raise ValueError(
                    f"{model.name} takes inputs of any size, {spec.shape}; build it "
                    "with the `input_shape` that it will be trained on."
                )
        compiled = getattr(model, "compiled", False)
        self.optimizer = model.optimizer if compiled else None
        self.jit_compile = bool(compiled and model.jit_compile)
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self.function = tf.function(
            self._step, autograph=False, jit_compile=self.jit_compile
        )
        self.boundary = None
        self._mark = None

    def _step(self, *inputs):
        model = self.model
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            # A sequential model has `inputs` and no `input`.
            sequential = isinstance(model, keras.Sequential)
            structure = model.inputs[0] if sequential else model.input
            outputs = model(tf.nest.pack_sequence_as(structure, inputs), training=True)
            losses = [
                tf.reduce_mean(tf.square(tf.cast(y, tf.float32)))
                for y in tf.nest.flatten(outputs)
            ]
            loss = tf.add_n([*losses, *(tf.cast(x, tf.float32) for x in model.losses)])
            if self.optimizer is not None:
                loss = self.optimizer.scale_loss(loss)
        with tf.control_dependencies([loss]):
            done = [tf.numpy_function(self._mark, [], [])] if self._mark else []
        with tf.control_dependencies([loss, *done]):
            d_loss = tf.ones_like(loss)
        self.boundary = d_loss.op.name
        gradients = tape.gradient(loss, variables, output_gradients=d_loss)
        if self.optimizer is None:
            return loss, [d for d in gradients if d is not None]
        self.optimizer.apply(gradients, variables)
        return loss

    def memory(self, peak, kept, stages=None):
        """Returns a `Memory`, of the bytes beside the variables."""
        weights = num_bytes(self.model.variables)
        gradients = num_bytes(self.model.trainable_variables)
        optimizer = num_bytes(self.optimizer.variables) if self.optimizer else 0
        return Memory(
            activation_bytes=peak - gradients,
            working_set_bytes=max(peak - gradients - kept, 0),
            weight_bytes=weights,
            gradient_bytes=gradients,
            optimizer_bytes=optimizer,
            peak_bytes=peak + weights + optimizer,
            stages=tuple(Stage(*stage) for stage in (stages or {}).items()),
        )

    def compiled(self):
        """Returns what XLA assigns to the step."""
        ir = self.function.experimental_get_compiler_ir(*self.specs)
        hlo = hlo_pb2.HloProto.FromString(ir(stage="optimized_hlo_proto_serialized"))
        peak = sum(
            allocation.size
            for allocation in hlo.buffer_assignment.buffer_allocations
            if not allocation.is_entry_computation_parameter
            and not allocation.is_constant
            and not allocation.is_thread_local
        )
        return self.memory(peak + num_bytes(self.specs), 0)

    def measured(self):
        """Returns what the device's allocator says of some steps."""
        variables = [*self.model.variables]
        if self.optimizer is not None:
            variables += self.optimizer.variables
        values = [v.numpy() for v in variables]
        device = _device()
        if device.startswith("CPU"):
            split_large_region()
        data = [_random(spec) for spec in self.specs]
        before, kept, peak = _allocated(device)["current"], 0, 0

        def mark():
            nonlocal kept
            kept = max(kept, _allocated(device)["current"])

        self._mark = mark
        try:
            for _ in range(3):
                tf.config.experimental.reset_memory_stats(device)
                self.function(*data)
                peak = max(peak, _allocated(device)["peak"])
        finally:
            for v, value in zip(variables, values, strict=True):
                v.assign(value)
        # What is too small to be in the account has to be added to it.
        unseen = sum(
            size
            for size in map(size_of, self.model.trainable_variables)
            if device.startswith("CPU") and size < 2**18
        )
        own = num_bytes(self.specs) - before
        return self.memory(peak + own + unseen, kept + own)


def _device():
    """Returns the device that models are trained on, if its allocator keeps account."""
    device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
    try:
        before = _allocated(device)["current"]
        probe = tf.zeros([2**20], tf.uint8) + 1
        if _allocated(device)["current"] - before >= probe.shape[0]:
            return device
    except ValueError:
        pass
    raise RuntimeError(
        f"The allocator of {device} keeps no account of its memory. Set the "
        "environment variable TF_ENABLE_ONEDNN_OPTS=1 before TensorFlow is imported, "
        "or use `estimate`."
    )


def _allocated(device):
    return tf.config.experimental.get_memory_info(device)


def _random(spec):
    if spec.dtype.is_floating:
        return tf.random.stateless_normal(spec.shape, [0, 0], dtype=spec.dtype)
    return tf.zeros(spec.shape, spec.dtype)
