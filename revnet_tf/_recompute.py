"""The layer that recomputes any layer in the backward pass."""

from collections.abc import Callable
from typing import Any, Self

import keras
import tensorflow as tf

from revnet_tf import _coupling
from revnet_tf._functional import Variables
from revnet_tf._layer import RunLayer, pair_of_origin, static_bool, symbolic
from revnet_tf._pair import Pair, Shapes


@keras.saving.register_keras_serializable("revnet_tf")
class Recompute(RunLayer):
    """Stores the inputs of a layer only, and recomputes the layer in the backward pass.

    In training, the activations inside the layer are not stored. The backward pass
    evaluates the layer once more, for the computation of one more forward pass. The
    second evaluation has the weights, the moving statistics and the dropout masks of
    the first one. Moving statistics and seeds advance once, and losses count once.

    `keras.remat` has this purpose, too. With TensorFlow it updates the moving
    statistics twice and draws new dropout masks.

    Args:
        layer: Keras layer or model, with any inputs and outputs.
        recompute: bool; `False`: use ordinary backpropagation (same values, more
            memory). The attribute can be set at any time. It takes effect in the next
            trace of the model. Defaults to `True`.
        **kwargs: arguments of `keras.layers.Layer`. The dtype is that of `layer`.

    Call arguments:
        *args, **kwargs: the call arguments of `layer`: tensors, also sparse, ragged and
            nested ones, and other values. Masks of tensors reach the layer. A tensor
            that the layer finds in another way has no gradient.
        training: bool. With `False` or `None` the layer is called as it is.

    Output shape:
        The output of `layer`, with its masks.

    Raises:
        ValueError: `layer` is no Keras layer, or `dtype` is not the dtype of the layer.
            Or the layer has an effect that cannot be repeated; the message names it.
        NotImplementedError: a second or a forward-mode derivative is taken.

    Example:

    >>> attention = keras.layers.MultiHeadAttention(8, 64, dropout=0.1)
    >>> y = revnet_tf.Recompute(attention)(query, value)
    """

    LAYERS = ("layer",)

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        recompute: bool = True,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"layer must be a Keras layer or model; got {layer!r}.")
        policy = layer.dtype_policy
        if dtype is not None and keras.dtype_policies.get(dtype).name != policy.name:
            raise ValueError(
                f"Expected the dtype of {layer.name}, {policy.name}; got "
                f"dtype={dtype}. Give the dtype to the layer only."
            )
        # The layer itself casts its inputs.
        super().__init__(recompute=recompute, dtype=policy, autocast=False, **kwargs)
        self.layer = layer
        self.supports_masking = True

    def specs(self, args: tuple, kwargs: dict) -> dict:
        return symbolic({"args": args, **kwargs}, leave_out=("training",))

    def build(self, input_shape: Shapes | None = None) -> None:
        if self.layer.built:
            return
        if input_shape is not None:
            self.layer.build(input_shape)
            return
        arguments = dict(self._extra_specs)
        self.layer(*arguments.pop("args", ()), **arguments)

    def call(self, *args, training: bool | None = None, **kwargs) -> Any:
        if self.stores(static_bool(training)) or not self.recompute:
            return self.layer(*args, training=training, **kwargs)
        given = args, kwargs
        inputs, pack_inputs = _tensors((given, _masks(given)))
        pair, pack_outputs = pair_of_origin(inputs), None

        def evaluate(*streams):
            nonlocal pack_outputs
            given = _with_masks(pack_inputs(pair.join(streams)))
            outputs = self.layer(*given[0], training=training, **given[1])
            outputs, pack_outputs = _tensors((outputs, _masks(outputs)))
            return outputs

        handoffs = self.received(inputs, pair)
        outputs = self.run([self], inputs, evaluate, (pair, Pair()), *handoffs)
        return _with_masks(pack_outputs(outputs))

    def block(
        self, evaluate: Callable, owner: Variables | None = None
    ) -> _coupling.Recompute:
        return _coupling.Recompute(owner.function(self.layer.name, evaluate, {}))

    def compute_output_spec(self, *args, **kwargs) -> Any:
        return self.layer(*args, **kwargs)

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        # The call of the layer has given masks to the outputs.
        return None


@keras.saving.register_keras_serializable("revnet_tf")
class Stem(Recompute):
    """`Recompute` of the first layers of a network.

    A class of its own, because the name of the class is in the files of weights.
    """

    @classmethod
    def from_config(cls, config: dict) -> Self:
        # Version 0.1 wrote these two, and cast the output to the dtype.
        left_out = ("axis", "dtype")
        return super().from_config(
            {k: v for k, v in config.items() if k not in left_out}
        )


def _tensors(nested):
    """Returns the tensors in a nested structure, and a function that packs others."""
    flat = tf.nest.flatten(nested, expand_composites=True)
    where = [i for i, x in enumerate(flat) if tf.is_tensor(x)]

    def pack(tensors):
        filled = list(flat)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        return tf.nest.pack_sequence_as(nested, filled, expand_composites=True)

    return [flat[i] for i in where], pack


def _masks(nested):
    """Returns the mask of each leaf of a nested structure, or `None`."""
    return [getattr(x, "_keras_mask", None) for x in tf.nest.flatten(nested)]


def _with_masks(pair):
    """Returns the first of two nested structures, with the second one as its masks."""
    nested, masks = pair
    for x, mask in zip(tf.nest.flatten(nested), masks, strict=True):
        if mask is not None:
            x._keras_mask = mask
    return nested
