"""A simulation of the memory that TensorFlow's executor needs to run a function.

The simulation computes no values. It visits the operations of a graph in an order in
which the executor can run them. All shapes are known, so it counts the bytes that are
alive.
"""

import collections
import heapq
import math
import os
import random

import tensorflow as tf

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
# Operations that write over an input of the size of their output, if no other operation
# needs that input.
_IN_PLACE = set(
    """
    Abs Add AddN AddV2 BiasAdd Ceil Elu EluGrad Erf Exp Expm1 Floor Log Log1p LogSoftmax
    Maximum Minimum Mul Neg Pow RealDiv Reciprocal Relu Relu6 Relu6Grad ReluGrad Round
    Rsqrt RsqrtGrad Select Sigmoid SigmoidGrad Sign Softmax Softplus SoftplusGrad Sqrt
    SqrtGrad Square SquaredDifference Sub Tanh TanhGrad
    """.split()
)
# Operations whose outputs exist already: weights, and constants of the graph.
_NOT_MADE = {"Const", "ReadVariableOp", "VarHandleOp"}
# The executor runs smaller operations at once. Larger ones wait for a thread.
_LARGE_BYTES = 100_000
# The number of simulated orders of execution.
_ORDERS = 8
# The allocator does not split a free chunk if the rest would be small.
_ROUNDING = 1.03


def simulate(graph, boundary):
    """Visits the operations of a function in the order of TensorFlow's executor.

    Args:
        graph: `tf.Graph` of the function, with known shapes.
        boundary: str, the name of an operation.

    Returns:
        The peak of the bytes alive, and the tensors alive after the boundary. These
        are a list of pairs: the name of the operation that made a tensor, and its size.
    """
    outputs = [t for t in graph.outputs if t is not None]
    needed, ahead = set(), [t.op for t in outputs] + list(graph.control_outputs)
    while ahead:
        op = ahead.pop()
        if op not in needed:
            needed.add(op)
            ahead += [t.op for t in op.inputs] + list(op.control_inputs)
    waiting_for, followers = {}, collections.defaultdict(list)
    # The caller of the function holds its inputs until the function returns.
    uses = collections.Counter(t.ref() for t in [*outputs, *graph.inputs])
    for op in graph.get_operations():
        if op in needed:
            before = {*(t.op for t in op.inputs), *op.control_inputs}
            waiting_for[op] = len(before)
            uses.update(t.ref() for t in op.inputs)
            for other in before:
                followers[other].append(op)
    # The order of operations that become ready at the same time is not known.
    runs = [
        _execute(waiting_for, followers, uses, boundary, random.Random(seed))
        for seed in range(_ORDERS)
    ]
    kept = min((kept for _, kept in runs), key=lambda kept: sum(s for _, s in kept))
    return round(_ROUNDING * max(peak for peak, _ in runs)), kept


def _execute(waiting_for, followers, uses, boundary, rng):
    """Executes operations in an order drawn by `rng`; returns as `simulate`."""
    waiting_for = dict(waiting_for)
    memory = _Buffers(uses.copy())
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count()
    if tf.config.list_logical_devices("GPU"):
        threads = 1  # one stream
    small, large, under_way = collections.deque(), [], []
    kept, now = [], 0

    def ready(op):
        size = max(map(size_of, [*op.inputs, *op.outputs]), default=0)
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
            op = large.pop()  # the one that became ready last
            memory.start(op)
            heapq.heappush(under_way, (now + work(op), rng.random(), op))
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


def work(op):
    """Returns the duration of an operation, in an arbitrary unit."""
    size = sum(map(size_of, [*op.inputs, *op.outputs]))
    return size * (20 if "Conv" in op.type or "MatMul" in op.type else 1)


def _scratch(op):
    """Returns the bytes that an operation needs beside its inputs and outputs."""
    if op.type == "Einsum":  # It transposes a tensor.
        return max(map(size_of, [*op.inputs, *op.outputs]))
    return 0


class _Buffers:
    """The buffers of tensors. Several tensors can share a buffer.

    Attributes:
        alive: dict from a buffer to the name of the operation that made it, and its
            size.
        peak: int, the largest sum of the sizes so far.
    """

    def __init__(self, uses):
        self.alive = {}
        self.peak = self._total = 0
        self._uses = uses  # the remaining uses of a tensor
        self._of = {}  # the buffer of a tensor
        self._tensors = collections.Counter()  # the tensors of a buffer

    def start(self, op):
        """Allocates the outputs of an operation."""
        for i, output in enumerate(op.outputs):
            buffer = self._reused(op, i, output)
            if buffer is None:
                buffer = output.ref()
                size = 0 if op.type in _NOT_MADE else size_of(output)
                self.alive[buffer] = op.name, size
                self._total += size
            self._of[output.ref()] = buffer
            self._tensors[buffer] += 1
        self._total += _scratch(op)
        self.peak = max(self.peak, self._total)

    def finish(self, op):
        """Frees the tensors that no later operation needs."""
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
                    and size == size_of(output) > 0
                    and t.dtype == output.dtype
                ):
                    return buffer
        return None

    def _drop(self, tensor):
        buffer = self._of[tensor.ref()]
        self._tensors[buffer] -= 1
        if not self._tensors[buffer]:
            self._total -= self.alive.pop(buffer)[1]


def num_bytes(tensors):
    """Returns the total size of tensors or variables, in bytes."""
    return sum(map(size_of, tensors))


def size_of(tensor):
    """Returns the size of a tensor or variable in bytes, or 0 if it is not known."""
    dtype = tf.as_dtype(tensor.dtype)
    if dtype in (tf.resource, tf.variant, tf.string):
        return 0
    shape = tf.TensorShape(tensor.shape)
    return math.prod(shape.as_list()) * dtype.size if shape.is_fully_defined() else 0
