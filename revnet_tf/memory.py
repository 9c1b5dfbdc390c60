"""The memory of a training step: predicted, measured, and fitted to a budget.

- `estimate` simulates the training step without computing values, and counts the bytes
  that are alive.
- `measure` makes training steps and reads the statistics of the device's allocator.
- `plan` chooses the blocks that store their activations, so that a step is as fast as a
  budget allows.
- `max_batch_size` returns the largest batch within a budget.

The step is that of `model.fit`: the forward pass, the gradient and, for a compiled
model, the update by its optimizer. It is a graph, or with `model.jit_compile` a program
of XLA. The loss is the mean square of the outputs.

The figures leave out the memory of Python, of TensorFlow itself and of the input
pipeline.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import math
import numbers
import os
from typing import NamedTuple

import keras
import tensorflow as tf

# XLA's compilation has no public reader. A test fails if TensorFlow removes this one.
from tensorflow.compiler.xla.service import hlo_pb2

from revnet_tf._executor import num_bytes, simulate, size_of, work
from revnet_tf._layer import Observer, RunLayer
from revnet_tf.segments import SegmentedModel, recompute

__all__ = [
    "Memory",
    "Stage",
    "estimate",
    "max_batch_size",
    "measure",
    "plan",
    "recomputing_layers",
    "split_large_region",
]

# A plan leaves this margin, because the order of execution differs from step to step,
# and the peak of the same step by some percent. `benchmarks.max_batch` measures it.
PLAN_MARGIN = 1.08


class Stage(NamedTuple):
    """The memory that a part of the model stores for the backward pass.

    Attributes:
        name: str, the name of the layer or segment that can recompute. `"other
            layers"` stands for all others.
        kept_bytes: int, the size of its tensors that are alive after the loss is
            computed.
    """

    name: str
    kept_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a training step, in bytes.

    Attributes:
        activation_bytes: int, the peak without weights, gradients and optimizer.
        working_set_bytes: int, the part of `activation_bytes` that is not stored in the
            forward pass. The backward pass needs it to differentiate a block.
        weight_bytes: int, all variables of the model.
        gradient_bytes: int, the gradients of all trainable variables.
        optimizer_bytes: int, the variables of the optimizer. 0 for a model without one.
        peak_bytes: int, the sum of `activation_bytes`, `weight_bytes`,
            `gradient_bytes` and `optimizer_bytes`.
        stages: tuple of a `Stage` for each layer or segment that can recompute, in
            forward order, and one for all other layers. Empty for a measurement, and
            with XLA.
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
            (f"stored for the backward pass: {stage.name}", stage.kept_bytes)
            for stage in self.stages
        ]
        if not rows:
            kept = self.activation_bytes - self.working_set_bytes
            rows.append(("stored for the backward pass", kept))
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
    """Predicts the memory of a training step, without making one.

    The function simulates TensorFlow's executor:

    - It has as many threads as `tf.config.threading` says. A thread goes on with what
      its last operation made ready. A thread without work takes what waits longest. The
      order is partly open: the result is the median peak of several orders.
    - An operation that can write over its input, such as an addition, needs no memory.
    - A tensor takes the smallest free chunk of the allocator that is large enough. The
      allocator splits a chunk only if it is at least twice as large.
    - Memory within a `tf.while_loop`, a `tf.cond` or a function that XLA compiles is
      not counted. Keras compiles grouped convolutions on a CPU in this way.

    With XLA the figures are those of the compiled step.

    Args:
        model: built functional or sequential `keras.Model`.
        batch_size: int, the number of samples of a step, on one device.

    Returns:
        A `Memory`.

    Raises:
        ValueError: the shapes of the model's inputs are not known, or `batch_size` is
            no positive integer.
    """
    step, graph, calls = _traced(model, batch_size)
    if step.jit_compile:
        return step.compiled()
    peak, kept = simulate(graph, step.boundary)
    names = [layer.name for layer in calls.values()]
    stages = dict.fromkeys([*names, "other layers"], 0)
    for name, size in kept:
        owner = _owner(calls, name)
        stages[owner.name if owner else "other layers"] += size
    return step.memory(peak, sum(stages.values()), stages)


def measure(model: keras.Model, batch_size: int) -> Memory:
    """Measures the memory of a training step with the device's allocator.

    The function makes three steps on random inputs, and then restores the values of the
    variables. With XLA the figures are those that the compiler assigns to the step.

    The CPU's allocator does not count tensors below 256 KiB. Choose a `batch_size` that
    makes the activations larger.

    Args:
        model, batch_size: the arguments of `estimate`.

    Returns:
        A `Memory`.

    Raises:
        ValueError: as for `estimate`.
        RuntimeError: the allocator has no statistics. On processors for which
            TensorFlow does not use oneDNN by default, TF_ENABLE_ONEDNN_OPTS=1 turns
            them on.
    """
    step = _Step(model, batch_size)
    return step.compiled() if step.jit_compile else step.measured()


def plan(model: keras.Model, batch_size: int, budget_bytes: int) -> keras.Model:
    """Sets `recompute` on each block, so that a step is as fast as a budget allows.

    Blocks are those of the reversible layers, `Recompute` layers, and the segments of
    `revnet_tf.recompute`. A model without blocks goes through `recompute` first.

    The function orders the blocks by the time that the recomputation takes for each
    stored byte, both by estimate. The first blocks in this order store their
    activations, as many as fit into the budget by `estimate` and a margin. The other
    blocks recompute them. Of equal blocks the last ones store. The backward pass frees
    their activations before it reaches the others.

    Args:
        model: model as for `estimate`. The plan sets `recompute` on all its blocks and
            ignores their earlier values.
        batch_size: int, the number of samples of a step, on one device.
        budget_bytes: int, the budget for activations, weights, gradients and optimizer.

    Returns:
        `model`, with the same weights, or `recompute(model)`.

    Raises:
        TypeError: the budget is no number.
        ValueError: the budget is not positive and finite, or is below the need of a
            step that recomputes all blocks; or `estimate` refuses the arguments; or the
            model has no blocks and `recompute` refuses it. The message names the
            largest batch that fits, or the largest patch in a batch of 1.
    """
    _check_budget(budget_bytes)
    if not recomputing_layers(model):
        model = recompute(model)
    before = {layer: layer.recompute for layer in recomputing_layers(model)}

    def store(num_blocks):
        for layer in before:
            layer.recompute = True
        for i, block in enumerate(blocks):
            block.recompute = i >= num_blocks

    @functools.cache
    def peak(num_blocks, batch_size=batch_size):
        store(num_blocks)
        return _peak_with_margin(model, batch_size)

    try:
        for layer in before:
            layer.recompute = False
        blocks = _by_worth(model, batch_size)
        fits, too_many = 0, len(blocks) + 1
        if peak(len(blocks)) <= budget_bytes:
            fits = len(blocks)
        elif peak(0) > budget_bytes:
            if batch_size > 1 and peak(0, 1) <= budget_bytes:
                largest = _largest_batch(functools.partial(peak, 0), budget_bytes)
                batch = f"a batch of {largest} fits."
            else:
                batch = _largest_patch(model, budget_bytes)
            raise ValueError(
                f"budget_bytes={budget_bytes:,} is below the minimum of {peak(0):,} "
                f"for batch_size={batch_size}; {batch}"
            )
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if peak(middle) <= budget_bytes:
                fits = middle
            else:
                too_many = middle
    except BaseException:
        for layer, value in before.items():
            layer.recompute = value
        raise
    store(fits)
    if getattr(model, "train_function", None):
        model.make_train_function(force=True)
    return model


def max_batch_size(model: keras.Model, budget_bytes: int) -> int:
    """Returns the largest batch whose training step is within a budget of memory.

    The peak of the step is that of `estimate`, with the margin that `plan` uses. The
    function does not change the blocks that recompute.

    Args:
        model: model as for `estimate`.
        budget_bytes: int, the budget for activations, weights, gradients and optimizer.

    Returns:
        An int, the number of samples of a step, on one device.

    Raises:
        TypeError: the budget is no number.
        ValueError: a step with one sample exceeds the budget, or the shapes of the
            model's inputs are not known.
    """
    _check_budget(budget_bytes)
    peak = functools.cache(functools.partial(_peak_with_margin, model))
    if peak(1) > budget_bytes:
        raise ValueError(
            f"Expected a budget of at least {peak(1):,} bytes, which a step of "
            f"{model.name} with one sample takes; got budget_bytes={budget_bytes:,}. "
            "Raise the budget, or let more of the model recompute its activations."
        )
    return _largest_batch(peak, budget_bytes)


def recomputing_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers and segments of a model, and nested ones, that can recompute.

    Each has an attribute `recompute`.
    """
    # `_flatten_layers` finds layers in all attributes; no public method does.
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, RunLayer):
            found.append(layer)
        elif isinstance(layer, SegmentedModel):
            found += layer.segments
    return found


def split_large_region() -> None:
    """Makes the CPU's allocator take all tensors from one large region.

    By default the allocator begins with a small region. It does not split a free chunk
    that is less than twice as large as the request. The waste depends on the order in
    which threads free their tensors.
    """
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    with tf.device("CPU"):
        tf.raw_ops.Empty(shape=[pages // 2, page_bytes], dtype=tf.uint8)


def _check_budget(budget_bytes):
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, numbers.Real):
        raise TypeError(
            f"budget_bytes must be a number of bytes; got {budget_bytes!r}. Write "
            "20 MB as 20_000_000."
        )
    if not 0 < budget_bytes < math.inf:
        raise ValueError(
            f"budget_bytes must be positive and finite; got {budget_bytes}. Give the "
            "bytes of activations, weights, gradients and optimizer together."
        )


def _peak_with_margin(model, batch_size):
    return math.ceil(PLAN_MARGIN * estimate(model, batch_size).peak_bytes)


def _largest_batch(peak, budget_bytes):
    """Returns the largest batch within a budget. A batch of 1 is within it."""
    fits, too_large, other, guess = 1, math.inf, 1, 16
    for turn in itertools.count():
        if too_large - fits <= 1:
            return fits
        if peak(guess) <= budget_bytes:
            other, fits = fits, guess
        else:
            other = too_large = guess
        # The peak is nearly linear in the batch size.
        a_sample = (peak(other) - peak(fits)) / (other - fits)
        more = (budget_bytes - peak(fits)) / a_sample if a_sample > 0 else fits
        if turn % 4 == 3 and too_large < math.inf:
            more = (too_large - fits) // 2
        guess = int(min(max(fits + more, fits + 1), too_large - 1))


def _by_worth(model, batch_size):
    """Returns the blocks of a model that stores all activations.

    The first block saves most time of recomputation for each byte that it stores.
    """
    step, graph, calls = _traced(model, batch_size)
    stored, seconds = collections.Counter(), collections.Counter()
    for name, size in simulate(graph, step.boundary)[1]:
        stored[_owner(calls, name)] += size
    for op in graph.get_operations():
        seconds[_owner(calls, op.name)] += work(op)
    found = []
    for layer in dict.fromkeys(calls.values()):
        # Blocks of one layer are alike. Rounding makes alike layers equal, too.
        worth = round(10 * math.log((seconds[layer] + 1) / (stored[layer] + 1)))
        found += [(worth, block) for block, _ in layer.blocks_in_order()]
    last_first = reversed(found)
    return [block for _, block in sorted(last_first, key=lambda x: x[0], reverse=True)]


def _owner(calls, name):
    """Returns the layer in whose call an operation was made, or `None`."""
    owners = (layer for scope, layer in calls.items() if name.startswith(scope))
    return next(owners, None)


def _largest_patch(model, budget_bytes):
    """Returns a text that names the largest patch within a budget, in a batch of 1.

    All sizes shrink by about one factor. Networks with levels need multiples of a power
    of two: the sizes stay multiples of 16, or of a common divisor below.
    """
    nothing = "not even a batch of 1 fits."
    if len(model.inputs) > 1 or len(model.inputs[0].shape) < 3:
        return nothing
    _, *sizes, channels = model.inputs[0].shape
    step = math.gcd(16, *sizes)
    patches = dict.fromkeys(
        tuple(size * tenths // 10 // step * step for size in sizes)
        for tenths in range(1, 10)
    )
    patches = [patch for patch in patches if 0 not in patch]

    def peak(patch):
        inputs = keras.Input((*patch, channels), dtype=model.inputs[0].dtype)
        smaller = keras.models.clone_model(model, input_tensors=inputs)
        if [v.shape for v in smaller.variables] != [v.shape for v in model.variables]:
            raise ValueError("The weights depend on the size.")
        if getattr(model, "compiled", False):
            optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
            smaller.compile(optimizer, jit_compile=model.jit_compile)
        return _peak_with_margin(smaller, 1)

    try:
        num_fitting = bisect.bisect_right(patches, budget_bytes, key=peak)
    except (TypeError, ValueError, tf.errors.OpError):
        return nothing  # The model does not take other sizes.
    if not num_fitting:
        return nothing
    patch = "x".join(map(str, patches[num_fitting - 1]))
    return f"{nothing[:-1]}, but a patch of {patch} does."


def _traced(model, batch_size):
    """Returns a `_Step`, its graph, and the reversible layers by scope of the call."""
    step = _Step(model, batch_size)
    with _Calls() as observer:
        graph = step.function.get_concrete_function(*step.specs).graph
    return step, graph, observer.calls


class _Calls(Observer):
    """Collects the called layers, by the name scope of the call."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def called(self, layer):
        self.calls[tf.get_current_name_scope() + "/"] = layer


class _Step:
    """A training step of a model, as a function of its inputs.

    Attributes:
        function: `tf.function` of the step.
        specs: list of `tf.TensorSpec`, the inputs of the function.
        jit_compile: bool, whether XLA compiles the function.
        boundary: str, the name of an operation between the forward and the backward
            pass. `None` until the function is traced.
    """

    def __init__(self, model, batch_size):
        if not getattr(model, "inputs", None):
            raise ValueError(
                f"Expected a functional or sequential model; {model.name} has no "
                "`inputs`. Wrap it in one, such as `keras.Model(x, layer(x))`."
            )
        whole = isinstance(batch_size, numbers.Integral) and batch_size is not True
        if not (whole and batch_size > 0):
            raise ValueError(
                f"batch_size must be a positive integer; got {batch_size!r}. Give the "
                "number of samples of a step, on one device."
            )
        self.model = model
        self.specs = [
            tf.TensorSpec((batch_size, *x.shape[1:]), x.dtype) for x in model.inputs
        ]
        for spec in self.specs:
            if None in spec.shape.as_list():
                raise ValueError(
                    f"Expected inputs of one size; {model.name} takes inputs of any "
                    f"size, {spec.shape}. Build it with the `input_shape` of training."
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
        """Returns a `Memory` from the bytes that are needed beside the variables."""
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
        """Returns the `Memory` that XLA assigns to the step."""
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
        """Returns the `Memory` that the device's allocator reports for three steps."""
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
        # The allocator's statistics leave out small tensors.
        unseen = sum(
            size
            for size in map(size_of, self.model.trainable_variables)
            if device.startswith("CPU") and size < 2**18
        )
        own = num_bytes(self.specs) - before
        return self.memory(peak + own + unseen, kept + own)


def _device():
    """Returns the device of training, or raises an error if it has no statistics."""
    device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
    try:
        before = _allocated(device)["current"]
        probe = tf.zeros([2**20], tf.uint8) + 1
        if _allocated(device)["current"] - before >= probe.shape[0]:
            return device
    except ValueError:
        pass
    raise RuntimeError(
        f"Expected memory statistics; the allocator of {device} has none. Set the "
        "environment variable TF_ENABLE_ONEDNN_OPTS=1 before TensorFlow is imported, "
        "or use `estimate`."
    )


def _allocated(device):
    return tf.config.experimental.get_memory_info(device)


def _random(spec):
    if spec.dtype.is_floating:
        return tf.random.stateless_normal(spec.shape, [0, 0], dtype=spec.dtype)
    return tf.zeros(spec.shape, spec.dtype)
