"""Evaluation of traced programs, equation by equation, with a function that may change each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Names of calls in jax 0.7 and later, with the parameter that holds the program that is called.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
# Calls that the backward pass computes again.
CHECKPOINTS = {"checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}


class Traced(NamedTuple):
    """A function's program for some arguments.

    Attributes:
      closed: the program, a function of the arrays among the arguments.
      arrays: those arrays.
      structure: structure of the function's result.
    """

    closed: ClosedJaxpr
    arrays: list[jax.Array]
    structure: Any


def trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Traced:
    """Traces a function; arguments that are not of type `jax.Array` are passed on unchanged.

    Example:
      >>> traced = trace(lambda x, scale: {"y": scale * x}, jax.numpy.ones(3), scale=2.0)
      >>> len(traced.arrays), traced.closed.out_avals
      (1, [ShapedArray(float32[3])])
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(*arrays: jax.Array) -> Any:
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        inner_args, inner_kwargs = jax.tree.unflatten(structure, filled)
        return fn(*inner_args, **inner_kwargs)

    arrays = [leaves[i] for i in places]
    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    return Traced(closed, arrays, jax.tree.structure(shapes))


def opened(program: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a program and its constants, of which an open one has none."""
    return (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())


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
