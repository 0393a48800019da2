"""Programs for one CPU: this package's kernels in place of XLA's where they are faster.

A convolution's three passes are themselves convolutions in a traced program, told apart by the
order of their axes:

    forward          (x, w)           x in NHWC, w in HWIO
    weight gradient  (x, dy)          x and dy in CHWN, the window's dilation is the stride
    input gradient   (dy, reversed w) w in HWOI, the dilation of dy is the stride

What XLA still computes in the body of a loop is brought into the order of axes that its fast kernel
reads: the compiler does so outside of loops only, and runs others some forty times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params, primitives

from dfs_jax.tracing.cpu.recognition import kernel_for
from dfs_jax.tracing.equations import bind, evaluate, opened

_LOOPS = ("scan", "while")
_CUSTOM_DERIVATIVES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_CONVOLUTION = primitives.conv_general_dilated_p
_REWRITTEN = ("conv_general_dilated", "reduce_window_max", "select_and_scatter_add")


def for_cpu(function: Callable[..., Any], *, kernels: bool = True) -> Callable[..., Any]:
    """Returns the function, written for one CPU; its values are equal within rounding.

    Args:
      function: function of pytrees of arrays, called under `jit` for a CPU and not differentiated
        any more.
      kernels: whether to use this package's kernels; they process a batch in chunks, for which
        several devices would gather it.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((2, 24, 24, 3)), jnp.ones((3, 3, 3, 5))
      >>> def loss(w):
      ...     return lax.conv_general_dilated(
      ...         x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()
      >>> plain, ours = (jax.make_jaxpr(f(jax.grad(loss)))(w) for f in (lambda f: f, for_cpu))
      >>> [str(program).count("conv_general_dilated[") for program in (plain, ours)]
      [2, 1]
    """

    @functools.wraps(function)
    def rewritten(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        walk = _Walk(kernels)
        results = walk.run(closed.jaxpr, closed.consts, jax.tree.leaves(args), is_in_loop=False)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


class _Walk:
    """One walk over a program and the programs that it calls; equal ones are rewritten once."""

    def __init__(self, kernels: bool):
        self._kernels = kernels
        self._known: dict[tuple[int, bool], ClosedJaxpr] = {}
        self._kept: list[Any] = []  # keeps the programs alive, whose ids are keys

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], *, is_in_loop: bool
    ) -> list[Any]:
        """Evaluates the rewritten program."""
        return evaluate(jaxpr, consts, args, lambda e, inputs: self._apply(e, inputs, is_in_loop))

    def _apply(self, equation: JaxprEqn, inputs: list[Any], is_in_loop: bool) -> list[Any]:
        name = equation.primitive.name
        kernel = kernel_for(equation) if self._kernels and name in _REWRITTEN else None
        if kernel is not None:
            return [kernel(*inputs)]
        if equation.primitive is _CONVOLUTION and is_in_loop:
            return [_in_order(*inputs, **equation.params)]
        if not any(map(_mentions, equation.params.values())):
            return bind(equation, inputs)
        if name in _CUSTOM_DERIVATIVES:
            program = opened(equation.params[_CUSTOM_DERIVATIVES[name]])
            return self.run(*program, inputs, is_in_loop=is_in_loop)
        within = is_in_loop or name in _LOOPS
        params = {key: self._rewritten(value, within) for key, value in equation.params.items()}
        return bind(equation, inputs, params)

    def _rewritten(self, value: Any, is_in_loop: bool) -> Any:
        """Returns an equation's parameter, its programs rewritten."""
        if not _mentions(value):
            return value
        if isinstance(value, tuple):  # the branches of a condition
            return tuple(self._rewritten(part, is_in_loop) for part in value)
        key = id(value), is_in_loop
        if key not in self._known:
            self._known[key] = self._retraced(value, is_in_loop)
            self._kept.append(value)
        closed = self._known[key]
        if isinstance(value, ClosedJaxpr):
            return closed
        return value if closed.consts else closed.jaxpr  # an open program has no place for them

    def _retraced(self, program: Jaxpr | ClosedJaxpr, is_in_loop: bool) -> ClosedJaxpr:
        jaxpr, consts = opened(program)
        shapes = [variable.aval for variable in jaxpr.invars]
        return jax.make_jaxpr(lambda *args: self.run(jaxpr, consts, args, is_in_loop=is_in_loop))(
            *shapes
        )


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


def _mentions(value: Any) -> bool:
    """Returns whether an equation's parameter holds a program with something to rewrite."""
    if isinstance(value, tuple):
        return any(map(_mentions, value))
    if isinstance(value, ClosedJaxpr):
        return _has_any(value.jaxpr)
    return isinstance(value, Jaxpr) and _has_any(value)


def _has_any(jaxpr: Jaxpr) -> bool:
    return any(
        equation.primitive.name in _REWRITTEN
        or any(map(_has_any, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )
