"""The base class of reversible layers."""

import itertools

import keras
import tensorflow as tf

from revnet_tf import _fixed_point, _functional, _run
from revnet_tf._functional import CallArguments
from revnet_tf._layer import PairLayer
from revnet_tf._pair import Shape, Shapes, Tensors, listed


class ReversibleLayer(PairLayer):
    """A layer whose blocks are all reversible. It therefore has an inverse.

    Subclasses define `shapes_after`.
    """

    stores_inputs = False
    # Whether the layer acts on one tensor as a whole, if that is not split yet.
    takes_whole = False
    # Whether the layer makes the masks of its input invalid.
    moves_positions = False

    def __init__(self, *, fraction_bits: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if fraction_bits is not None:
            _fixed_point.validate(fraction_bits, self.compute_dtype)
        self.fraction_bits = fraction_bits

    def build(self, input_shape: Shapes) -> None:
        super().build(input_shape)
        self._output_shapes = self.shapes_after(listed(self.name, input_shape))

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        shapes = self.shapes_after(listed(self.name, input_shape))
        if len(shapes) == 1:
            return shapes[0]
        return self.joined_shape(*shapes, input_shape)

    def shapes_after(self, shapes: list[Shape]) -> list[Shape]:
        """Returns the shapes of the outputs for one tensor, or for two streams.

        In a sequence, one tensor becomes two streams at the first `RevBlock`.
        """
        raise NotImplementedError

    def inverse(
        self,
        outputs: Tensors,
        training: bool = False,
        mask: Tensors | None = None,
        **kwargs,
    ) -> Tensors:
        """Returns the input that the layer maps to `outputs`.

        The method does not update the state of the layer.

        Args:
            outputs: tensor or pair of tensors, the output of the layer.
            training: bool, passed to the branches. With `True`, batch statistics are
                those of the given batch. Dropout then draws another mask than in the
                forward pass, and the result is not the input. Defaults to `False`.
            mask: mask of `outputs`, or a pair of masks.
            **kwargs: the keyword arguments of the call of the layer.

        Returns:
            A tensor or pair like `outputs`, in the dtype of the streams.

        Raises:
            ValueError: the layer is not built, or `outputs` is symbolic or has a shape
                that no output of the layer has.
        """
        if not self.built:
            raise ValueError(
                f"Expected a layer with weights; {self.name} has none yet. Call or "
                "build it first."
            )
        if any(isinstance(y, keras.KerasTensor) for y in tf.nest.flatten(outputs)):
            raise ValueError(
                "Expected tensors with values; got a symbolic KerasTensor. Call "
                f"`{self.name}.inverse` in the `call` of a layer of your own, and use "
                "that layer in the model."
            )
        outputs = self.cast(tf.nest.map_structure(tf.convert_to_tensor, outputs))
        self._check_output(outputs)
        pair_in, pair_out = self.pairs(outputs)
        arguments = self.call_arguments(training, pair_out.split_mask(mask), kwargs)
        blocks = []
        after = itertools.islice(self.blocks_in_order(), len(pair_in.leading), None)
        for layer, _ in after:
            owner = _functional.Variables(layer)
            blocks.append((layer.block(arguments, owner), owner, None, None))
        steps, weights, state = _functional.steps(blocks)
        values = _functional.values(weights), _functional.values(state)
        streams = pair_out.split(tf.nest.flatten(outputs))
        streams = _run.inverse(steps, streams, pair_in, *values)
        return tf.nest.pack_sequence_as(outputs, pair_in.join(streams))

    def _check_output(self, outputs):
        """Raises `ValueError` if no output of the layer has the widths of `outputs`."""
        shapes = [tuple(y.shape) for y in tf.nest.flatten(outputs)]
        shapes = listed(self.name, shapes if len(shapes) > 1 else shapes[0])
        expected = self._output_shapes
        if len(shapes) < len(expected):
            shapes = self.stream_shapes(shapes[0])
        elif len(shapes) > len(expected):
            expected = self.stream_shapes(expected[0])
        for got, known in zip(shapes, expected, strict=True):
            if got[self.axis] != known[self.axis] and known[self.axis] is not None:
                raise ValueError(
                    f"Expected the output of {self.name}, which has streams of the "
                    f"shapes {expected}; got {shapes}. Give `inverse` a tensor, or a "
                    "pair, of this width."
                )

    def get_config(self) -> dict:
        return {**super().get_config(), "fraction_bits": self.fraction_bits}


class RearrangingLayer(ReversibleLayer):
    """A reversible layer that can move positions to channels. It then has no masks."""

    def call_arguments(
        self, training: bool | None, masks: tuple, extra: dict
    ) -> CallArguments:
        self._refuse_mask(masks)
        return super().call_arguments(training, masks, extra)

    def compute_mask(self, inputs: Tensors, previous_mask: Tensors | None) -> Tensors:
        self._refuse_mask(tf.nest.flatten(previous_mask))
        return super().compute_mask(inputs, previous_mask)

    def _refuse_mask(self, masks):
        layers = [layer for layer, _ in self.blocks_in_order() if layer.moves_positions]
        if layers and any(mask is not None for mask in masks):
            raise ValueError(
                f"Expected an input without a mask, because {layers[0].name} moves "
                f"positions to channels; {self.name} got a mask. Remove the mask, or "
                "apply it before."
            )
