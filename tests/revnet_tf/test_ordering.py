"""`_ordering.wait` orders tensors and does not change their values."""

import numpy as np
import pytest
import tensorflow as tf

from revnet_tf._ordering import wait

DONE = [
    tf.constant([[np.inf]]),
    tf.constant(np.nan),
    tf.constant([2**31 - 1]),
    tf.constant([-np.inf, 1.0], tf.float16),
    tf.constant([True]),
    tf.zeros([0]),
]
TENSORS = [
    tf.constant([1.0, np.nan, np.inf]),
    tf.constant([[3]]),
    tf.constant(1e-30, tf.bfloat16),
    tf.zeros([2, 0]),
]


def compiled(**options):
    return tf.function(wait, autograph=False, **options)


@pytest.mark.parametrize(
    "run",
    [wait, compiled(), compiled(jit_compile=True)],
    ids=["eager", "graph", "xla"],
)
@pytest.mark.parametrize("done", [DONE, [tf.zeros([0])]])
@pytest.mark.parametrize("tensors", [TENSORS, []])
def test_wait_does_not_change_tensors(run, done, tensors):
    found = run(done, tensors)
    assert [t.dtype for t in found] == [t.dtype for t in tensors]
    for a, b in zip(found, tensors, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_xla_does_not_remove_the_loop_that_waits():
    run = compiled(jit_compile=True)
    arguments = DONE[:1], TENSORS[:1]
    hlo = run.experimental_get_compiler_ir(*arguments)("optimized_hlo")
    assert " while(" in hlo
