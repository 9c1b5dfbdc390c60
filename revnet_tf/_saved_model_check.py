"""Checks a SavedModel in a process without the model and its code.

    python -P _saved_model_check.py SAVED_MODEL EXAMPLES

`export.py` runs this file by its path. EXAMPLES is an `.npz` file with arrays
`SIGNATURE/NUMBER/inputs/NAME` and `SIGNATURE/NUMBER/outputs/NAME`. A fault is one line
on stderr, with exit code 1.
"""

import collections
import re
import sys

import numpy as np
import tensorflow as tf

TOLERANCE = 1e-5
# The largest share of differing values that are not floating-point, such as the index
# of the largest value. Where two values are nearly equal, rounding decides the index.
MAX_DIFFERING_SHARE = 0.01


def main(path, examples):
    signatures = tf.saved_model.load(path).signatures
    for name, signature in signatures.items():
        check_graph(name, signature.graph.as_graph_def())
    for (name, number), arrays in _grouped(examples).items():
        got = signatures[name](
            **{k: tf.constant(x) for k, x in arrays["inputs"].items()}
        )
        for output, live in arrays["outputs"].items():
            fault = find_fault(got[output].numpy(), live, TOLERANCE)
            if fault:
                sys.exit(f"{output} of {name}, example {number}, {fault}.")
    if "revnet_tf" in sys.modules:
        sys.exit("Loading it imported revnet_tf, which a server does not have.")


def check_graph(name, graph):
    """Ends the process if the graph has an operation of a gradient."""
    nodes = [graph.node, *(function.node_def for function in graph.library.function)]
    found = {node.op for part in nodes for node in part}
    # Not `Conv2DBackpropInput`: it is also the forward pass of a transposed
    # convolution.
    gradients = sorted(
        op for op in found if re.search(r"Grad(V\d)?$|Filter(V\d)?$", op)
    )
    gradients += [g.function_name for g in graph.library.gradient]
    gradients += [g.gradient_func for g in graph.library.registered_gradients]
    if gradients:
        sys.exit(f"The graph of {name} has gradients: {', '.join(gradients)}.")


def find_fault(got: np.ndarray, live: np.ndarray, tolerance: float) -> str | None:
    """Returns the difference to the answers of the live model as a text, or `None`.

    NaN equals NaN, and infinity equals infinity, because a model can return them.

    Args:
        got, live: arrays, the answers of the file and of the model.
        tolerance: float, the largest difference, relative to the largest value and
            to 1.
    """
    if got.shape != live.shape:
        return f"has the shape {got.shape}, live {live.shape}"
    if live.dtype.kind not in "fc":
        share = np.mean(got != live)
        if share > MAX_DIFFERING_SHARE:
            return f"differs from the model in {share:.0%} of the values"
        return None
    differs = ~((got == live) | (np.isnan(got) & np.isnan(live)))
    difference = np.abs(got[differs] - live[differs]).max(initial=0)
    largest = np.abs(live[np.isfinite(live)]).max(initial=1)
    if not difference <= tolerance * largest:
        return f"differs from the model by {difference:.3g}"
    return None


def _grouped(examples):
    grouped = collections.defaultdict(lambda: {"inputs": {}, "outputs": {}})
    # NumPy stores strings as arrays of objects.
    with np.load(examples, allow_pickle=True) as arrays:
        for key, array in arrays.items():
            signature, number, side, name = key.split("/")
            grouped[signature, number][side][name] = array
    return grouped


if __name__ == "__main__":
    main(*sys.argv[1:])
