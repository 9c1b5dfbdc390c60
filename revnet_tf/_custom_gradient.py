"""Custom gradients that are freed with their graph, and can be saved."""

import weakref

import tensorflow as tf


def call(function, *arguments):
    """Returns `tf.custom_gradient(function)(*arguments)`, freed with its graph.

    In a graph TensorFlow registers the gradient function and the outputs of a custom
    gradient by name and never removes them. The graph, the layers and the weights of
    every trained model would stay in memory. This function registers weak references
    only. The operation owns the gradient function.

    Args:
        function: function of the arguments, returns a sequence of at least one tensor
            and the gradient function.
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
    # TensorFlow reads only the length of the list.
    registered[:] = [None] * len(registered)
    return outputs


def is_traced_for_saving(d_unused):
    """Returns whether TensorFlow traces a gradient function for a SavedModel.

    `tf.saved_model.save` traces the gradient function of every custom gradient in the
    graphs that it writes, with a placeholder for each output. In a real derivative, an
    output that no operation uses has the gradient zero instead.

    Args:
        d_unused: tensor, the gradient for an output that no operation uses.
    """
    return not tf.executing_eagerly() and d_unused.op.type == "Placeholder"
