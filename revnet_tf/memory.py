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

import collections
import dataclasses
import functools
import heapq
import math
import os
import random
from typing import NamedTuple

import tensorflow as tf

# The result of XLA's compilation has no public reader. (A test notices if this goes.)
from tensorflow.compiler.xla.service import hlo_pb2

from revnet_tf import streams

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


def estimate(model, batch_size):
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
    peak, kept = _simulate(graph, step.boundary)
    names = [layer.name for layer in calls.values()]
    stages = dict.fromkeys([*names, "other layers"], 0)
    for name, size in kept:
        owners = [layer for scope, layer in calls.items() if name.startswith(scope)]
        stages[owners[0].name if owners else "other layers"] += size
    return step.memory(round(_ROUNDING * peak), sum(stages.values()), stages)


def measure(model, batch_size):
    """Measures what a training step keeps, by the device's allocator.

    Three steps are made, on random numbers; the variables have their values back then.
    With XLA the figures are those that the compiler assigns to the step.

    Args:
        model, batch_size: as for `estimate`.

    Returns:
        A `Memory`.

    Raises:
        ValueError: as for `estimate`.
        RuntimeError: the allocator keeps no account, as on processors for which
            TensorFlow is built without oneDNN. (With oneDNN, tensors below 256 KiB are
            not in it: `batch_size` should make them larger.)
    """
    step = _Step(model, batch_size)
    return step.compiled() if step.jit_compile else step.measured()


def plan(model, batch_size, budget_bytes):
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
    blocks = [b for layer in layers for b in getattr(layer, "blocks", [layer])]
    if not blocks:
        raise ValueError(f"{model.name} has no reversible layer to plan for.")
    before = {layer: layer.recompute for layer in [*layers, *blocks]}

    def store(num_blocks):
        for layer in layers:
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
    with streams.calls() as calls:
        graph = step.function.get_concrete_function(*step.specs).graph
    return step, graph, calls


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
            outputs = model(
                tf.nest.pack_sequence_as(model.input, inputs), training=True
            )
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
        weights = _bytes(self.model.variables)
        gradients = _bytes(self.model.trainable_variables)
        optimizer = _bytes(self.optimizer.variables) if self.optimizer else 0
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
        return self.memory(peak + _bytes(self.specs), 0)

    def measured(self):
        """Returns what the device's allocator says of some steps."""
        variables = [*self.model.variables]
        if self.optimizer is not None:
            variables += self.optimizer.variables
        values = [v.numpy() for v in variables]
        device = _device()
        if device.startswith("CPU"):
            # An allocator that begins small gives a free chunk away whole if it is less
            # than twice as large as what is asked for. Of a large one it splits it off.
            pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
            tf.raw_ops.Empty(shape=[pages // 2, page_bytes], dtype=tf.uint8)
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
            for size in map(_size, self.model.trainable_variables)
            if device.startswith("CPU") and size < 2**18
        )
        own = _bytes(self.specs) - before
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
        f"The allocator of {device} keeps no account of its memory, as TensorFlow's "
        "for processors without oneDNN (TF_ENABLE_ONEDNN_OPTS=0); use `estimate`."
    )


def _allocated(device):
    return tf.config.experimental.get_memory_info(device)


def _random(spec):
    if spec.dtype.is_floating:
        return tf.random.stateless_normal(spec.shape, [0, 0], dtype=spec.dtype)
    return tf.zeros(spec.shape, spec.dtype)


def _bytes(tensors):
    return sum(map(_size, tensors))


def _size(tensor):
    """Returns the size of a tensor or variable in bytes, 0 of one that has none."""
    dtype = tf.as_dtype(tensor.dtype)
    if dtype in (tf.resource, tf.variant, tf.string):
        return 0
    shape = tf.TensorShape(tensor.shape)
    return math.prod(shape.as_list()) * dtype.size if shape.is_fully_defined() else 0


# Operations whose outputs are their inputs.
_SAME = {
    "CheckNumerics",
    "EnsureShape",
    "ExpandDims",
    "Identity",
    "IdentityN",
    "PreventGradient",
    "Reshape",
    "Squeeze",
    "StopGradient",
}
# Operations that write over an input of the size of their output if nobody needs it.
_IN_PLACE = set(
    """
    Abs Add AddN AddV2 BiasAdd Ceil Elu EluGrad Erf Exp Expm1 Floor Log Log1p LogSoftmax
    Maximum Minimum Mul Neg Pow RealDiv Reciprocal Relu Relu6 Relu6Grad ReluGrad Round
    Rsqrt RsqrtGrad Select Sigmoid SigmoidGrad Sign Softmax Softplus SoftplusGrad Sqrt
    SqrtGrad Square SquaredDifference Sub Tanh TanhGrad
    """.split()
)
# Operations that give what is there already: weights, and constants of the graph.
_NOT_MADE = {"Const", "ReadVariableOp", "VarHandleOp"}
# A smaller operation is executed at once; the larger ones wait for a thread.
_LARGE_BYTES = 100_000
# Orders of execution that are tried.
_ORDERS = 8
# An allocator gives a free piece away whole where splitting it would leave little.
_ROUNDING = 1.03


def _simulate(graph, boundary):
    """Goes through the operations of a function as TensorFlow's executor does.

    Args:
        graph: the function's graph, of known shapes.
        boundary: name of an operation.

    Returns:
        The peak of the bytes alive, and what is alive when the boundary is passed: a
        list of pairs, the name of the operation that made a tensor and its size.
    """
    outputs = [t for t in graph.outputs if t is not None]
    needed, ahead = set(), [t.op for t in outputs] + list(graph.control_outputs)
    while ahead:
        op = ahead.pop()
        if op not in needed:
            needed.add(op)
            ahead += [t.op for t in op.inputs] + list(op.control_inputs)
    waiting_for, followers = {}, collections.defaultdict(list)
    # Whoever calls the function holds its inputs meanwhile.
    uses = collections.Counter(t.ref() for t in [*outputs, *graph.inputs])
    for op in graph.get_operations():
        if op in needed:
            before = {*(t.op for t in op.inputs), *op.control_inputs}
            waiting_for[op] = len(before)
            uses.update(t.ref() for t in op.inputs)
            for other in before:
                followers[other].append(op)
    # Which comes first of those that become ready at a time is not known.
    runs = [
        _execute(waiting_for, followers, uses, boundary, random.Random(seed))
        for seed in range(_ORDERS)
    ]
    kept = min((kept for _, kept in runs), key=lambda kept: sum(s for _, s in kept))
    return max(peak for peak, _ in runs), kept


def _execute(waiting_for, followers, uses, boundary, rng):
    """Executes operations in an order drawn by `rng`; returns as `_simulate`."""
    waiting_for = dict(waiting_for)
    memory = _Buffers(uses.copy())
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count()
    if tf.config.list_logical_devices("GPU"):
        threads = 1  # one stream
    small, large, under_way = collections.deque(), [], []
    kept, now = [], 0

    def ready(op):
        size = max(map(_size, [*op.inputs, *op.outputs]), default=0)
        is_large = size > _LARGE_BYTES and op.type not in _SAME
        (large if is_large else small).append(op)

    for op, count in waiting_for.items():
        if count == 0:
            ready(op)
    while small or large or under_way:
        if small:
            op = small.popleft()
            memory.start(op)
        elif large and len(under_way) < threads:
            op = large.pop()  # what has become ready last
            memory.start(op)
            heapq.heappush(under_way, (now + _work(op), rng.random(), op))
            continue
        else:
            now, _, op = heapq.heappop(under_way)
        memory.finish(op)
        if op.name == boundary:
            kept = list(memory.alive.values())
        for follower in rng.sample(followers[op], len(followers[op])):
            waiting_for[follower] -= 1
            if waiting_for[follower] == 0:
                ready(follower)
    return memory.peak, kept


def _work(op):
    """Returns how long an operation takes, in some unit."""
    size = sum(map(_size, [*op.inputs, *op.outputs]))
    return size * (20 if "Conv" in op.type or "MatMul" in op.type else 1)


def _scratch(op):
    """Returns what an operation needs beside its inputs and outputs."""
    if op.type == "Einsum":  # transposes a tensor
        return max(map(_size, [*op.inputs, *op.outputs]))
    return 0


class _Buffers:
    """The memory behind tensors: several can share a buffer.

    Attributes:
        alive: by buffer, the name of the operation that made it, and its size.
        peak: largest sum of the sizes so far.
    """

    def __init__(self, uses):
        self.alive = {}
        self.peak = self._total = 0
        self._uses = uses  # that a tensor has still before it
        self._of = {}  # the buffer of a tensor
        self._tensors = collections.Counter()  # that share a buffer

    def start(self, op):
        """Has the outputs of an operation made."""
        for i, output in enumerate(op.outputs):
            buffer = self._reused(op, i, output)
            if buffer is None:
                buffer = output.ref()
                size = 0 if op.type in _NOT_MADE else _size(output)
                self.alive[buffer] = op.name, size
                self._total += size
            self._of[output.ref()] = buffer
            self._tensors[buffer] += 1
        self._total += _scratch(op)
        self.peak = max(self.peak, self._total)

    def finish(self, op):
        """Lets go what the operation was the last to need."""
        self._total -= _scratch(op)
        for t in op.outputs:
            if not self._uses[t.ref()]:
                self._drop(t)
        for t in op.inputs:
            self._uses[t.ref()] -= 1
            if not self._uses[t.ref()]:
                self._drop(t)

    def _reused(self, op, index, output):
        if op.type in _SAME:
            return self._of[op.inputs[index if op.type == "IdentityN" else 0].ref()]
        if op.type in _IN_PLACE:
            for t in op.inputs:
                buffer = self._of[t.ref()]
                _, size = self.alive[buffer]
                last = self._uses[t.ref()] == sum(t is other for other in op.inputs)
                if (
                    last
                    and self._tensors[buffer] == 1
                    and size == _size(output) > 0
                    and t.dtype == output.dtype
                ):
                    return buffer
        return None

    def _drop(self, tensor):
        buffer = self._of[tensor.ref()]
        self._tensors[buffer] -= 1
        if not self._tensors[buffer]:
            self._total -= self.alive.pop(buffer)[1]
