"""Functions that have an operator of their own, found as the operations they consist of.

Softmax             exp(x - c) / sum exp(x - c), c the same for the terms of a sum
LayerNormalization  (x - mean x) / sqrt(var x + epsilon) * scale + shift, along the last dimension
Gelu                x / 2 * (1 + erf(x / sqrt 2)), in the order in which runtimes recognise it
"""

from __future__ import annotations

import math

import numpy as np

from dfs_jax.onnx.graph import Node
from dfs_jax.onnx.sweep import Sweep


def as_softmax(sweep: Sweep, node: Node) -> bool:
    """Turns exponentials that are divided by their sum into a `Softmax`."""
    raised = sweep.of(node.inputs[0], "Exp") if node.op == "Div" else None
    total = raised and _along(sweep, node.inputs[1], "ReduceSum")
    if not (raised and total) or total[0] != raised.output:
        return False
    axis, x = total[1], raised.inputs[0]
    shifted, rank = sweep.of(x, "Sub"), len(_shape(sweep, node.inputs[1]))
    if shifted is not None and _is_single(sweep, shifted.inputs[1], axis, rank):
        x = shifted.inputs[0]
    node.op, node.inputs, node.attributes = "Softmax", [x], {"axis": axis}
    return True


def as_layer_norm(sweep: Sweep, node: Node) -> bool:
    """Turns a normalisation along the last dimension into a `LayerNormalization`."""
    if node.op != "Mul":
        return False
    for centred, scaled in (node.inputs, node.inputs[::-1]):
        x = _centred(sweep, centred)
        scale, root = _scale(sweep, scaled)
        if x is None or root is None:
            continue
        epsilon = _epsilon(sweep, root, x, centred)
        width = sweep.made[sweep.made[sweep.made[centred].inputs[1]].inputs[0]].extent
        if epsilon is None or width is None:
            continue
        row = np.ones(width, epsilon.dtype) if scale is None else scale.reshape(-1)
        if row.size != width:
            continue
        node.op, node.inputs = "LayerNormalization", [x, sweep.graph.constant(row)]
        node.attributes = {"axis": -1, "epsilon": float(epsilon)}
        return True
    return False


def with_its_shift(sweep: Sweep, node: Node) -> bool:
    """Makes a sum part of the `LayerNormalization` before it."""
    found = sweep.split(node, "Add")
    before = found and sweep.sole(found[0], "LayerNormalization")
    if not (found and before) or len(before.inputs) > 2:
        return False
    width, shift = sweep.graph.constants[before.inputs[1]].size, found[1]
    if shift.shape != (*[1] * (shift.ndim - 1), width):
        return False
    before.inputs.append(sweep.graph.constant(shift.reshape(-1)))
    sweep.take_over(before, node)
    return True


def as_gelu(sweep: Sweep, node: Node) -> bool:
    """Writes x / 2 * erfc(-x / sqrt 2) in the order in which runtimes recognise a Gelu."""
    if node.op != "Mul":
        return False
    for half, tail in (node.inputs, node.inputs[::-1]):
        halved, rest = sweep.of(half, "Mul"), sweep.of(tail, "Sub")
        erf = rest and sweep.of(rest.inputs[1], "Erf")
        scaled = erf and sweep.of(erf.inputs[0], "Mul")
        outer, inner = halved and sweep.split(halved, "Mul"), scaled and sweep.split(scaled, "Mul")
        if not (outer and rest and inner) or not _is(sweep.known(rest.inputs[0]), 1):
            continue
        x, negated = outer[0], sweep.of(inner[0], "Neg")
        if negated is None or negated.inputs != [x]:
            continue
        if not (_is(outer[1], 0.5) and _is(inner[1], math.sqrt(0.5))):
            continue
        number = lambda value, like=outer[1]: sweep.graph.constant(np.array(value, like.dtype))  # noqa: E731
        z = sweep.insert(Node("Div", [x, number(math.sqrt(2))], "", {}))
        z = sweep.insert(Node("Erf", [z], "", {}))
        z = sweep.insert(Node("Add", [z, number(1)], "", {}))
        z = sweep.insert(Node("Mul", [x, z], "", {}))
        node.inputs = [z, number(0.5)]
        return True
    return False


def _along(sweep: Sweep, name: str, op: str) -> tuple[str, int] | None:
    """Returns what is reduced by an operator, and along which dimension, which is kept with size 1.

    Where the result is combined with a value of the shape before, no other reshaping fits.
    """
    reshaped = sweep.of(name, "Reshape")
    reduced = reshaped and sweep.of(reshaped.inputs[0], op)
    axes = reduced and sweep.known(reduced.inputs[1])
    if not (reshaped and reduced) or axes is None or axes.size != 1:
        return None
    axis, rank = int(axes[0]), len(_shape(sweep, name))
    return (reduced.inputs[0], axis) if _is_single(sweep, name, axis, rank) else None


def _shape(sweep: Sweep, name: str) -> tuple[int, ...]:
    """Returns the shape of a reshaped value, with -1 for the batch; () if it is not known."""
    reshaped = sweep.of(name, "Reshape")
    shape = None if reshaped is None else sweep.known(reshaped.inputs[1])
    return () if shape is None else tuple(shape.tolist())


def _is_single(sweep: Sweep, name: str, axis: int, rank: int) -> bool:
    """Returns whether a value is reshaped to this rank and has size 1 in a dimension."""
    shape = _shape(sweep, name)
    return axis < len(shape) == rank and shape[axis] == 1


def _centred(sweep: Sweep, name: str) -> str | None:
    """Returns x of x - mean x, along the last dimension."""
    difference = sweep.of(name, "Sub")
    mean = difference and _along(sweep, difference.inputs[1], "ReduceMean")
    if not (difference and mean) or mean[0] != difference.inputs[0]:
        return None
    return mean[0] if mean[1] == len(_shape(sweep, difference.inputs[1])) - 1 else None


def _scale(sweep: Sweep, name: str) -> tuple[np.ndarray | None, Node | None]:
    """Returns the constant and the square root of constant / root."""
    product = sweep.of(name, "Mul")
    found = product and sweep.split(product, "Mul")
    inverse = sweep.of(found[0] if found else name, "Div")
    if inverse is None or not _is(sweep.known(inverse.inputs[0]), 1):
        return None, None
    return found[1] if found else None, sweep.of(inverse.inputs[1], "Sqrt")


def _epsilon(sweep: Sweep, root: Node, x: str, centred: str) -> np.ndarray | None:
    """Returns epsilon of sqrt(var x + epsilon), in either way to compute the variance."""
    kept = sweep.made[centred].inputs[1]  # the mean, with its dimension
    rank = len(_shape(sweep, kept))
    total = sweep.of(root.inputs[0], "Add")
    found = total and sweep.split(total, "Add")
    if not found or found[1].size != 1:
        return None
    name, epsilon = found[0], found[1].reshape(())
    if not _is_single(sweep, name, rank - 1, rank):
        return None
    direct = _along(sweep, name, "ReduceMean")
    if direct is not None:
        return epsilon if direct[1] == rank - 1 and _is_square(sweep, direct[0], centred) else None
    reshaped = sweep.of(name, "Reshape")
    positive = reshaped and sweep.of(reshaped.inputs[0], "Relu")
    difference = positive and sweep.of(positive.inputs[0], "Sub")
    squares = difference and sweep.of(difference.inputs[0], "ReduceMean")
    if not (difference and squares) or not _is_square(sweep, squares.inputs[0], x):
        return None
    mean = sweep.made[kept].inputs[0]
    same_axes = squares.inputs[1] == sweep.made[mean].inputs[1]
    return epsilon if same_axes and _is_square(sweep, difference.inputs[1], mean) else None


def _is_square(sweep: Sweep, name: str, of: str) -> bool:
    product = sweep.of(name, "Mul")
    return product is not None and product.inputs == [of, of]


def _is(constant: np.ndarray | None, value: float) -> bool:
    return constant is not None and bool(np.all(np.abs(constant - value) <= 1e-6 * abs(value)))
