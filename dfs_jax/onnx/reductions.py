"""Reductions over axes and over windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from dfs_jax.onnx.graph import Graph
from dfs_jax.onnx.values import CHANNELS_FIRST, Tensor, Value, as_tensor, avals, full, ordered

_Rule = Callable[[Graph, JaxprEqn, Sequence[Value], str], list[Value]]


def _reduce(op: str) -> _Rule:
    def rule(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
        aval = avals(equation)[0]
        axes = equation.params["axes"]
        # A thin axis stands for many equal elements, of which a sum counts every one.
        shape = [s if a in axes else None for a, s in enumerate(aval.shape)]
        x = values[0]
        assert isinstance(x, Tensor)
        wanted = [x.sizes[a] if s is None else s for a, s in enumerate(shape)]
        x = as_tensor(graph, full(graph, x, wanted, batch))
        places = sorted(x.place(a) for a in axes)
        terms = [x.sizes[a] for a in axes]
        count = math.prod(terms) if all(isinstance(s, int) for s in terms) else None
        if op == "ReduceSum" and x.rank == 4 and places == [2, 3] and count is not None:
            mean = graph.add("GlobalAveragePool", x.name)
            mean = graph.add("Flatten", mean, axis=1)
            name = graph.add("Mul", mean, graph.constant(np.full((1, 1), count, aval.dtype)))
            return [_without(x, axes, name)]
        name = graph.add(op, x.name, graph.integers(places), keepdims=0)
        graph.nodes[-1].extent = count
        return [_without(x, axes, name)]

    return rule


def _without(x: Tensor, axes: Sequence[int], name: str) -> Tensor:
    """Returns the tensor `name`, which is x without some logical axes."""
    kept = [a for a in range(x.rank) if a not in axes]
    left = tuple(kept.index(a) for a in x.axes if a not in axes)
    return Tensor(name, left, tuple(x.sizes[a] for a in kept))


def _arg(op: str) -> _Rule:
    def rule(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
        from onnx import helper

        aval = avals(equation)[0]
        (axis,) = equation.params["axes"]
        x = as_tensor(graph, full(graph, values[0], aval.shape, batch))
        name = graph.add(op, x.name, axis=x.place(axis), keepdims=0)
        to = helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["index_dtype"]))
        return [_without(x, (axis,), graph.add("Cast", name, to=to))]

    return rule


def _window(op: str) -> _Rule:
    def rule(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
        params = equation.params
        aval = avals(equation)[0]
        out: Any = equation.outvars[0].aval
        window, padding = params["window_dimensions"], params["padding"]
        if len(window) != 4 or window[0] != 1 or window[3] != 1:
            raise NotImplementedError(f"a window of {list(window)}")
        if {*params["base_dilation"], *params["window_dilation"]} != {1}:
            raise NotImplementedError("a dilated window")
        x = ordered(graph, full(graph, values[0], aval.shape, batch), CHANNELS_FIRST)
        pads = [padding[1][0], padding[2][0], padding[1][1], padding[2][1]]
        shape = {
            "kernel_shape": list(window[1:3]),
            "strides": list(params["window_strides"][1:3]),
            "pads": pads,
        }
        if op == "MaxPool":
            name = graph.add(op, x, **shape)
        else:  # a sum is the average times the window, whose padding counts as zeros
            mean = graph.add(op, x, **shape, count_include_pad=1)
            size = np.full((1, 1, 1, 1), math.prod(window), aval.dtype)
            name = graph.add("Mul", mean, graph.constant(size))
        return [Tensor(name, CHANNELS_FIRST, tuple(out.shape))]

    return rule


REDUCTIONS: dict[str, _Rule] = {
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _window("MaxPool"),
    "reduce_window_sum": _window("AveragePool"),
}
