"""A simulation of the memory that TensorFlow's executor needs to run a function.

The simulation computes no values. It visits the operations of a graph in an order in
which the threads of the executor can run them, and gives their outputs memory as the
allocator does. All shapes are known.
"""

import bisect
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
# Operations for which the executor does not wake another thread.
_CHEAP = _SAME | _NOT_MADE | {"NoOp", "Placeholder", "Rank", "Shape", "ShapeN", "Size"}
# The time in which a thread passes over a small operation, in the unit of `work`.
_OVERHEAD = 20_000
# The number of simulated orders of execution.
_ORDERS = 8
# The allocator of a CPU leaves smaller tensors to the system.
_SMALL_BYTES = 2**18
# The allocator splits a free chunk if at least so much would be left.
_MAX_WASTE = 2**27
# Operations that TensorFlow joins to sums, and the bytes of a graph from which it gives
# sums their memory early: 80 % of what it takes for the memory of a CPU.
_SUMS = {"Add", "AddN", "AddV2"}
_CPU_BYTES = 0.8 * 2**28


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

    # The order of operations that become ready at the same time is not known, nor is
    # their duration. The median of several orders stands for them.
    orders = (random.Random(seed) for seed in range(_ORDERS))
    runs = [_execute(waiting_for, followers, uses, boundary, rng) for rng in orders]
    peak, kept = sorted(runs, key=lambda run: run[0])[_ORDERS // 2]
    if peak > _CPU_BYTES and not tf.config.list_logical_devices("GPU"):
        peak += _largest_sum(waiting_for, uses)
    return peak, kept


def _largest_sum(ops, uses):
    """Returns the bytes of the largest sum of three or more tensors.

    TensorFlow joins additions to sums. Where a graph needs much of the memory of its
    device, TensorFlow gives some sums their memory as soon as the first term is known.
    (`SchedulingPass` in the memory optimizer of Grappler.)
    """
    terms, largest = {}, 0
    for op in ops:
        if op.type in _SUMS and all(t.shape == op.outputs[0].shape for t in op.inputs):
            terms[op] = sum(
                terms.get(t.op, 1) if uses[t.ref()] == 1 else 1 for t in op.inputs
            )
            if terms[op] > 2:
                largest = max(largest, size_of(op.outputs[0]))
    return largest


def _execute(waiting_for, followers, uses, boundary, rng):
    """Executes operations in an order drawn by `rng`; returns as `simulate`."""
    waiting_for = dict(waiting_for)
    memory = _Buffers(uses.copy())
    num_threads = tf.config.threading.get_inter_op_parallelism_threads()
    if tf.config.list_logical_devices("GPU"):
        num_threads = 1  # one stream
    threads = [_Thread() for _ in range(num_threads or os.cpu_count())]
    for op, count in waiting_for.items():
        if count == 0:
            rng.choice(threads).queue.append(op)
    kept, now, under_way = [], 0, []
    while True:
        for thread in threads:
            op = None if thread.busy else thread.take(rng.sample(threads, len(threads)))
            if op:
                memory.start(op)
                end = now + (work(op) + _OVERHEAD) * rng.uniform(1, 1.3)
                heapq.heappush(under_way, (end, rng.random(), thread, op))
                thread.busy = True
        if not under_way:
            return memory.peak, kept
        now, _, thread, op = heapq.heappop(under_way)
        memory.finish(op)
        if op.name == boundary:
            kept = list(memory.alive.values())
        ready = []
        for follower in rng.sample(followers[op], len(followers[op])):
            waiting_for[follower] -= 1
            if waiting_for[follower] == 0:
                ready.append(follower)
        thread.add(ready)
        thread.busy = False


class _Thread:
    """A thread of the executor.

    Attributes:
        busy: bool, whether an operation is under way.
        queue: `collections.deque` of operations that any thread may run.
    """

    def __init__(self):
        self.busy = False
        self.queue = collections.deque()
        self._own = collections.deque()  # operations that no other thread runs

    def add(self, ready):
        """Adds operations that became ready as this thread finished another one."""
        expensive = [op for op in ready if op.type not in _CHEAP]
        self._own += [op for op in ready if op.type in _CHEAP]
        if expensive and not self._own:
            self._own.append(expensive.pop())
        self.queue.extendleft(expensive)

    def take(self, threads):
        """Returns the next operation, or `None` if no operation waits.

        A thread without operations takes one that waits longest in one of `threads`.
        """
        if self._own:
            return self._own.popleft()
        if self.queue:
            return self.queue.popleft()
        return next((other.queue.pop() for other in threads if other.queue), None)


def work(op):
    """Returns the duration of an operation, in an arbitrary unit."""
    size = sum(map(size_of, [*op.inputs, *op.outputs]))
    return size * (20 if "Conv" in op.type or "MatMul" in op.type else 1)


def _scratch(op):
    """Returns the bytes that an operation needs beside its inputs and outputs."""
    if op.type == "Einsum":  # It transposes a tensor.
        return max(map(size_of, [*op.inputs, *op.outputs]))
    return 0


class _Allocator:
    """TensorFlow's allocator, with one region that is large enough.

    It takes the smallest free chunk that is large enough, and splits a chunk only if
    that is at least twice as large as needed. It joins free neighbours.
    """

    def __init__(self):
        self._chunks = [(2**60, 0)]  # free ones: size and address, in order of size
        self._size_at = {0: 2**60}
        self._begin_of = {2**60: 0}  # the address of the free chunk that ends here

    def allocate(self, size):
        """Returns the address and the size of a chunk."""
        if size < _SMALL_BYTES:
            return None, size
        size = -(-size // 256) * 256
        found, address = self._chunks[bisect.bisect_left(self._chunks, (size, -1))]
        self._remove(address)
        if found >= 2 * size or found - size >= _MAX_WASTE:
            self._add(address + size, found - size)
            return address, size
        return address, found

    def free(self, address, size):
        if address is None:
            return
        if address + size in self._size_at:
            size += self._remove(address + size)
        if address in self._begin_of:
            address = self._begin_of[address]
            size += self._remove(address)
        self._add(address, size)

    def _add(self, address, size):
        bisect.insort(self._chunks, (size, address))
        self._size_at[address] = size
        self._begin_of[address + size] = address

    def _remove(self, address):
        size = self._size_at.pop(address)
        del self._begin_of[address + size]
        del self._chunks[bisect.bisect_left(self._chunks, (size, address))]
        return size


class _Buffers:
    """The buffers of tensors. Several tensors can share a buffer.

    Attributes:
        alive: dict from a buffer to the name of the operation that made it, and its
            size.
        peak: int, the largest sum so far of the sizes of their chunks.
    """

    def __init__(self, uses):
        self.alive = {}
        self.peak = self._total = 0
        self._allocator = _Allocator()
        self._chunks = {}  # address and size, by buffer or operation
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
                self._allocate(buffer, size)
            self._of[output.ref()] = buffer
            self._tensors[buffer] += 1
        self._allocate(op, _scratch(op))
        self.peak = max(self.peak, self._total)

    def finish(self, op):
        """Frees the tensors that no later operation needs."""
        self._free(op)
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
            del self.alive[buffer]
            self._free(buffer)

    def _allocate(self, key, size):
        address, size = self._chunks[key] = self._allocator.allocate(size)
        self._total += size

    def _free(self, key):
        address, size = self._chunks.pop(key)
        self._allocator.free(address, size)
        self._total -= size


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
