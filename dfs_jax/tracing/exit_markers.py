"""Marks of exits inside any JAX function.

    def network(params, images):
        ...
        exit_logits(0, x.mean((1, 2)) @ params["head1"])
        ...

A mark is an operation of the traced program that returns its input: the function's values, types
and derivatives stay as they are, and nothing of it is left in a compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, jaxprs_in_params
from jax.interpreters import ad, batching, mlir

from dfs_jax.tracing.equations import CALLS, CHECKPOINTS, bind, evaluate, opened, trace
from dfs_jax.types import UserError

_MARK = Primitive("exit_logits")


def exit_logits(exit_index: int, logits: jax.Array) -> jax.Array:
    """Returns `logits` unchanged, marked as those of exit `exit_index` (0-based, shallow first).

    Works in any JAX function, under jit, grad, vmap and remat. `with_exit_logits` returns marked
    logits, and `stages_of` cuts a function at them.

    Args:
      exit_index: index of the exit, a Python integer.
      logits: logits, `[batch, classes]`, or `[classes]` in a function of one example that `vmap`
        maps over the batch.

    Raises:
      UserError: an index that is not a whole number of at least 0.

    Example:
      >>> exit_logits(0, jnp.ones((2, 3))).shape
      (2, 3)
    """
    if isinstance(exit_index, bool) or not isinstance(exit_index, int) or exit_index < 0:
        raise UserError(f"exit_index must be a whole number of at least 0, got {exit_index!r}")
    return _MARK.bind(jnp.asarray(logits), exit_index=exit_index)


def _batched(args: Any, axes: Any, *, exit_index: int) -> tuple[jax.Array, int]:
    """Marks the logits of a batch, which is their first axis wherever `vmap` has put it."""
    return _MARK.bind(jnp.moveaxis(args[0], axes[0], 0), exit_index=exit_index), 0


def _differentiated(primals: Any, tangents: Any, *, exit_index: int) -> tuple[Any, Any]:
    """Marks the logits; tangents are none."""
    return _MARK.bind(*primals, exit_index=exit_index), tangents[0]


_MARK.def_impl(lambda logits, *, exit_index: logits)
_MARK.def_abstract_eval(lambda logits, *, exit_index: logits)
batching.primitive_batchers[_MARK] = _batched
ad.primitive_jvps[_MARK] = _differentiated
mlir.register_lowering(_MARK, lambda context, logits, *, exit_index: [logits])


def marked_exit(equation: JaxprEqn) -> int | None:
    """Returns the index of the exit that an equation marks; None if it marks none."""
    return equation.params["exit_index"] if equation.primitive is _MARK else None


def has_marks(jaxpr: Jaxpr) -> bool:
    """Returns whether a program, or one that it calls, marks exits."""
    return any(
        marked_exit(equation) is not None or any(map(has_marks, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def check_marks(found: Sequence[int]) -> None:
    """Raises UserError unless the exits 0, 1, ... are each marked once."""
    if sorted(found) != list(range(len(found))) or not found:
        marked = ", ".join(map(str, found)) or "none"
        raise UserError(
            f"exit_logits must mark the exits 0, 1, ... once each, got {marked}: number them from "
            f"shallow to deep"
        )


def refuse(equation: JaxprEqn) -> UserError:
    """Returns the error for marks inside a call that cannot be opened."""
    return UserError(
        f"exit_logits stands inside {equation.primitive.name!r}, which runs its body an unknown "
        f"number of times or has its own derivative: call it outside, on what the body returns"
    )


def with_exit_logits(fn: Callable[..., Any]) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns a function that also returns the logits that `fn` marks, `[exits, batch, classes]`.

    The function can be differentiated, compiled and mapped as `fn` can.

    Args:
      fn: function of pytrees of arrays that calls `exit_logits`. Arguments that are not arrays are
        passed on unchanged.

    Raises:
      UserError: (when called) exits that are not numbered 0, 1, ..., or marks inside a loop, a
        condition or a custom derivative.

    Example:
      >>> def network(w, x):
      ...     x = jnp.tanh(exit_logits(0, x @ w))
      ...     return exit_logits(1, x @ w)
      >>> result, logits = with_exit_logits(network)(jnp.ones((3, 3)), jnp.ones((2, 3)))
      >>> result.shape, logits.shape
      ((2, 3), (2, 2, 3))
    """

    @functools.wraps(fn)
    def marked(*args: Any, **kwargs: Any) -> tuple[Any, jax.Array]:
        closed, arrays, structure = trace(fn, *args, **kwargs)
        marks: list[_Mark] = []
        results = _evaluate(closed.jaxpr, closed.consts, arrays, marks)
        check_marks([mark.exit_index for mark in marks])
        logits = [mark.logits for mark in sorted(marks, key=lambda mark: mark.exit_index)]
        return jax.tree.unflatten(structure, results), jnp.stack(logits)

    return marked


class _Mark(NamedTuple):
    exit_index: int
    logits: Any


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], marks: list[_Mark]
) -> list[Any]:
    """Returns a program's results, and appends what it marks to `marks`."""
    return evaluate(jaxpr, consts, args, functools.partial(_apply, marks))


def _apply(marks: list[_Mark], equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    exit_index = marked_exit(equation)
    if exit_index is not None:
        results = bind(equation, inputs)
        marks.append(_Mark(exit_index, results[0]))
        return results
    if not any(map(has_marks, jaxprs_in_params(equation.params))):
        return bind(equation, inputs)
    name = equation.primitive.name
    if name in CALLS:
        return _evaluate(*opened(equation.params[CALLS[name]]), inputs, marks)
    if name not in CHECKPOINTS:
        raise refuse(equation)
    return _recomputed(equation, inputs, marks)


def _recomputed(equation: JaxprEqn, inputs: list[Any], marks: list[_Mark]) -> list[Any]:
    """Evaluates a `jax.checkpoint`, whose program then returns what it marks too."""
    program, exits = equation.params[CHECKPOINTS[equation.primitive.name]], []

    def run(*args: Any) -> list[Any]:
        inner: list[_Mark] = []
        results = _evaluate(*opened(program), args, inner)
        exits[:] = [mark.exit_index for mark in inner]
        return [*results, *(mark.logits for mark in inner)]

    options = {key: equation.params[key] for key in ("prevent_cse", "policy")}
    found = jax.checkpoint(run, **options)(*inputs)
    count = len(equation.outvars)
    marks.extend(map(_Mark, exits, found[count:]))
    return list(found[:count])
