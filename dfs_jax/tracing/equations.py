"""Evaluates a traced program's equations again, with other inputs or parameters."""

from __future__ import annotations

from typing import Any

from jax.extend.core import JaxprEqn


def bind(equation: JaxprEqn, inputs: list[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """Returns the equation's results for these inputs.

    Args:
      equation: an equation of a jaxpr.
      inputs: one value for each of its variables.
      params: the primitive's parameters; None for the equation's own.

    Example:
      >>> import jax
      >>> (equation,) = jax.make_jaxpr(lambda x: x * x)(3.0).eqns
      >>> bind(equation, [5.0, 5.0])[0].item()
      25.0
    """
    primitive = equation.primitive
    bound = primitive.get_bind_params(equation.params if params is None else params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # before jax 0.10 or now
    with equation.ctx.manager:
        found = primitive.bind(*functions, *inputs, **params)
    return list(found) if primitive.multiple_results else [found]
