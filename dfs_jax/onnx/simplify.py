"""Simplifies a graph: removes what has no effect, and folds constants into layers.

Multiplications and additions of constants are merged, and then become part of the convolution or
dense layer before them, so that a batch normalisation costs nothing. Those that remain become a
`BatchNormalization`, which runtimes keep in the layout of their convolutions. Operators for whole
functions, such as `Softmax`, replace the operations that they consist of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dfs_jax.onnx.graph import Graph, Node
from dfs_jax.onnx.patterns import as_gelu, as_layer_norm, as_softmax, with_its_shift
from dfs_jax.onnx.sweep import Sweep

_NEARLY = 1e-6  # products such as 9 * (1 / 9) are 1 within float32's rounding


def simplified(graph: Graph, outputs: Sequence[str]) -> list[str]:
    """Simplifies a graph in place; returns the names of its outputs, in their order."""
    graph.drop_unused(outputs)
    for rules in ((_computed_once,), _FIRST, _THEN):
        while Sweep(graph, outputs).run(rules):
            graph.drop_unused(outputs)  # unused nodes would still count as readers
    return _named_at_the_source(graph, outputs)


def _named_at_the_source(graph: Graph, outputs: Sequence[str]) -> list[str]:
    """Lets the node that computes an output bear its name, in place of an `Identity` behind it."""
    made = {node.output: node for node in graph.nodes}
    names = list(outputs)
    for k, output in enumerate(outputs):
        node = made[output]
        source = node.inputs[0] if node.op == "Identity" else output
        if source in made and source not in names:
            graph.nodes.remove(node)
            names[k] = source
    return names


def _computed_once(sweep: Sweep, node: Node) -> bool:
    """Removes a node that computes what a node before it does."""
    key = node.op, tuple(node.inputs), repr(sorted(node.attributes.items()))
    before = sweep.computed.setdefault(key, node.output)
    return before != node.output and sweep.drop(node, before)


def _without_identity(sweep: Sweep, node: Node) -> bool:
    """Removes an `Identity`, or lets the node before it make an output of the graph."""
    if node.op != "Identity":
        return False
    before = sweep.made.get(node.inputs[0])
    if before is not None and sweep.sole(node.inputs[0], before.op):
        sweep.take_over(before, node)
        return True
    return sweep.drop(node, node.inputs[0])


def _with_sums_and_products(sweep: Sweep, node: Node) -> bool:
    """Turns differences and quotients by constants into sums and products."""
    if node.op not in ("Sub", "Div"):
        return False
    constant = sweep.known(node.inputs[1])
    if constant is None or constant.dtype.kind != "f":
        return False
    node.op, new = ("Add", -constant) if node.op == "Sub" else ("Mul", 1 / constant)
    node.inputs[1] = sweep.graph.constant(new)
    return True


def _merged(sweep: Sweep, node: Node) -> bool:
    """Merges products with products, sums with sums, and moves sums behind products."""
    after = sweep.split(node, "Mul", "Add")
    before = after and sweep.sole(after[0], "Mul", "Add")
    inner = before and sweep.split(before, "Mul", "Add")
    if not (after and before and inner) or (before.op, node.op) == ("Mul", "Add"):
        return False
    x, (a, b) = inner[0], (inner[1], after[1])
    constant = sweep.graph.constant
    if before.op == node.op:
        node.inputs = [x, constant(a * b if node.op == "Mul" else a + b)]
        sweep.uses[before.output] = 0
        return True
    before.op, before.inputs = "Mul", [x, constant(b)]
    node.op, node.inputs = "Add", [before.output, constant(a * b)]
    return True


def _without_ones(sweep: Sweep, node: Node) -> bool:
    """Removes products with 1 and sums with 0."""
    found = sweep.split(node, "Mul", "Add")
    neutral = node.op == "Mul"
    if found is None or not np.allclose(found[1], neutral, rtol=0, atol=_NEARLY * neutral):
        return False
    return found[1].size == 1 and sweep.drop(node, found[0])


def _into_layer(sweep: Sweep, node: Node) -> bool:
    """Makes a product or sum part of the convolution or matrix product before it."""
    found = sweep.split(node, "Mul", "Add")
    layer = found and sweep.sole(found[0], "Conv", "MatMul", "Gemm")
    weights = layer and sweep.known(layer.inputs[1])
    if not (found and layer) or weights is None:
        return False
    is_conv, constant = layer.op == "Conv", found[1]
    width = weights.shape[0 if is_conv else 1]
    if is_conv:
        fits = constant.size == 1 or constant.shape == (1, width, *[1] * (weights.ndim - 2))
    else:
        fits = constant.size == 1 or constant.shape == (*[1] * (constant.ndim - 1), width)
    if not fits or (layer.op == "MatMul" and node.op == "Add" and constant.ndim != 2):
        return False
    row = np.broadcast_to(constant.reshape(-1), (width,))
    bias = sweep.known(layer.inputs[2]) if len(layer.inputs) > 2 else None
    if node.op == "Mul":
        across = row.reshape(-1, *[1] * (weights.ndim - 1)) if is_conv else row
        layer.inputs[1] = sweep.graph.constant(weights * across)
        bias = None if bias is None else bias * row
    else:
        bias = row if bias is None else bias + row
        layer.op = "Conv" if is_conv else "Gemm"
    if bias is not None:
        layer.inputs[2:] = [sweep.graph.constant(bias)]
    sweep.take_over(layer, node)
    return True


def _whole_again(sweep: Sweep, node: Node) -> bool:
    """Joins neighbouring slices of one value, of which a feature's two parts are an example."""
    if node.op != "Concat":
        return False
    parts = [sweep.along(name, node.attributes["axis"]) for name in node.inputs]
    for k, (one, two) in enumerate(itertools.pairwise(parts)):
        if one is None or two is None or one[:1] != two[:1] or one[2] != two[1]:
            continue
        (x, start, _, extent), end = one, two[2]
        if (start, end) == (0, extent):
            joined = x
        else:
            axis, step = sweep.graph.integers([node.attributes["axis"]]), sweep.graph.integers([1])
            edges = [sweep.graph.integers([edge]) for edge in (start, end)]
            joined = sweep.insert(Node("Slice", [x, *edges, axis, step], "", {}, extent))
        node.inputs[k : k + 2] = [joined]
        if len(node.inputs) == 1:
            node.op, node.attributes = "Identity", {}
        return True
    return False


def _as_mean(sweep: Sweep, node: Node) -> bool:
    """Turns a sum that is divided by the number of its terms into a mean."""
    found = sweep.split(node, "Mul")
    summed = found and sweep.sole(found[0], "ReduceSum")
    if not (found and summed) or found[1].size != 1 or summed.extent is None:
        return False
    if abs(float(found[1].reshape(())) * summed.extent - 1) > _NEARLY:
        return False
    summed.op = "ReduceMean"
    sweep.take_over(summed, node)
    return True


def _as_relu(sweep: Sweep, node: Node) -> bool:
    """Turns a maximum with 0 into a `Relu`, and one within bounds into a `Clip`."""
    found = sweep.split(node, "Max", "Min")
    if found is None or found[1].size != 1:
        return False
    x, bound = found[0], found[1].reshape(())
    if node.op == "Max":
        if bound != 0:
            return False
        node.op, node.inputs = "Relu", [x]
        return True
    before = sweep.sole(x, "Relu", "Max")
    if before is None:
        return False
    low = np.zeros((), bound.dtype)
    if before.op == "Max":
        inner = sweep.split(before, "Max")
        if inner is None or inner[1].size != 1:
            return False
        low = inner[1].reshape(())
    limits = [sweep.graph.constant(low), sweep.graph.constant(bound)]
    before_input = next(name for name in before.inputs if name not in sweep.graph.constants)
    node.op, node.inputs = "Clip", [before_input, *limits]
    sweep.uses[before.output] = 0
    return True


def _resized_once(sweep: Sweep, node: Node) -> bool:
    """Merges two resizings, such as one of each axis."""
    before = sweep.sole(node.inputs[0], "Resize") if node.op == "Resize" else None
    if before is None or before.attributes != node.attributes:
        return False
    scales = [sweep.known(x.inputs[2]) for x in (before, node)]
    if scales[0] is None or scales[1] is None or np.any((scales[0] != 1) & (scales[1] != 1)):
        return False
    node.inputs = [before.inputs[0], "", sweep.graph.constant(scales[0] * scales[1])]
    sweep.uses[before.output] = 0
    return True


def _as_batch_norm(sweep: Sweep, node: Node) -> bool:
    """Turns a scale and a shift for each channel of an image into a `BatchNormalization`."""
    after = sweep.split(node, "Add")
    before = after and sweep.sole(after[0], "Mul")
    inner = before and sweep.split(before, "Mul")
    if not (after and inner and before):
        return False
    scale, shift = inner[1], after[1]
    width = max(scale.size, shift.size)
    wanted = ((1, width, 1, 1), (1, 1, 1, 1))
    if width == 1 or scale.shape not in wanted or shift.shape not in wanted:
        return False
    rows = [np.broadcast_to(x.reshape(-1), (width,)) for x in (scale, shift)]
    rows += [np.zeros(width, scale.dtype), np.ones(width, scale.dtype)]
    node.op, node.attributes = "BatchNormalization", {"epsilon": 0.0}
    node.inputs = [inner[0], *map(sweep.graph.constant, rows)]
    sweep.uses[before.output] = 0
    return True


_FIRST = (
    _without_identity,
    _whole_again,
    _with_sums_and_products,
    _merged,
    _without_ones,
    _into_layer,
    _as_mean,
    _as_relu,
    _resized_once,
)
_THEN = (as_softmax, as_layer_norm, with_its_shift, as_gelu, _as_batch_norm)
