"""The equations of a traced program and of those that it calls, in one list."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from dfs_jax.tracing.equations import CALLS, CHECKPOINTS, opened

_OPENED = {**CALLS, **CHECKPOINTS}
_Check: TypeAlias = Callable[[JaxprEqn], None]


class Equation(NamedTuple):
    """An equation outside of any call, its inputs named as in the whole program."""

    equation: JaxprEqn
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class _Constant(NamedTuple):
    """A constant of a program that is called, in place of a variable."""

    index: int


def flattened(
    jaxpr: Jaxpr,
    constants: dict[Any, Any],
    *,
    renamed: dict[Any, Any] | None = None,
    check: _Check = lambda equation: None,
) -> list[Equation]:
    """Returns the equations of a program and of those that it calls, in one list.

    Args:
      jaxpr: traced program.
      constants: constants by name; those of programs that are called are added.
      renamed: receives the name of each variable of `jaxpr` that is not a name itself.
      check: function called with each equation that is no call.

    Example:
      >>> import jax
      >>> traced = jax.make_jaxpr(lambda x: jax.jit(lambda y: 2 * y + 1)(x) * x)(3.0)
      >>> [e.equation.primitive.name for e in flattened(traced.jaxpr, {})]
      ['mul', 'add', 'mul']
    """
    return _flat(jaxpr, {} if renamed is None else renamed, constants, check)


def inputs_of(equations: Iterable[Equation]) -> set[Any]:
    """Returns the variables that equations read."""
    return {v for equation in equations for v in equation.inputs if not isinstance(v, Literal)}


def _flat(
    jaxpr: Jaxpr, renamed: dict[Any, Any], constants: dict[Any, Any], check: _Check
) -> list[Equation]:
    def name(variable: Any) -> Any:
        return variable if isinstance(variable, Literal) else renamed.get(variable, variable)

    found: list[Equation] = []
    for equation in jaxpr.eqns:
        inputs = tuple(map(name, equation.invars))
        parameter = _OPENED.get(equation.primitive.name)
        if parameter is None:
            check(equation)
            outputs = tuple(_Output(equation, n) for n in range(len(equation.outvars)))
            found.append(Equation(equation, inputs, outputs))
            renamed.update(zip(equation.outvars, outputs, strict=True))
            continue
        program = equation.params[parameter]
        inner, consts = opened(program)
        inside = dict(zip(inner.invars, inputs, strict=True))
        for variable, const in zip(inner.constvars, consts, strict=True):
            inside[variable] = _Constant(len(constants))
            constants[inside[variable]] = const
        found += _flat(inner, inside, constants, check)
        results = [v if isinstance(v, Literal) else inside.get(v, v) for v in inner.outvars]
        renamed.update(zip(equation.outvars, results, strict=True))
    return found


class _Output:
    """One result of an equation in one call of its program: a name, equal to itself alone."""

    def __init__(self, equation: JaxprEqn, number: int):
        self.aval = equation.outvars[number].aval
        self.equation = equation
