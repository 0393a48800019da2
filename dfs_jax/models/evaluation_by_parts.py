"""Evaluates a function equation by equation, without compiling it as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

# On a CPU: above level 1, a random draw takes 3 times as long to compile; at 0, 5 times to run.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}


def evaluate_by_parts(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, equation by equation; equal inner programs compile once.

    This suits initialisation, which draws hundreds of arrays of few shapes and traces a forward
    pass that none of them depends on: equations that no output depends on are skipped. Within
    another trace (`jax.eval_shape`) the function is traced as usual.

    Args:
      function: function from pytrees of arrays to a pytree of arrays.
      arguments: arguments of the function.

    Example:
      >>> evaluate_by_parts(lambda x: {"twice": 2 * x}, jax.numpy.arange(3))
      {'twice': Array([0, 2, 4], dtype=int32)}
    """
    leaves = jax.tree.leaves(arguments)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return function(*arguments)
    program, outputs = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr = program.jaxpr
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values: dict[Any, Any] = dict(zip(variables, (*program.consts, *leaves), strict=True))
    compiled: dict[Any, Callable] = {}
    for equation in _needed_equations(jaxpr):
        inputs = [values[v] for v in equation.invars if _is_variable(v)]
        results = _as_function(equation, jaxpr, compiled)(*inputs)
        values.update(zip(equation.outvars, results, strict=True))
    results = [values[v] if _is_variable(v) else v.val for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(outputs), results)


def _needed_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that the outputs depend on, in order."""
    needed, kept = set(filter(_is_variable, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(filter(_is_variable, equation.invars))
    return kept[::-1]


def _as_function(equation: JaxprEqn, jaxpr: Jaxpr, compiled: dict[Any, Callable]) -> Callable:
    """Returns a function of the equation's non-literal inputs, compiled if it is a jit call."""
    alone = jaxpr.replace(
        constvars=[],
        invars=list(filter(_is_variable, equation.invars)),
        outvars=equation.outvars,
        eqns=[equation],
    )
    run = jaxpr_as_fun(ClosedJaxpr(alone, ()))
    if equation.primitive.name != "jit":
        return run
    # Calls of one function with equal shapes share their inner jaxpr.
    literals = [str(v.val) if isinstance(v, Literal) else None for v in equation.invars]
    key = (id(equation.params["jaxpr"]), *literals)
    if key not in compiled:
        on_cpu = jax.default_backend() == "cpu"
        compiled[key] = jax.jit(run, compiler_options=COMPILER_OPTIONS if on_cpu else None)
    return compiled[key]


def _is_variable(atom: Any) -> TypeGuard[Var]:
    return not isinstance(atom, Literal)
