"""Custom gradients that can be let go."""

import weakref

import tensorflow as tf


def call(function, *arguments):
    """Returns `tf.custom_gradient(function)(*arguments)`, which can be let go.

    In a graph TensorFlow registers the gradient function and the outputs of a custom
    gradient by name, for ever: the graph, the layers and the weights of every model
    that was trained would stay. What is registered here holds none of them; the
    operation holds the gradient function, and goes with its graph.

    Args:
        function: returns a sequence of tensors, at least one, and the gradient
            function.
        *arguments: tensors.
    """
    if tf.executing_eagerly():
        return tf.custom_gradient(function)(*arguments)
    registered = []
    gradient = None

    @tf.custom_gradient
    def differentiable(*arguments):
        nonlocal gradient
        outputs, gradient = function(*arguments)
        registered.extend(outputs)
        reference = weakref.ref(gradient)
        return registered, lambda *d_outputs: reference()(*d_outputs)

    outputs = differentiable(*arguments)
    outputs[0].op._revnet_tf_gradient = gradient
    # TensorFlow asks only how many there are.
    registered[:] = [None] * len(registered)
    return outputs
