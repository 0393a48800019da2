"""Computes once, instead of in every call, the values that depend on the weights alone.

A kernel for a CPU may transform a convolution's weights before it multiplies with them (Winograd's
tiles). In a large batch that costs little; for a single image it can cost more than the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from dfs_jax.tracing.equations import bind
from dfs_jax.tracing.flattened import Equation, flattened, inputs_of
from dfs_jax.types import PyTree

_NEITHER, _WEIGHTS, _INPUTS = range(3)  # what a value depends on


def hoisted(
    function: Callable[..., Any], weights: PyTree, *shapes: Any
) -> tuple[tuple[jax.Array, ...], Callable[..., Any]]:
    """Splits a function into what depends on its weights alone and the rest.

    Args:
      function: function of weights and further arguments, all pytrees of arrays.
      weights: the weights.
      shapes: shapes and types of the further arguments.

    Returns:
      Values computed from the weights, and a function `run` of these and of the further arguments:
      `run(values, *arguments)` is `function(weights, *arguments)`.

    Example:
      >>> import jax.numpy as jnp
      >>> values, run = hoisted(lambda w, x: jnp.exp(w).T @ x, jnp.zeros((2, 3)), jnp.ones(2))
      >>> [v.shape for v in values], run(values, jnp.ones(2)).tolist()
      ([(3, 2)], [2.0, 2.0, 2.0])
    """
    closed, out_shapes = jax.make_jaxpr(function, return_shape=True)(weights, *shapes)
    jaxpr, renamed = closed.jaxpr, dict[Any, Any]()
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    equations = flattened(jaxpr, constants, renamed=renamed)
    leaves = jax.tree.leaves(weights)
    of_weights, of_inputs = jaxpr.invars[: len(leaves)], jaxpr.invars[len(leaves) :]
    outputs = [v if isinstance(v, Literal) else renamed.get(v, v) for v in jaxpr.outvars]
    kinds = _kinds(equations, of_weights, of_inputs)
    in_calls = [e for e in equations if _kind(e, kinds) != _WEIGHTS]
    read = {*inputs_of(in_calls), *(v for v in outputs if not isinstance(v, Literal))}
    # In the order of the program, so that equal functions have equal values.
    handed = [v for v in (*of_weights, *_made(equations)) if v in read and kinds[v] == _WEIGHTS]

    def prepare(leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        known = {**constants, **dict(zip(of_weights, leaves, strict=True))}
        _run([e for e in equations if _kind(e, kinds) != _INPUTS], known)
        return tuple(known[v] for v in handed)

    def run(values: Sequence[jax.Array], *arguments: Any) -> Any:
        known = {**constants, **dict(zip(handed, values, strict=True))}
        known.update(zip(of_inputs, jax.tree.leaves(arguments), strict=True))
        _run(in_calls, known)
        results = [v.val if isinstance(v, Literal) else known[v] for v in outputs]
        return jax.tree.unflatten(jax.tree.structure(out_shapes), results)

    return jax.jit(prepare)(leaves), run


def _kinds(
    equations: Sequence[Equation], of_weights: Sequence[Any], of_inputs: Sequence[Any]
) -> dict[Any, int]:
    kinds = {**dict.fromkeys(of_weights, _WEIGHTS), **dict.fromkeys(of_inputs, _INPUTS)}
    for equation in equations:
        kinds.update(dict.fromkeys(equation.outputs, _kind(equation, kinds)))
    return kinds


def _kind(equation: Equation, kinds: dict[Any, int]) -> int:
    return max((kinds.get(v, _NEITHER) for v in inputs_of([equation])), default=_NEITHER)


def _made(equations: Sequence[Equation]) -> list[Any]:
    return [v for equation in equations for v in equation.outputs]


def _run(equations: Sequence[Equation], known: dict[Any, Any]) -> None:
    """Evaluates equations and adds their results to what is known."""
    for equation, inputs, outputs in equations:
        values = [v.val if isinstance(v, Literal) else known[v] for v in inputs]
        with jax.named_scope(str(equation.source_info.name_stack)):
            known.update(zip(outputs, bind(equation, values), strict=True))
