"""Checks a SavedModel in a process without the model and its code.

    python -P saved_model_check.py SAVED_MODEL EXAMPLES

`export.py` runs this file by its path; EXAMPLES is the `.npz` file that it has written,
with arrays `SIGNATURE/NUMBER/inputs/NAME` and `SIGNATURE/NUMBER/outputs/NAME`. What is
wrong is the one line on stderr, with exit code 1.
"""

import collections
import re
import sys

import numpy as np
import tensorflow as tf

TOLERANCE = 1e-5


def main(path, examples):
    signatures = tf.saved_model.load(path).signatures
    for (name, number), arrays in _grouped(examples).items():
        check_graph(name, signatures[name].graph.as_graph_def())
        got = signatures[name](
            **{k: tf.constant(x) for k, x in arrays["inputs"].items()}
        )
        for output, live in arrays["outputs"].items():
            check_close(f"{output} of {name}, example {number},", got[output], live)
    if "revnet_tf" in sys.modules:
        sys.exit("Loading it has imported revnet_tf, which a server does not have.")


def check_graph(name, graph):
    """Ends the process if the graph has an operation of a gradient."""
    nodes = [graph.node, *(function.node_def for function in graph.library.function)]
    found = {node.op for part in nodes for node in part}
    # (The gradient for an image is also the forward pass of a transposed convolution.)
    gradients = sorted(
        op for op in found if re.search(r"Grad(V\d)?$|Filter(V\d)?$", op)
    )
    gradients += [g.function_name for g in graph.library.gradient]
    gradients += [g.gradient_func for g in graph.library.registered_gradients]
    if gradients:
        sys.exit(f"The graph of {name} has gradients: {', '.join(gradients)}.")


def check_close(what, got, live):
    """Ends the process unless the arrays are equal, up to how kernels are fused."""
    got = got.numpy()
    if got.shape != live.shape:
        sys.exit(f"{what} has the shape {got.shape}, live {live.shape}.")
    difference = np.abs(got - live).max()
    if not difference <= TOLERANCE * max(1.0, np.abs(live).max()):
        sys.exit(f"{what} differs from the model by {difference:.3g}.")


def _grouped(examples):
    grouped = collections.defaultdict(lambda: {"inputs": {}, "outputs": {}})
    with np.load(examples) as arrays:
        for key, array in arrays.items():
            signature, number, side, name = key.split("/")
            grouped[signature, number][side][name] = array
    return grouped


if __name__ == "__main__":
    main(*sys.argv[1:])
