import functools
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
import tensorflow as tf

# Before TensorFlow starts: two devices, for the tests under a distribution strategy.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

# A shell starts its background jobs with interrupts ignored. The programs that tests
# interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    # Garbage collection would take a third of a second after each test.
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(scope="session")
def two_replicas():
    """A mirrored strategy; several in one process would abort TensorFlow."""
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


MODES = {
    "eager": lambda function: function,
    "graph": functools.partial(tf.function, autograph=False),
    "xla": functools.partial(tf.function, autograph=False, jit_compile=True),
}


@pytest.fixture(params=MODES)
def run_in_every_mode(request):
    """How a function is executed: as it is, as a graph, or compiled."""
    return MODES[request.param]


# Compilation takes most of the time of a small test.
@pytest.fixture(
    params=["eager", "graph", pytest.param("xla", marks=pytest.mark.thorough)]
)
def run(request):
    """The same; the fast tests leave compilation out."""
    return MODES[request.param]
