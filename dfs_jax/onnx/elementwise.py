"""Operations on the elements of equal shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from dfs_jax.onnx.graph import Graph
from dfs_jax.onnx.values import (
    Tensor,
    Value,
    as_array,
    avals,
    in_order,
    narrowed,
    ordered,
    usual_axes,
)
from dfs_jax.tracing.equations import bind

_Emit = Callable[..., str]


def elementwise(graph: Graph, equation: JaxprEqn, values: Sequence[Value]) -> Value:
    """Returns the result of an equation whose primitive is in `ELEMENTWISE`."""
    aval: Any = equation.outvars[0].aval
    rank = len(aval.shape)
    values = [_of_rank(x, rank) for x in values]
    sizes = tuple(map(_common, zip(*(_sizes(x) for x in values), strict=True)))
    tensors = [x for x in values if isinstance(x, Tensor)]
    if not tensors:
        return _known(equation, values, sizes)
    axes = max(tensors, key=lambda x: (_thickness(x), x.axes == usual_axes(rank))).axes
    name = equation.primitive.name
    if name == "convert_element_type" and _is_same_type(equation):
        return values[0]
    names = [ordered(graph, x, axes) for x in values]
    return Tensor(ELEMENTWISE[name](graph, equation, *names), axes, sizes)


# Computed by numpy, since jax would compile each for each shape.
_ON_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "rem": lambda g, e, a, b: g.add("Mod", a, b, fmod=1),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}


def _known(equation: JaxprEqn, values: Sequence[Value], sizes: tuple[Any, ...]) -> np.ndarray:
    """Returns the result of an equation on constants."""
    aval: Any = equation.outvars[0].aval
    name, dtype = equation.primitive.name, narrowed(aval.dtype)
    if name in _ON_NUMPY and dtype.kind == "f":
        with np.errstate(all="ignore"):
            return np.asarray(_ON_NUMPY[name](*values)).astype(dtype)
    return as_array(bind(equation, [np.broadcast_to(x, sizes) for x in values])[0])


def _of_rank(x: Value, rank: int) -> Value:
    """Returns a scalar with `rank` dimensions of size 1, as which it takes part in broadcasts."""
    if isinstance(x, Tensor):
        return x if x.rank == rank else Tensor(x.name, in_order(rank), (1,) * rank)
    return x if x.ndim == rank else x.reshape((1,) * rank)


def _sizes(x: Value) -> tuple[Any, ...]:
    return x.sizes if isinstance(x, Tensor) else x.shape


def _common(sizes: Sequence[Any]) -> Any:
    return next((s for s in sizes if not isinstance(s, int) or s != 1), 1)


def _thickness(x: Tensor) -> int:
    return sum(not isinstance(s, int) or s != 1 for s in x.sizes)


def _is_same_type(equation: JaxprEqn) -> bool:
    before = avals(equation)[0]
    return narrowed(before.dtype) == narrowed(equation.params["new_dtype"])


def _one(op: str) -> _Emit:
    return lambda graph, equation, *inputs: graph.add(op, *inputs)


def _scalar(graph: Graph, equation: JaxprEqn, value: float) -> str:
    aval: Any = equation.outvars[0].aval
    return graph.constant(np.array(value, aval.dtype))


def cast(graph: Graph, x: str, dtype: Any) -> str:
    """Returns the name of a value in another type."""
    from onnx import helper

    return graph.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(narrowed(dtype)))


def _power(graph: Graph, equation: JaxprEqn, x: str) -> str:
    exponent = equation.params["y"]
    if exponent == 2:
        return graph.add("Mul", x, x)
    return graph.add("Pow", x, _scalar(graph, equation, exponent))


def _select(graph: Graph, equation: JaxprEqn, which: str, *cases: str) -> str:
    aval = avals(equation)[0]
    if len(cases) != 2 or aval.dtype != np.bool_:
        raise NotImplementedError(f"a choice among {len(cases)}")
    return graph.add("Where", which, cases[1], cases[0])


def _finite(graph: Graph, equation: JaxprEqn, x: str) -> str:
    return graph.add("Not", graph.add("Or", graph.add("IsNaN", x), graph.add("IsInf", x)))


def _clamp(graph: Graph, equation: JaxprEqn, low: str, x: str, high: str) -> str:
    return graph.add("Min", graph.add("Max", x, low), high)


ELEMENTWISE: dict[str, _Emit] = {
    **{
        name: _one(op)
        for name, op in {
            "abs": "Abs",
            "add": "Add",
            "add_any": "Add",
            "and": "And",
            "ceil": "Ceil",
            "cos": "Cos",
            "div": "Div",
            "eq": "Equal",
            "erf": "Erf",
            "exp": "Exp",
            "floor": "Floor",
            "ge": "GreaterOrEqual",
            "gt": "Greater",
            "le": "LessOrEqual",
            "log": "Log",
            "logistic": "Sigmoid",
            "lt": "Less",
            "max": "Max",
            "min": "Min",
            "mul": "Mul",
            "neg": "Neg",
            "not": "Not",
            "or": "Or",
            "pow": "Pow",
            "sign": "Sign",
            "sin": "Sin",
            "sqrt": "Sqrt",
            "sub": "Sub",
            "tanh": "Tanh",
        }.items()
    },
    "clamp": _clamp,
    "convert_element_type": lambda g, e, x: cast(g, x, e.params["new_dtype"]),
    "erfc": lambda g, e, x: g.add("Sub", _scalar(g, e, 1), g.add("Erf", x)),
    "expm1": lambda g, e, x: g.add("Sub", g.add("Exp", x), _scalar(g, e, 1)),
    "integer_pow": _power,
    "is_finite": _finite,
    "log1p": lambda g, e, x: g.add("Log", g.add("Add", x, _scalar(g, e, 1))),
    "ne": lambda g, e, a, b: g.add("Not", g.add("Equal", a, b)),
    "rem": lambda g, e, a, b: g.add("Mod", a, b, fmod=1),
    "rsqrt": lambda g, e, x: g.add("Div", _scalar(g, e, 1), g.add("Sqrt", x)),
    "select_n": _select,
    "square": lambda g, e, x: g.add("Mul", x, x),
}
