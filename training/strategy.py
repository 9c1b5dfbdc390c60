"""The `tf.distribute` strategy of a run, and additions that Keras needs for it.

Several workers are several processes, on one machine or more. Each runs the same
program and reads the environment variable `TF_CONFIG`. The worker of type `chief`, or
else the first worker, writes the run folder.
"""

import functools

import keras
import tensorflow as tf

from training.cluster import Cluster, cluster_of

STRATEGIES = ("auto", "single", "mirrored", "multiworker")


def get_strategy(name):
    """Returns a strategy. With several workers, call it before TensorFlow starts.

    Args:
        name: string, one of
            - `"single"`: one device.
            - `"mirrored"`: all GPUs of this machine, or all logical CPUs without a GPU.
            - `"multiworker"`: the workers of `TF_CONFIG`, each with all its GPUs.
            - `"auto"`: multiworker if `TF_CONFIG` names several workers. Otherwise
              mirrored if this machine has several GPUs. Otherwise single.

    Raises:
        ValueError: there is no such strategy, or `TF_CONFIG` does not fit it.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r}: use one of {', '.join(STRATEGIES)}.")
    if cluster_of(name).workers:
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    if name == "single" or (name == "auto" and len(gpus) < 2):
        return tf.distribute.get_strategy()
    devices = gpus or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy(devices)


def is_multiworker(strategy):
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def cluster_in(strategy):
    """Returns the `Cluster` whose workers a strategy trains on."""
    return cluster_of("multiworker") if is_multiworker(strategy) else Cluster()


def is_chief(strategy):
    """Returns whether this process writes the run folder."""
    return cluster_in(strategy).is_chief


def on_any_worker(strategy, flag):
    """Returns whether `flag` is true on one of the workers. All workers have to ask."""
    if not is_multiworker(strategy):
        return flag
    return bool(_sum_over_workers(strategy)(tf.constant(float(flag))) > 0)


@functools.cache
def _sum_over_workers(strategy):
    return tf.function(
        lambda value: strategy.reduce(
            "SUM", strategy.run(tf.identity, args=(value,)), axis=None
        )
    )


def averaging(model, strategy):
    """Returns the function that gives all replicas the mean of their statistics.

    In Keras 3.15 each replica updates the moving statistics of a BatchNorm by its own
    images. Keras tests and saves a model with the statistics of one replica. The
    statistics are linear in the images, so their mean does not depend on the number of
    averagings.
    """
    variables = [
        variable
        for variable in model.non_trainable_variables
        if tf.as_dtype(variable.dtype).is_floating
    ]

    def average():
        context = tf.distribute.get_replica_context()
        own = [tf.identity(variable.value) for variable in variables]
        means = context.all_reduce(tf.distribute.ReduceOp.MEAN, own)
        for variable, mean in zip(variables, means, strict=True):
            variable.assign(mean)

    if strategy.num_replicas_in_sync == 1 or not variables:
        return lambda: None
    return tf.function(lambda: strategy.run(average), autograph=False)


def trainable(network, strategy):
    """Returns the model to compile and `fit` in the scope of `strategy`.

    Call this outside of the scope, with a network whose layers were built in it. Keras
    draws a batch to build a model that was made in the scope. That fails under several
    workers, and for a data set that was read to its end.
    """
    cls = _MultiWorkerModel if is_multiworker(strategy) else keras.Model
    return cls(network.inputs, network.outputs, name=network.name)


class _MultiWorkerModel(keras.Model):
    """A model whose `fit` and `evaluate` run under `MultiWorkerMirroredStrategy`.

    Keras 3.15 averages the logs of a step over an axis that they do not have
    (https://github.com/keras-team/keras/issues/20585). This model returns the logs of
    one replica for a step. Keras reads the logs of an epoch from the metrics of all.
    """

    def make_train_function(self, force=False):
        if force or self.train_function is None:
            self.train_function = _on_workers(self.train_step)

    def make_test_function(self, force=False):
        if force or self.test_function is None:
            self.test_function = _on_workers(self.test_step)


def _on_workers(step):
    strategy = tf.distribute.get_strategy()

    @tf.function(reduce_retracing=True)
    def function(iterator):
        logs = strategy.run(step, args=(next(iterator),))
        return {k: strategy.experimental_local_results(v)[0] for k, v in logs.items()}

    return function
