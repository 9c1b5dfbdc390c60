"""The beginning and the end of a network, in the manner of `keras.applications`."""

import os

import keras


def check_arguments(weights, pooling):
    """Raises `ValueError` for a value that `finished` or `head` cannot use."""
    if weights is not None and not os.path.exists(weights):
        raise ValueError(
            f"Expected the path of a file; got weights={weights!r}. Give the path of a "
            "`.weights.h5` file, or `None`."
        )
    if pooling not in (None, "avg", "max"):
        raise ValueError(
            f"pooling must be None, 'avg' or 'max'; got pooling={pooling!r}."
        )


def model_input(input_tensor, input_shape):
    """Returns the inputs of a model, and the tensor that its first layer receives.

    Args:
        input_tensor: `keras.KerasTensor`, or `None` for a new input.
        input_shape: tuple, the shape of a new input without the batch.
    """
    if input_tensor is None:
        inputs = keras.Input(input_shape)
        return inputs, inputs
    inputs = keras.utils.get_source_inputs(input_tensor)
    return inputs[0] if len(inputs) == 1 else inputs, input_tensor


def head(
    x,
    include_top,
    pooling,
    classes,
    classifier_activation,
    kernel_regularizer,
    bias_regularizer=None,
):
    """Applies pooling and the classifier. The arguments are those of `iRevNet`."""
    if include_top or pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D("channels_last", name="avg_pool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D("channels_last", name="max_pool")(x)
    if not include_top:
        return x
    return keras.layers.Dense(
        classes,
        activation=classifier_activation,
        kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in", "uniform"),
        kernel_regularizer=kernel_regularizer,
        bias_regularizer=bias_regularizer,
        # Probabilities need full precision, also under a mixed policy.
        dtype=keras.config.dtype_policy().variable_dtype,
        name="predictions",
    )(x)


def finished(model, weights):
    """Returns `model` with the weights of a `.weights.h5` file, if there is one."""
    if weights is not None:
        model.load_weights(weights)
    return model
