"""Functions with an operator of their own in ONNX, found by their name in the traced program.

Where a name is not found, the function's own operations are converted, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from dfs_jax.onnx.graph import Graph
from dfs_jax.onnx.values import Tensor, Value, as_tensor, avals, full


def called(equation: JaxprEqn) -> str:
    """Returns the name of the function that a `custom_jvp_call` calls; "" if it is not known."""
    source = getattr(equation.params["call_jaxpr"].jaxpr.debug_info, "func_src_info", None)
    return (source or "").partition(" ")[0]


def _doubled(graph: Graph, equation: JaxprEqn, values: Sequence[Value], batch: str) -> list[Value]:
    """See `dfs_jax.layers.doubled`."""
    before, after = avals(equation)[0].shape, equation.outvars[0].aval
    shape: tuple[Any, ...] = tuple(after.shape)  # type: ignore[attr-defined]
    x = as_tensor(graph, full(graph, values[0], before, batch))
    grown = [a for a, (one, other) in enumerate(zip(before, shape, strict=True)) if one != other]
    scales = graph.constant(np.array([2.0 if a in grown else 1.0 for a in x.axes], np.float32))
    options = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    return [Tensor(graph.add("Resize", x.name, "", scales, **options), x.axes, shape)]


NAMED: dict[str, Callable[..., list[Value]]] = {"doubled": _doubled}
