"""Convolutions within loops, written as XLA's CPU compiler needs them to take its fast kernel.

The compiler brings convolutions into the order of axes that its fast kernel reads, but leaves out
those within the body of a loop: these, the gradients of a training step above all, run as plain
nested loops, some forty times slower. Here they are brought into that order before it sees them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params, primitives

from dfs_jax.tracing.equations import bind, evaluate

_LOOPS = ("scan", "while")
_CONVOLUTION = primitives.conv_general_dilated_p


def quick_convolutions_in_loops(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with the convolutions in its loops reordered; its values are the same.

    Args:
      function: of arrays; called under `jit` and not differentiated any more.

    Example:
      >>> import jax.numpy as jnp
      >>> square = quick_convolutions_in_loops(lambda x: {"y": x * x})
      >>> square(jnp.float32(3))["y"].item()
      9.0
    """

    @functools.wraps(function)
    def reordered(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if _loops_over_convolutions(closed.jaxpr):
            closed = _rewritten(closed, False)
        results = jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return reordered


def _rewritten(value: Any, is_in_loop: bool) -> Any:
    """Returns an equation's parameter with the convolutions in its programs reordered."""
    if not _mentions(value):
        return value
    if isinstance(value, tuple):  # the branches of a condition
        return tuple(_rewritten(part, is_in_loop) for part in value)
    if isinstance(value, Jaxpr):
        return _retraced(value, (), is_in_loop).jaxpr
    return _retraced(value.jaxpr, value.consts, is_in_loop)


def _retraced(jaxpr: Jaxpr, consts: Sequence[Any], is_in_loop: bool) -> ClosedJaxpr:
    shapes = [variable.aval for variable in jaxpr.invars]

    def again(*args: Any) -> list[Any]:
        return evaluate(jaxpr, consts, args, lambda e, inputs: _apply(e, inputs, is_in_loop))

    return jax.make_jaxpr(again)(*shapes)


def _apply(equation: Any, inputs: list[Any], is_in_loop: bool) -> list[Any]:
    primitive = equation.primitive
    if primitive is _CONVOLUTION and is_in_loop:
        return [_in_order(*inputs, **equation.params)]
    within = is_in_loop or primitive.name in _LOOPS
    params = {name: _rewritten(value, within) for name, value in equation.params.items()}
    return bind(equation, inputs, params)


def _in_order(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, **params: Any) -> Any:
    """The same convolution with axes in the order of batch, space, features."""
    (batch, feature, *space), (out, into, *window), (to_batch, to_feature, *to_space) = (
        dimension_numbers.lhs_spec,
        dimension_numbers.rhs_spec,
        dimension_numbers.out_spec,
    )
    last = len(space) + 1
    middle = tuple(range(1, last))
    ordered = lax.ConvDimensionNumbers(
        (0, last, *middle), (last, last - 1, *range(last - 1)), (0, last, *middle)
    )
    found = _CONVOLUTION.bind(
        lax.transpose(lhs, (batch, *space, feature)),
        lax.transpose(rhs, (*window, into, out)),
        dimension_numbers=ordered,
        **params,
    )
    places = (to_batch, *to_space, to_feature)
    return lax.transpose(found, tuple(places.index(axis) for axis in range(last + 1)))


def _convolves(jaxpr: Jaxpr) -> bool:
    return any(
        equation.primitive is _CONVOLUTION or any(map(_mentions, equation.params.values()))
        for equation in jaxpr.eqns
    )


def _loops_over_convolutions(jaxpr: Jaxpr) -> bool:
    return any(
        any(map(_mentions, equation.params.values()))
        if equation.primitive.name in _LOOPS
        else any(_loops_over_convolutions(part) for part in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def _mentions(value: Any) -> bool:
    """Whether a convolution stands in an equation's parameter."""
    if isinstance(value, tuple):
        return any(map(_mentions, value))
    if isinstance(value, ClosedJaxpr):
        return _convolves(value.jaxpr)
    return isinstance(value, Jaxpr) and _convolves(value)
