"""The steps between the levels of a reversible U-Net, for one to three dimensions.

The layers take the streams of the runs before them. Neither these runs nor the layers
store the join of two streams.
"""

import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

from revnet_tf import _coupling, _xla
from revnet_tf._functional import CallArguments, Variables
from revnet_tf._layer import PairLayer, StreamLayer
from revnet_tf._pair import Pair, Pairs, Shape, stream_shapes

_JOINED = Pair(-1)


@keras.saving.register_keras_serializable("revnet_tf")
class Readout(PairLayer):
    """Applies a layer to the list of both streams, and recomputes its activations.

    Args:
        layer: Keras layer, maps a list of two tensors to one tensor, or to a list of
            two. The output of the readout is one tensor: two are joined.
        **kwargs: the arguments `axis` and `recompute` of `RevBlock`, and those of
            `keras.layers.Layer`.
    """

    LAYERS = ("layer",)

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def build_streams(self, shape1: Shape, shape2: Shape) -> None:
        output = _symbolic_call(self.layer, [shape1, shape2], self.compute_dtype)
        joined = isinstance(output, list)
        self._ends = Pair(len(output[0].shape) - 1) if joined else Pair()

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        inputs = self.cast(inputs)
        arguments = self.call_arguments(training, (None, None), {})
        pair = Pair(self.axis % len(inputs.shape))
        (output,) = self.apply_blocks([inputs], arguments, pair, self._ends)
        return output

    def block(
        self, arguments: CallArguments, owner: Variables | None = None
    ) -> _coupling.Recompute:
        return _coupling.Recompute(arguments.function(self.layer, 0, owner))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shapes = self.stream_shapes(input_shape)
        output = _symbolic_call(self.layer, list(shapes), self.compute_dtype)
        return _joined_shape(output)


@keras.saving.register_keras_serializable("revnet_tf")
class SkipConnection(StreamLayer):
    """Adds a layer's outputs to both streams of a tensor: `y = x + layer(z)`.

    In training the layer stores `z`. The backward pass reconstructs `x` from `y`.

    Args:
        layer: Keras layer, maps the list of both streams of `z` to a list of two
            tensors with the shapes of the streams of `x`.
        fraction_bits: int or `None`, the argument of `RevBlock`.
        **kwargs: the argument `recompute` of `RevBlock`, and those of
            `keras.layers.Layer`.

    Call arguments:
        inputs: list of two tensors, `x` and `z`.
    """

    LAYERS = ("layer",)
    stores_inputs = False

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        fraction_bits: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.layer = layer
        self.fraction_bits = fraction_bits

    def build(self, input_shape: Sequence[Shape]) -> None:
        shapes = stream_shapes(self.name, input_shape[1], -1)
        _symbolic_call(self.layer, list(shapes), self.compute_dtype)

    def call(
        self, inputs: Sequence[tf.Tensor], training: bool | None = None
    ) -> tf.Tensor:
        inputs = self.cast(list(inputs))
        arguments = self.call_arguments(training, (None, None), {})
        pair = Pair(len(inputs[0].shape) - 1)
        (output,) = self.apply_blocks(inputs, arguments, Pairs((pair, pair)), pair)
        return output

    def block(
        self, arguments: CallArguments, owner: Variables | None = None
    ) -> _coupling.Skip:
        return _coupling.Skip(
            arguments.function(self.layer, 0, owner),
            arguments.fraction_bits,
            elementary=not arguments.training,
        )

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        return tuple(input_shape[0])

    def get_config(self) -> dict:
        return {**super().get_config(), "fraction_bits": self.fraction_bits}


def _symbolic_call(layer, shapes, dtype):
    return layer([keras.KerasTensor(shape, dtype) for shape in shapes], training=False)


def _joined_shape(output):
    if not isinstance(output, list):
        return output.shape
    *others, channels = output[0].shape
    return (*others, channels + output[1].shape[-1])


@keras.saving.register_keras_serializable("revnet_tf")
class Projection(keras.layers.Layer):
    """The convolution with kernels of one voxel, of the join of several tensors.

    The layer does not make the join.

    Args:
        filters: int, the channels of the output.
        num_outputs: int or `None`. With an int the layer returns a list of so many
            tensors, into which it splits the channels. Defaults to `None`, one tensor.
        activation: activation of the output. Defaults to `None`.
        kernel_regularizer: regularizer of the kernel.

    Call arguments:
        inputs: list of tensors `(batch, *sizes, channels)` with equal sizes.
    """

    def __init__(
        self,
        filters: int,
        num_outputs: int | None = None,
        *,
        activation: str | None = None,
        kernel_regularizer: keras.Regularizer | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.filters = filters
        self.num_outputs = num_outputs
        self.activation = keras.activations.get(activation)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def build(self, input_shape: Sequence[Shape]) -> None:
        channels = sum(shape[-1] for shape in input_shape)
        self.kernel = self.add_weight(
            shape=(channels, self.filters),
            initializer="glorot_uniform",
            regularizer=self.kernel_regularizer,
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(self.filters,), initializer="zeros", name="bias"
        )

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor | list[tf.Tensor]:
        count = self.num_outputs or 1
        kernels = tf.split(tf.convert_to_tensor(self.kernel), count, axis=1)
        biases = tf.split(tf.convert_to_tensor(self.bias), count)
        outputs = [*map(functools.partial(self._project, inputs), kernels, biases)]
        return outputs[0] if self.num_outputs is None else outputs

    def _project(self, inputs, kernel, bias):
        parts = tf.split(kernel, [x.shape[-1] for x in inputs])
        terms = [tf.tensordot(x, k, 1) for x, k in zip(inputs, parts, strict=True)]
        return self.activation(tf.nn.bias_add(tf.add_n(terms), bias))

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape | list[Shape]:
        sizes = tuple(input_shape[0][:-1])
        if self.num_outputs is None:
            return (*sizes, self.filters)
        return [(*sizes, self.filters // self.num_outputs)] * self.num_outputs

    def get_config(self) -> dict:
        config = {
            "filters": self.filters,
            "num_outputs": self.num_outputs,
            "activation": keras.activations.serialize(self.activation),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("revnet_tf")
class MaxPooling(keras.layers.Layer):
    """Halves all sizes: the largest value of each window of two pixels a side.

    For the gradient of its max-pooling, XLA for CPUs makes an index tensor for each
    dimension. There the layer compares pairs of pixels, one axis after the other. The
    axes are in the order in which equal values have the same gradient. TensorFlow for
    CPUs pools volumes in float32 and bfloat16 only; the layer compares pairs otherwise.

    Input shape:
        `(batch, *sizes, channels)` with one, two or three even sizes.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        has_kernel = len(inputs.shape) < 5 or inputs.dtype in (tf.float32, tf.bfloat16)
        if has_kernel and not _xla.is_traced():
            return keras.ops.max_pool(inputs, 2, 2, "valid", "channels_last")
        for axis in reversed(range(1, len(inputs.shape) - 1)):
            shape = known_shape(inputs)
            shape[axis : axis + 1] = [shape[axis] // 2, 2]
            inputs = tf.maximum(*tf.unstack(tf.reshape(inputs, shape), 2, axis + 1))
        return inputs

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch_size, *sizes, channels = input_shape
        return batch_size, *(size and size // 2 for size in sizes), channels


def known_shape(x):
    """Returns the sizes of a tensor as a list: ints, and tensors for open ones."""
    sizes = zip(x.shape.as_list(), tf.unstack(tf.shape(x)), strict=True)
    return [open_size if size is None else size for size, open_size in sizes]


@keras.saving.register_keras_serializable("revnet_tf")
class LinearUpsampling(keras.layers.Layer):
    """Doubles all sizes by linear interpolation, bilinear or trilinear.

    Pixels are areas, as in `tf.image.resize`: the center of the first input pixel lies
    between the centers of the first two output pixels ("half-pixel centers"). Pixels
    beyond the border have the value of the last one.

    Input shape:
        `(batch, *sizes, channels)`.

    Output shape:
        The same, with twice the sizes.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        for axis in range(1, len(inputs.shape) - 1):
            inputs = _doubled(inputs, axis)
        return inputs

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch_size, *sizes, channels = input_shape
        return batch_size, *(size and 2 * size for size in sizes), channels


def _doubled(x, axis):
    """Returns `x` with two values for each one along an axis."""
    before, after = [[0, 0]] * len(x.shape), [[0, 0]] * len(x.shape)
    before[axis], after[axis] = [1, 0], [0, 1]
    every = (slice(None),) * axis
    # Each output lies at a quarter of the way from one input to the next.
    quarter = 0.25 * (x[(*every, slice(1, None))] - x[(*every, slice(-1))])
    pair = tf.stack([x - tf.pad(quarter, before), x + tf.pad(quarter, after)], axis + 1)
    shape = known_shape(x)
    shape[axis] = 2 * shape[axis]
    return tf.reshape(pair, shape)


@keras.saving.register_keras_serializable("revnet_tf")
class PaddingToMultiple(keras.layers.Layer):
    """Adds zeros after the end of each size, up to a multiple of `divisor`.

    Args:
        divisor: int, a divisor of all sizes of the output.
    """

    def __init__(self, divisor: int, **kwargs):
        super().__init__(**kwargs)
        self.divisor = divisor

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        missing = -tf.shape(inputs)[1:-1] % self.divisor
        ends = tf.pad(missing, [[1, 1]])
        return tf.ensure_shape(
            tf.pad(inputs, tf.stack([tf.zeros_like(ends), ends], 1)),
            self.compute_output_shape(inputs.shape),
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch_size, *sizes, channels = input_shape
        sizes = (size and size + -size % self.divisor for size in sizes)
        return batch_size, *sizes, channels

    def get_config(self) -> dict:
        return {**super().get_config(), "divisor": self.divisor}


@keras.saving.register_keras_serializable("revnet_tf")
class CutToSize(keras.layers.Layer):
    """Cuts the end of each size, to the sizes of another tensor.

    Call arguments:
        inputs: list of a tensor `(batch, *sizes, channels)` and the other tensor.
    """

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        x, like = inputs
        size = tf.concat([[-1], tf.shape(like)[1:-1], [-1]], 0)
        y = tf.slice(x, tf.zeros_like(size), size)
        return tf.ensure_shape(y, self.compute_output_shape([x.shape, like.shape]))

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        x, like = input_shape
        return x[0], *like[1:-1], x[-1]
