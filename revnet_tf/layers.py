"""Reversible Keras layers: `RevBlock` and `RevSequence`, over any pair of branches."""

import keras
import tensorflow as tf

from revnet_tf import coupling

# Attribute of a symbolic output tensor: how the layer that is called on it next finds
# the `coupling.Handoff` of the run that made it.
_MADE_BY = "_revnet_tf_made_by"


class TwoStreamLayer(keras.layers.Layer):
    """What the layers that map two streams to two streams have in common.

    A subclass says how it maps the streams, in `forward` (an ordinary computation) and
    in `step` (the same as a step of `coupling.run`), and which shapes it takes, in
    `build_streams`. The streams have the variable dtype of the layer's policy, under a
    mixed policy too: only the branches compute in the lower precision.

    Args:
        axis: the axis on which a single tensor is split into the two streams.
        recompute: if `False`, use ordinary backpropagation (same values, more memory).
    """

    def __init__(self, *, axis=-1, recompute=True, dtype=None, **kwargs):
        policy = keras.dtype_policies.get(dtype)
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis={axis!r} must be an integer, as -1 or 3.")
        self.axis = axis
        self.recompute = recompute

    def build_streams(self, shape1, shape2):
        raise NotImplementedError

    def forward(self, x1, x2, training):
        raise NotImplementedError

    def step(self, variables, training):
        raise NotImplementedError

    def runs(self):
        """Returns `(layers, recompute)` pairs, in the order in which they apply."""
        return [([self], self.recompute)]

    def build(self, input_shape):
        self.build_streams(*self.stream_shapes(input_shape))

    def call(self, inputs, training=False):
        x1, x2 = self._split(inputs)
        received = _handoff_of(inputs, self._axis_of(inputs))
        for layers, recompute in self.runs():
            if recompute and training:
                result = self._run(layers, x1, x2, training, received)
                x1, x2, received = result.y1, result.y2, result.handoff
            else:
                for layer in layers:
                    x1, x2 = layer.forward(x1, x2, training)
                received = None
        outputs = self._join(x1, x2, inputs)
        _record_handoff(outputs, self._axis_of(inputs), received)
        return outputs

    def _run(self, layers, x1, x2, training, received):
        variables = _Variables()
        steps = [layer.step(variables, training) for layer in layers]
        before = variables.values(variables.state)
        result = coupling.run(
            steps, x1, x2, variables.values(variables.weights), before, received
        )
        for variable, old, new in zip(
            variables.state, before, result.state, strict=True
        ):
            if new is not old:
                variable.assign(new)
        for loss in result.losses:
            self.add_loss(loss)
        return result

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "axis": self.axis, "recompute": self.recompute}

    def _axis_of(self, inputs):
        """Returns the axis as a non-negative number, `None` for a pair."""
        return None if _is_pair(inputs) else self.axis % len(inputs.shape)

    def _split(self, inputs):
        if _is_pair(inputs):
            return inputs
        return tf.split(inputs, 2, self.axis)

    def _join(self, y1, y2, inputs):
        if _is_pair(inputs):
            return type(inputs)((y1, y2))
        return tf.concat([y1, y2], self.axis)

    def shape_after(self, layer, shape):
        """Returns the shape to which `layer` maps a stream, and builds the layer."""
        # A symbolic call also builds a subclassed layer that has no `build`.
        output = layer(keras.KerasTensor(shape, self.compute_dtype))
        if isinstance(output, keras.KerasTensor):
            return output.shape
        raise ValueError(
            f"{layer.name} returns {type(output).__name__}; a layer that works on a "
            "stream must return one tensor."
        )

    def joined_shape(self, shape1, shape2, input_shape):
        """Returns the shape of the output for an input of shape `input_shape`."""
        if _is_pair(input_shape[0]):
            return type(input_shape)((shape1, shape2))
        shape = list(shape1)
        shape[self.axis] += shape2[self.axis]
        return tuple(shape)

    def stream_shapes(self, input_shape):
        """Returns the shapes of both streams; refuses what cannot be split."""
        if isinstance(input_shape, dict) or (
            input_shape and isinstance(input_shape[0], (list, tuple))
        ):
            if isinstance(input_shape, dict) or len(input_shape) != 2:
                raise ValueError(
                    f"{self.name} takes one tensor or a pair (x1, x2); got "
                    f"{type(input_shape).__name__} of {len(input_shape)} shapes."
                )
            return tuple(input_shape[0]), tuple(input_shape[1])
        rank = len(input_shape)
        if not -rank <= self.axis < rank or self.axis % rank == 0:
            raise ValueError(
                f"axis={self.axis} is not an axis that an input of shape "
                f"{tuple(input_shape)} can be split on; use one from 1 to {rank - 1}, "
                "or a negative one (axis 0 is the batch)."
            )
        size = input_shape[self.axis]
        if size is None or size % 2 or size == 0:
            raise ValueError(
                f"An input of shape {tuple(input_shape)} has {size} entries on "
                f"axis={self.axis}, which cannot be split into two equal streams; use "
                "an even number, or call the layer on a pair (x1, x2)."
            )
        shape = list(input_shape)
        shape[self.axis] = size // 2
        return tuple(shape), tuple(shape)


class _ReversibleLayer(TwoStreamLayer):
    def inverse(self, outputs, training=False):
        """Returns the input that the layer maps to `outputs`; updates no state.

        Args:
            outputs: tensor or pair, as the layer returns it.
            training: passed to the branches. With `True`, batch statistics are those
                of the given batch, and what draws random numbers (dropout) draws other
                ones than the forward pass did: such a pass cannot be inverted.

        Returns:
            A tensor or pair like `outputs`, in the dtype of the streams.
        """
        if not self.built:
            raise ValueError(f"{self.name} has no weights yet; call or build it first.")
        outputs = tf.nest.map_structure(
            lambda y: keras.ops.convert_to_tensor(y, self.compute_dtype), outputs
        )
        variables = _Variables()
        steps = [
            layer.step(variables, training) for run, _ in self.runs() for layer in run
        ]
        streams = coupling.inverse(
            steps,
            *self._split(outputs),
            variables.values(variables.weights),
            variables.values(variables.state),
        )
        return self._join(*streams, outputs)


@keras.saving.register_keras_serializable("revnet_tf")
class RevBlock(_ReversibleLayer):
    """Reversible residual block: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Reversible means that the inputs can be computed from the outputs. In training, the
    block's activations are therefore not stored: the backward pass rebuilds them, for
    about the computation of one more forward pass.

    Blocks called one after the other (in a functional, sequential or subclassed model)
    keep as little as one block if the training step is a graph, as in `model.fit`. In
    eager mode TensorFlow keeps every block's output; a `RevSequence` does not.

    Args:
        f: layer that maps the second stream to the shape of the first.
        g: layer that maps the first stream to the shape of the second.
        axis: the axis on which a single input is split. Defaults to `-1`.
        recompute: if `False`, use ordinary backpropagation (same values, more memory);
            can be set at any time, and takes effect when the model is traced next.
            Defaults to `True`.
        **kwargs: arguments of `keras.layers.Layer`. The streams have the variable
            dtype of the policy, float32 under `mixed_float16` and `mixed_bfloat16`.

    Call arguments:
        inputs: tensor `(batch, ..., channels)` with an even size on `axis`, or a pair
            `(x1, x2)`.
        training: passed to `f` and `g`, in the forward pass and in the recomputation.
            With `False` nothing is recomputed.

    Output shape:
        That of the input.

    Raises:
        ValueError: the input cannot be split, or a branch changes the shape of its
            stream, also by broadcasting.
        NotImplementedError: for second derivatives and forward-mode derivatives
            through a reconstruction.

    Example:

    >>> branch = lambda: keras.layers.Conv2D(8, 3, padding="same")
    >>> block = revnet_tf.RevBlock(branch(), branch())
    >>> y = block(images)  # (batch, height, width, 16)
    >>> x = block.inverse(y)  # images again

    Reference:
        Gomez et al., 2017, section 3.1, https://arxiv.org/abs/1707.04585
    """

    def __init__(self, f, g, *, axis=-1, recompute=True, **kwargs):
        super().__init__(axis=axis, recompute=recompute, **kwargs)
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, keras.layers.Layer):
                raise ValueError(f"{name}={branch!r} must be a Keras layer or model.")
        self.f = f
        self.g = g

    def build_streams(self, shape1, shape2):
        self._build_branch("f", shape2, shape1)
        self._build_branch("g", shape1, shape2)

    def _build_branch(self, name, shape, expected):
        got = self.shape_after(getattr(self, name), shape)
        # A size of 1 on one side only would be broadcast by the sum, without a word.
        if len(got) != len(expected) or not all(
            a == b or (None in (a, b) and 1 not in (a, b))
            for a, b in zip(got, expected, strict=True)
        ):
            raise ValueError(
                f"{name} maps a stream of shape {shape} to {got}, but its output is "
                f"added to a stream of shape {expected}; change {name} so that the "
                "shapes agree."
            )

    def forward(self, x1, x2, training):
        y1 = x1 + tf.cast(self.f(x2, training=training), x1.dtype)
        y2 = x2 + tf.cast(self.g(y1, training=training), x2.dtype)
        return y1, y2

    def step(self, variables, training):
        def branch(layer):
            def call(x):
                return [tf.cast(layer(x, training=training), x.dtype)]

            return variables.branch(layer, call)

        return coupling.Coupling(branch(self.f), branch(self.g))

    def get_config(self):
        # The layers themselves: Keras serializes them, and notices shared ones.
        return {**super().get_config(), "f": self.f, "g": self.g}

    @classmethod
    def from_config(cls, config):
        return cls(**restore_layers(config, ("f", "g")))


@keras.saving.register_keras_serializable("revnet_tf")
class RevSequence(_ReversibleLayer):
    """Reversible blocks applied in order, storing activations for the last one only.

    Memory for activations does not depend on the number of blocks, in graph mode, with
    XLA and in eager mode.

    Args:
        blocks: list of `RevBlock`, with the same `axis`; a `RevSequence` among them
            stands for its blocks. Blocks with `recompute=False` are differentiated in
            the ordinary way, and split the run.
        recompute: if `False`, use ordinary backpropagation for all blocks (same values,
            more memory). Defaults to `True`.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments, output shape, raises:
        As for `RevBlock`.

    Reference:
        Gomez et al., 2017, section 3.2, https://arxiv.org/abs/1707.04585
    """

    def __init__(self, blocks, *, recompute=True, **kwargs):
        flat = []
        for block in blocks:
            if isinstance(block, RevSequence):
                flat += block.blocks
                if not block.recompute:
                    for inner in block.blocks:
                        inner.recompute = False
            elif isinstance(block, RevBlock):
                flat.append(block)
            else:
                raise ValueError(
                    f"blocks holds {block!r}; every block must be a RevBlock or a "
                    "RevSequence."
                )
        if not flat:
            raise ValueError("blocks is empty; give at least one RevBlock.")
        axes = {block.axis for block in flat}
        if len(axes) > 1:
            raise ValueError(
                f"blocks have different axes, {sorted(axes)}; give all the same axis."
            )
        super().__init__(axis=axes.pop(), recompute=recompute, **kwargs)
        self.blocks = flat
        for i, block in enumerate(flat):
            # `tf.train.Checkpoint` looks for layers in attributes, but not in lists.
            setattr(self, f"block{i + 1}", block)

    def build_streams(self, shape1, shape2):
        for block in self.blocks:
            if not block.built:
                block.build((shape1, shape2))

    def runs(self):
        runs = []
        for block in self.blocks:
            recompute = self.recompute and block.recompute
            if runs and runs[-1][1] == recompute:
                runs[-1][0].append(block)
            else:
                runs.append(([block], recompute))
        return runs

    def get_config(self):
        config = super().get_config()
        del config["axis"]  # that of the blocks
        return {**config, "blocks": list(self.blocks)}

    @classmethod
    def from_config(cls, config):
        return cls(**restore_layers(config, ("blocks",)))


class _Variables:
    """The variables of all branches of a run, each once."""

    def __init__(self):
        self.weights = []
        self.state = []

    def branch(self, owner, call):
        """Returns a function that uses the variables of a layer as a pure branch.

        Args:
            owner: the layer.
            call: function of tensors that returns a list of tensors.
        """
        weights, state = owner.trainable_variables, owner.non_trainable_variables

        def function(weight_values, state_values, *inputs):
            given = [*weight_values, *state_values]
            own = [*weights, *state]
            with keras.StatelessScope(
                state_mapping=zip(own, given, strict=True), collect_losses=True
            ) as scope:
                outputs = call(*inputs)
            _refuse_side_effects(owner, weights, weight_values, own, scope)
            new_state = [scope.get_current_value(v) for v in state]
            return outputs, new_state, scope.losses

        return coupling.Branch(
            function, _positions(weights, self.weights), _positions(state, self.state)
        )

    @staticmethod
    def values(variables):
        return [tf.convert_to_tensor(v.value) for v in variables]


def _positions(variables, among):
    """Returns where `variables` stand in the list `among`; appends missing ones."""
    known = {id(v): i for i, v in enumerate(among)}
    for v in variables:
        if id(v) not in known:
            known[id(v)] = len(among)
            among.append(v)
    return [known[id(v)] for v in variables]


def _refuse_side_effects(owner, weights, weight_values, own, scope):
    """Refuses what the recomputation could not repeat."""
    for variable, value in zip(weights, weight_values, strict=True):
        if scope.get_current_value(variable) is not value:
            raise ValueError(
                f"{owner.name} assigns its own trainable weight {variable.path} when "
                "it is called, which the recomputation cannot follow; set "
                "`recompute=False` on the block."
            )
    if len(scope.state_mapping) > len(own):
        raise ValueError(
            f"{owner.name} changes the state of a variable that does not belong to it, "
            "as a random operation without a seed generator of its own does; create a "
            "`keras.random.SeedGenerator` in the layer and pass it as `seed`, or set "
            "`recompute=False` on the block."
        )


def restore_layers(config, names, memo=None):
    """Returns `config` with the layers under `names` made anew.

    They come serialized from a file, and as live layers from `get_config`; one that is
    used twice is made once.
    """
    memo = {} if memo is None else memo

    def restore(value):
        if isinstance(value, (list, tuple)):
            return [restore(v) for v in value]
        if not isinstance(value, keras.layers.Layer):
            return keras.saving.deserialize_keras_object(value)
        if id(value) not in memo:
            inner = value.get_config()
            if isinstance(value, RevBlock):
                memo[id(value)] = type(value)(**restore_layers(inner, ("f", "g"), memo))
            else:
                memo[id(value)] = type(value).from_config(inner)
        return memo[id(value)]

    return {**config, **{name: restore(config[name]) for name in names}}


def _is_pair(inputs):
    return isinstance(inputs, (list, tuple))


def _handoff_of(inputs, axis):
    """Returns the handoff of the run that made exactly these inputs, or `None`."""
    if tf.executing_eagerly():
        return None
    made_by = [getattr(x, _MADE_BY, None) for x in tf.nest.flatten(inputs)]
    if None in made_by:
        return None
    handoff = made_by[0][0]
    expected = [(handoff, axis, i) for i in range(len(made_by))]
    return handoff if made_by == expected else None


def _record_handoff(outputs, axis, handoff):
    if handoff is not None and not tf.executing_eagerly():
        for i, y in enumerate(tf.nest.flatten(outputs)):
            setattr(y, _MADE_BY, (handoff, axis, i))
