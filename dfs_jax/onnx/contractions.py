"""Convolutions and products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from dfs_jax.onnx.graph import Graph
from dfs_jax.onnx.values import Tensor, Value, as_tensor, avals, full, in_order, ordered, shape_of

_Rule = Callable[[Graph, JaxprEqn, Sequence[Value], str], list[Value]]


def _convolution(
    graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str
) -> list[Value]:
    params = equation.params
    x, kernel = values
    lhs, rhs = (aval.shape for aval in avals(equation))
    out: Any = equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1 or {*params["lhs_dilation"]} - {1}:
        raise NotImplementedError("a transposed convolution, or one grouped by examples")
    if len(lhs) not in (3, 4):
        raise NotImplementedError(f"a convolution of {len(lhs) - 2} dimensions")
    image = ordered(graph, full(graph, x, lhs, batch), numbers.lhs_spec)
    weights = ordered(graph, full(graph, kernel, rhs, batch), numbers.rhs_spec)
    low, high = zip(*params["padding"], strict=True)
    name = graph.add(
        "Conv",
        image,
        weights,
        kernel_shape=[rhs[a] for a in numbers.rhs_spec[2:]],
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[*low, *high],
    )
    return [Tensor(name, tuple(numbers.out_spec), tuple(out.shape))]


def _product(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    a, b = values
    shapes = [aval.shape for aval in avals(equation)]
    out: Any = equation.outvars[0].aval
    if not isinstance(a, Tensor):  # the tensor first: its own axes then come first in the result
        swapped = (right_axes, left_axes), (right_batch, left_batch)
        assert isinstance(b, Tensor)
        found = _matmul(graph, b, a, shapes[::-1], *swapped, batch=batch)
        n, left = len(left_batch), len(shapes[0]) - len(left_axes)
        right = len(shapes[1]) - len(right_axes) - n
        # found: batch, free axes of b, free axes of a; wanted: batch, those of a, those of b.
        order = [*range(n), *range(n + right, right + left), *range(n, n + right)]
        return [_permuted(found, order)]
    assert isinstance(a, Tensor)
    found = _matmul(
        graph, a, b, shapes, (left_axes, right_axes), (left_batch, right_batch), batch=batch
    )
    assert len(found.sizes) == len(out.shape)
    return [found]


def _permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """Returns a transposed tensor: axis i of the result is axis `order[i]` of x."""
    return Tensor(
        x.name, tuple(list(order).index(a) for a in x.axes), tuple(x.sizes[a] for a in order)
    )


def _matmul(
    graph: Graph,
    a: Tensor,
    b: Value,
    shapes: Sequence[tuple[Any, ...]],
    contracted: tuple[Sequence[int], Sequence[int]],
    batched: tuple[Sequence[int], Sequence[int]],
    *,
    batch: str,
) -> Tensor:
    """Returns the product, its logical axes: batch, free axes of a, free axes of b."""
    free_a = [x for x in range(len(shapes[0])) if x not in (*contracted[0], *batched[0])]
    free_b = [x for x in range(len(shapes[1])) if x not in (*contracted[1], *batched[1])]
    a = as_tensor(graph, full(graph, a, shapes[0], batch))
    if not isinstance(b, Tensor) and not batched[0]:
        return _with_weights(graph, a, np.broadcast_to(b, shapes[1]), contracted, free_b)
    b = full(graph, b, shapes[1], batch)
    sizes = [shapes[0][x] for x in (*batched[0], *free_a)] + [shapes[1][x] for x in free_b]
    left = ordered(graph, a, (*batched[0], *free_a, *contracted[0]))
    right = ordered(graph, b, (*batched[1], *contracted[1], *free_b))
    lead = [shapes[0][x] for x in batched[0]]
    left = _grouped(
        graph, left, lead, [shapes[0][x] for x in free_a], [shapes[0][x] for x in contracted[0]]
    )
    right = _grouped(
        graph, right, lead, [shapes[1][x] for x in contracted[1]], [shapes[1][x] for x in free_b]
    )
    name = graph.add("MatMul", left, right)
    if len(free_a) != 1 or len(free_b) != 1:
        name = graph.add("Reshape", name, shape_of(graph, sizes))
    return Tensor(name, in_order(len(sizes)), tuple(sizes))


def _grouped(graph: Graph, name: str, lead: list[Any], rows: list[Any], columns: list[Any]) -> str:
    """Returns a tensor of the shape [*lead, *rows, *columns] as one of matrices."""
    if len(rows) == 1 and len(columns) == 1:
        return name
    return graph.add("Reshape", name, shape_of(graph, [*lead, _size(rows), _size(columns)]))


def _size(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _with_weights(
    graph: Graph,
    a: Tensor,
    weights: np.ndarray,
    contracted: tuple[Sequence[int], Sequence[int]],
    free: Sequence[int],
) -> Tensor:
    """Returns the product of a tensor and constants, without a transpose where there is one."""
    own = [x for x in range(a.rank) if x not in contracted[0]]
    sizes = [a.sizes[x] for x in own] + [weights.shape[x] for x in free]
    rows = _size([weights.shape[x] for x in contracted[1]])
    matrix = weights.transpose(*contracted[1], *free).reshape(rows, -1)
    before = [x for x in a.axes if x in own]
    if (
        len(contracted[0]) == 1
        and a.rank >= 3
        and a.place(contracted[0][0]) == a.rank - 2
        and len(free) == 1
    ):
        # The axis lies last but one: the matrix multiplies from the left.
        name = graph.add("MatMul", graph.constant(matrix.T), a.name)
        held = [len(own) if x in contracted[0] else own.index(x) for x in a.axes]
        return Tensor(name, tuple(held), tuple(sizes))
    left = ordered(graph, a, (*before, *contracted[0]))
    if len(contracted[0]) != 1:
        left = graph.add("Reshape", left, shape_of(graph, [*(a.sizes[x] for x in before), rows]))
    name = graph.add("MatMul", left, graph.constant(matrix))
    held = [*(own.index(x) for x in before), *range(len(own), len(sizes))]
    if len(free) != 1:
        name = graph.add("Reshape", name, shape_of(graph, [sizes[x] for x in held]))
    return Tensor(name, tuple(held), tuple(sizes))


CONTRACTIONS: dict[str, _Rule] = {
    "conv_general_dilated": _convolution,
    "dot_general": _product,
}
