"""Operations that move elements: broadcasts, reshapes, slices, padding, concatenation, look-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode

from dfs_jax.onnx.graph import Graph
from dfs_jax.onnx.values import (
    Tensor,
    Value,
    as_tensor,
    avals,
    full,
    in_order,
    ordered,
    shape_of,
    usual_axes,
)

_Rule = Callable[[Graph, JaxprEqn, Sequence[Value], str], list[Value]]


def _broadcast(
    graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str
) -> list[Value]:
    """Adds dimensions of size 1; what reads them broadcasts."""
    x, shape = values[0], equation.params["shape"]
    dims = equation.params["broadcast_dimensions"]
    sizes: list[Any] = [1] * len(shape)
    for axis, place in enumerate(dims):
        sizes[place] = (x.sizes if isinstance(x, Tensor) else x.shape)[axis]
    if not isinstance(x, Tensor):
        return [x.reshape(sizes)]
    # In order of the operand's own dimensions, so that a reshape is enough.
    axes = _merged(usual_axes(len(shape)), [dims[a] for a in x.axes])
    if len(shape) == x.rank:
        return [Tensor(x.name, axes, tuple(sizes))]
    name = graph.add("Reshape", x.name, shape_of(graph, [sizes[a] for a in axes]))
    return [Tensor(name, axes, tuple(sizes))]


def _merged(usual: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """Returns the usual order of axes, changed so that `kept` come in their own order."""
    own = iter(kept)
    return tuple(next(own) if axis in kept else axis for axis in usual)


def _reshape(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    (x, *_), shape = values, _out(equation)
    assert isinstance(x, Tensor)
    before = avals(equation)[0]
    old = [a for a, s in enumerate(before.shape) if not _is_one(s)]
    new = [a for a, s in enumerate(shape) if not _is_one(s)]
    if [before.shape[a] for a in old] == [shape[a] for a in new]:  # only sizes of 1 come or go
        sizes: list[Any] = [1] * len(shape)
        for a, b in zip(old, new, strict=True):
            sizes[b] = x.sizes[a]
        moved = dict(zip(old, new, strict=True))
        axes = _merged(usual_axes(len(shape)), [moved[a] for a in x.axes if a in moved])
        name = graph.add("Reshape", x.name, shape_of(graph, [sizes[a] for a in axes]))
        return [Tensor(name, axes, tuple(sizes))]
    whole = full(graph, x, before.shape, batch)
    flat = ordered(graph, whole, in_order(x.rank))
    name = graph.add("Reshape", flat, shape_of(graph, shape))
    return [Tensor(name, in_order(len(shape)), tuple(shape))]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _out(equation: JaxprEqn) -> tuple[Any, ...]:
    aval: Any = equation.outvars[0].aval
    return tuple(aval.shape)


def _transpose(
    graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str
) -> list[Value]:
    x, order = values[0], equation.params["permutation"]
    assert isinstance(x, Tensor)
    return [Tensor(x.name, tuple(order.index(a) for a in x.axes), tuple(x.sizes[a] for a in order))]


def _slice(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    x, params = values[0], equation.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [_cut(graph, x, list(limits), _out(equation))]


def _cut(graph: Graph, x: Value, limits: list[tuple[Any, Any, int]], shape: Sequence[Any]) -> Value:
    """Returns a part of a tensor: start, end and step along each logical axis."""
    assert isinstance(x, Tensor)
    # Along dimensions of size 1 that stand for more, every part is the same.
    cut = [
        a
        for a, (start, end, step) in enumerate(limits)
        if not _is_one(x.sizes[a]) and (start, end, step) != (0, x.sizes[a], 1)
    ]
    if not cut:
        return x
    places = [x.place(a) for a in cut]
    columns = [graph.integers([limits[a][k] for a in cut]) for k in range(3)]
    name = graph.add("Slice", x.name, columns[0], columns[1], graph.integers(places), columns[2])
    if len(cut) == 1:
        graph.nodes[-1].extent = x.sizes[cut[0]]
    sizes = tuple(shape[a] if a in cut else size for a, size in enumerate(x.sizes))
    return Tensor(name, x.axes, sizes)


def _split(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    x, axis = values[0], equation.params["axis"]
    assert isinstance(x, Tensor)
    parts, start = [], 0
    for out, size in zip(equation.outvars, equation.params["sizes"], strict=True):
        limits: list[tuple[Any, Any, int]] = [(0, s, 1) for s in x.sizes]
        limits[axis] = (start, start + size, 1)
        aval: Any = out.aval
        parts.append(_cut(graph, x, limits, aval.shape))
        start += size
    return parts


def _reverse(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    x, least = values[0], np.iinfo(np.int64).min + 1
    assert isinstance(x, Tensor)
    cut = [a for a in equation.params["dimensions"] if not _is_one(x.sizes[a])]
    if not cut:
        return [x]
    columns = [graph.integers([value] * len(cut)) for value in (-1, least, -1)]
    places = graph.integers([x.place(a) for a in cut])
    name = graph.add("Slice", x.name, columns[0], columns[1], places, columns[2])
    return [x._replace(name=name)]


def _pad(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    x, value = values
    if isinstance(value, Tensor):
        raise NotImplementedError("a padding value that depends on the input")
    aval = avals(equation)[0]
    config = equation.params["padding_config"]
    if any(inner for _, _, inner in config):
        raise NotImplementedError("padding between elements")
    whole = as_tensor(graph, full(graph, x, aval.shape, batch))
    limits, kept = [], []
    for (low, high, _), size in zip(config, aval.shape, strict=True):
        end = size if high >= 0 else size + high
        start = max(-low, 0)
        limits.append((start, end, 1))
        kept.append(end - start if start else end)
    whole = as_tensor(graph, _cut(graph, whole, limits, kept))  # where padding is negative
    lows = [max(config[a][0], 0) for a in whole.axes]
    highs = [max(config[a][1], 0) for a in whole.axes]
    name = whole.name
    if any(lows) or any(highs):
        name = graph.add("Pad", name, graph.integers(lows + highs), graph.constant(value))
    return [Tensor(name, whole.axes, _out(equation))]


def _concatenate(
    graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str
) -> list[Value]:
    axis = equation.params["dimension"]
    shapes = [aval.shape for aval in avals(equation)]
    whole = [full(graph, x, shape, batch) for x, shape in zip(values, shapes, strict=True)]
    first = next(i for i, x in enumerate(values) if isinstance(x, Tensor))
    axes = as_tensor(graph, whole[first]).axes
    names = [ordered(graph, x, axes) for x in whole]
    name = graph.add("Concat", *names, axis=axes.index(axis))
    return [Tensor(name, axes, _out(equation))]


def _stack(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    axis = equation.params["axis"]
    aval = avals(equation)[0]
    whole = [full(graph, x, aval.shape, batch) for x in values]
    first = next(i for i, x in enumerate(values) if isinstance(x, Tensor))
    before = as_tensor(graph, whole[first]).axes
    # The new dimension lies just before that of the axis after it.
    at = before.index(axis) if axis < len(before) else len(before)
    moved = [a + (a >= axis) for a in before]
    axes = (*moved[:at], axis, *moved[at:])
    ones = [graph.add("Unsqueeze", ordered(graph, x, before), graph.integers([at])) for x in whole]
    return [Tensor(graph.add("Concat", *ones, axis=at), axes, _out(equation))]


def _unstack(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    x, axis = values[0], equation.params["axis"]
    aval = avals(equation)[0]
    whole = as_tensor(graph, full(graph, x, aval.shape, batch))
    parts: list[Value] = []
    for k in range(len(equation.outvars)):
        limits: list[tuple[Any, Any, int]] = [(0, s, 1) for s in aval.shape]
        limits[axis] = (k, k + 1, 1)
        sizes = [1 if a == axis else s for a, s in enumerate(aval.shape)]
        part = as_tensor(graph, _cut(graph, whole, limits, sizes))
        parts.append(_without_axes(graph, part, (axis,)))
    return parts


def _gather(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    """Takes one part at a known place (a slice, beside a batch of any size), or rows of a table."""
    numbers = equation.params["dimension_numbers"]
    aval, rows = avals(equation)
    indices, axes = values[1], numbers.start_index_map
    if numbers.operand_batching_dims:
        raise NotImplementedError("every example would look up in its own table")
    if len(rows.shape) == 1 and not isinstance(indices, Tensor):
        return [_part(graph, equation, values)]
    rank, out = len(rows.shape) - 1, len(_out(equation))
    if len(axes) == 1:  # the axes of the indices take the place of the one that is looked up in
        (axis,) = axes
        kept = [a for a in range(out) if not axis <= a < axis + rank]
    else:
        kept = [a for a in range(out) if a not in axes]
    sizes = [1 if a in axes else s for a, s in enumerate(aval.shape)]
    if (
        numbers.collapsed_slice_dims != tuple(axes)
        or list(numbers.offset_dims) != kept
        or list(equation.params["slice_sizes"]) != sizes
    ):
        raise NotImplementedError("it does not look rows up along whole axes")
    x = full(graph, values[0], aval.shape, batch)
    if len(axes) > 1:
        grid = None if isinstance(indices, Tensor) else _grid(indices)
        if grid is None:
            raise NotImplementedError("it looks up along several axes at once")
        tensor = as_tensor(graph, x)
        for axis, places in zip(axes, grid, strict=True):
            name = graph.add("Gather", tensor.name, graph.integers(places), axis=tensor.place(axis))
            tensor = tensor._replace(name=name)
        return [tensor._replace(sizes=_out(equation))]
    where = ordered(graph, full(graph, indices, rows.shape, batch), in_order(rank + 1))
    where = graph.add("Squeeze", where, graph.integers([rank]))
    if equation.params["mode"] == GatherScatterMode.CLIP:
        low, high = (graph.constant(np.array(v, rows.dtype)) for v in (0, aval.shape[axis] - 1))
        where = graph.add("Min", graph.add("Max", where, low), high)
    operand = ordered(graph, x, in_order(len(aval.shape)))
    return [Tensor(graph.add("Gather", operand, where, axis=axis), in_order(out), _out(equation))]


def _grid(indices: np.ndarray) -> list[list[int]] | None:
    """Returns the places along each axis, if the indices are all combinations of such; else None.

    Args:
      indices: indices `[n_1, ..., n_k, k]`.
    """
    k = indices.shape[-1]
    if indices.ndim != k + 1:
        return None
    places = [indices[(*[0] * a, slice(None), *[0] * (k - a - 1), a)] for a in range(k)]
    grid = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1)
    return [row.tolist() for row in places] if np.array_equal(grid, indices) else None


def _part(graph: Graph, equation: JaxprEqn, values: Sequence[Value]) -> Value:
    x, starts = values
    assert isinstance(x, Tensor)
    assert not isinstance(starts, Tensor)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    aval = avals(equation)[0]
    limits: list[tuple[Any, Any, int]] = [(0, s, 1) for s in aval.shape]
    for axis, start in zip(numbers.start_index_map, starts.tolist(), strict=True):
        if sizes[axis] == aval.shape[axis]:
            continue
        start = min(max(start, 0), aval.shape[axis] - sizes[axis])
        limits[axis] = (start, start + sizes[axis], 1)
    found = _cut(graph, x, limits, sizes)
    assert isinstance(found, Tensor)
    return _without_axes(graph, found, numbers.collapsed_slice_dims)


def _without_axes(graph: Graph, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Returns the tensor without logical axes of size 1."""
    if not axes:
        return x
    kept = [a for a in range(x.rank) if a not in axes]
    name = graph.add("Squeeze", x.name, graph.integers(sorted(map(x.place, axes))))
    left = tuple(kept.index(a) for a in x.axes if a in kept)
    return Tensor(name, left, tuple(x.sizes[a] for a in kept))


MOVES: dict[str, _Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
