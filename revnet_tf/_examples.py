"""Inputs on which `export` compares an exported model with the live one."""

import re
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

BATCH_SIZES = (1, 7, 32)
# Sizes to try for the open dimensions of an input, such as height and width. Wide
# kernels and many strides need large sizes, tables of positions small ones.
SIZES = (32, 64, 128, 256, 16, 8, 4, 2, 1)
# A batch with more values may not fit into memory.
MAX_VALUES = 2**23


def given(examples, spec: tf.TensorSpec) -> np.ndarray:
    """Returns examples as an array in the dtype of an input.

    Raises:
        ValueError: the examples have another shape or kind of dtype, or are empty.
    """
    array = np.asarray(examples)
    dtype = tf.as_dtype(array.dtype)
    fits = dtype == spec.dtype or (
        tf.string not in (dtype, spec.dtype)
        and np.can_cast(array.dtype, spec.dtype.as_numpy_dtype, "same_kind")
    )
    shape = [None, *spec.shape[1:]]
    if (
        not fits
        or not array.size
        or not spec.shape[1:].is_compatible_with(array.shape[1:])
    ):
        raise ValueError(
            f"examples must be a batch of {spec.dtype.name} inputs of the shape "
            f"{tuple(shape)}; got {dtype.name} of the shape {array.shape}. Give a "
            "batch of real inputs."
        )
    return array.astype(spec.dtype.as_numpy_dtype)


def batches(
    model: keras.Model,
    spec: tf.TensorSpec,
    answer: Callable[[np.ndarray], np.ndarray],
    examples: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Returns inputs for a check, in batches of 1, 7 and 32.

    Without examples the function draws random inputs, in ways and sizes that suit the
    layers of the model. It stops at inputs to which all answers are finite.

    Args:
        model: functional `keras.Model`.
        spec: `tf.TensorSpec` of its input. If it has a batch size, the function returns
            one batch of this size.
        answer: function from a batch to the answers of the live model. It raises an
            exception if the model does not accept the batch.
        examples: array of inputs, or `None`.

    Returns:
        A list of arrays. If the model gives no finite answer to any random input, the
        function warns and the list is empty.

    Raises:
        ValueError: the model does not accept the examples.
    """
    sizes = BATCH_SIZES if spec.shape[0] is None else (spec.shape[0],)
    if examples is not None:
        found = [examples[np.arange(size) % len(examples)] for size in sizes]
        try:
            answer(found[-1])
        except (ValueError, tf.errors.OpError) as error:
            raise ValueError(
                f"Expected inputs of {model.name}; it does not take `examples`: "
                f"{_reason(error)}. Give a batch of its inputs."
            ) from error
        return found
    best, best_share, reason = [], 0.0, "none of its answers is finite"
    for shape in _shapes(spec, max(sizes)):
        for draw in _draws(model, spec):
            drawn = [draw(np.random.default_rng(n), (n, *shape)) for n in sizes]
            try:
                share = np.mean([_finite_share(answer(x)) for x in drawn])
            except (ValueError, tf.errors.OpError) as error:
                reason = _reason(error)
                continue
            if share == 1:
                return drawn
            if share > best_share:
                best, best_share = drawn, share
    if not best:
        warnings.warn(
            f"The exported {model.name} is not checked, because the model gives no "
            f"answer to random inputs ({reason}). Give `examples`, a batch of real "
            "inputs.",
            stacklevel=3,
        )
    return best


def encoded(images: np.ndarray) -> np.ndarray:
    """Returns `uint8` images as PNG files. Replaces other images by noise."""
    if images.dtype != np.uint8:
        rng = np.random.default_rng(len(images))
        images = rng.integers(0, 256, images.shape, np.uint8)
    return np.array([tf.io.encode_png(image).numpy() for image in images])


def _finite_share(answers):
    return np.mean(np.isfinite(answers)) if answers.dtype.kind == "f" else 1.0


def _reason(error):
    """Returns the line of TensorFlow's message that names the fault."""
    lines = [line for line in str(error).splitlines() if "[[{{node" not in line]
    fault = [line for line in lines if line.strip()][-1]
    return re.sub(r"{{.*?}}", "", fault).strip(" .")


def _shapes(spec, batch_size):
    """Returns shapes to try for an example, without those of too large batches."""
    sizes = SIZES if None in spec.shape[1:] else SIZES[:1]
    shapes = [tuple(known or size for known in spec.shape[1:]) for size in sizes]
    return shapes[:1] + [s for s in shapes[1:] if batch_size * np.prod(s) < MAX_VALUES]


def _draws(model, spec):
    """Returns functions `draw(rng, shape)`. The first suits the layers best."""
    layers = model._flatten_layers()
    dtype = spec.dtype.as_numpy_dtype
    if spec.dtype == tf.string:
        words = _vocabulary(layers, str) or [f"word{i}" for i in range(10)]
        is_text = any(isinstance(x, keras.layers.TextVectorization) for x in layers)
        return [_strings(words, 8 if is_text else 1), _strings(words, 1)]
    # Indices within the smallest table are within all tables of words and positions.
    tables = [x.input_dim for x in layers if isinstance(x, keras.layers.Embedding)]
    tables += [
        x.num_tokens for x in layers if isinstance(x, keras.layers.CategoryEncoding)
    ]
    if spec.dtype == tf.bool:
        return [_whole(2, dtype)]
    if spec.dtype.is_integer:
        if known := _vocabulary(layers, np.integer):
            return [lambda rng, shape: rng.choice(known, shape).astype(dtype)]
        high = min([256, np.iinfo(dtype).max + 1, *tables])
        return [_whole(high, dtype), _whole(2, dtype)]
    kinds = keras.layers.InputLayer, keras.Model
    first = next((x for x in layers if not isinstance(x, kinds)), None)
    if isinstance(first, keras.layers.Embedding):
        return [_whole(min(tables), dtype)]
    return [
        lambda rng, shape: rng.uniform(0, 1, shape).astype(dtype),
        lambda rng, shape: rng.standard_normal(shape).astype(dtype),
        lambda rng, shape: rng.uniform(0, 256, shape).astype(dtype),
    ]


def _whole(high, dtype):
    return lambda rng, shape: rng.integers(0, high, shape).astype(dtype)


def _strings(words, length):
    def draw(rng, shape):
        drawn = rng.choice(words, (*shape, length)).reshape(-1, length)
        # TensorFlow also returns strings as objects of type `bytes`.
        texts = [" ".join(found).encode() for found in drawn]
        return np.array(texts, object).reshape(shape)

    return draw


def _vocabulary(layers, kind):
    """Returns the entries of type `kind` in the vocabularies of lookup layers."""
    return [
        entry
        for layer in layers
        if hasattr(layer, "get_vocabulary") and not getattr(layer, "invert", False)
        for entry in layer.get_vocabulary(include_special_tokens=False)
        if isinstance(entry, kind)
    ]
