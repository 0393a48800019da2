"""Evaluation of traced programs, equation by equation, with a function that may change each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    apply: Callable[[JaxprEqn, list[Any]], list[Any]],
) -> list[Any]:
    """Returns the outputs of a program whose equations are evaluated by `apply`.

    Args:
      jaxpr: traced program.
      consts: values of its constants.
      args: values of its inputs.
      apply: function from an equation and its inputs to its results, such as `bind`.

    Example:
      >>> traced = jax.make_jaxpr(lambda x: (x * x, 2.0))(3.0)
      >>> evaluate(traced.jaxpr, traced.consts, [5.0], bind)[0].item()
      25.0
    """
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        with jax.named_scope(str(equation.source_info.name_stack)):
            results = apply(equation, inputs)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def bind(equation: JaxprEqn, inputs: list[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """Returns the equation's results for these inputs.

    Args:
      equation: equation of a jaxpr.
      inputs: values of its input variables.
      params: parameters of the primitive; None for the equation's own.

    Example:
      >>> (equation,) = jax.make_jaxpr(lambda x: x * x)(3.0).eqns
      >>> bind(equation, [5.0, 5.0])[0].item()
      25.0
    """
    primitive = equation.primitive
    bound: Any = primitive.get_bind_params(equation.params if params is None else params)
    functions, options = bound if isinstance(bound, tuple) else ((), bound)  # before jax 0.10, now
    with equation.ctx.manager:
        found = primitive.bind(*functions, *inputs, **options)
    return list(found) if primitive.multiple_results else [found]
