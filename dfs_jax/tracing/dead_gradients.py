"""A cheaper backward pass for any JAX function that stops the gradient of some channels.

`stop_gradient` on some channels of a feature saves nothing by itself: the layer that reads the
feature computes the gradient of every channel, and that of the stopped channels is discarded.
`skip_dead_gradients` searches the traced function for the channels that can carry gradient, and
differentiates each convolution and matrix product for these channels only:

    y = conv(x, w)                                          over all channels
    dy = conv(x, dw) + conv(dx[live], w[live])              as a tangent
    dw, dx[live]                                            as cotangents, exact zeros elsewhere

Reference: Gong et al., "Deep Feature Surgery", ECCV 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from dfs_jax.tracing.channels import (
    DEAD,
    LiveChannels,
    intervals,
    is_differentiable,
    live_of,
    propagate,
)
from dfs_jax.tracing.equations import CALLS, CHECKPOINTS, bind, evaluate, opened, trace

P = ParamSpec("P")
R = TypeVar("R")

# Calls whose program is searched too.
_CALLS = {**CALLS, **CHECKPOINTS}


def skip_dead_gradients(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns `fn` with a cheaper derivative: channels behind `stop_gradient` cost none.

    Wrap the loss, then differentiate it. Values and gradients equal those of `fn`, gradients within
    rounding. A convolution or matrix product of m multiply-adds takes 3m forward and backward; with
    only a fraction beta of its input channels live it takes (2 + beta) m. A network of L equal
    layers, the first of which reads images and each of the others a feature forked at ratio beta,
    thus takes

        3 L - 1 - (1 - beta) (L - 1)        instead of        3 L - 1

    Channels may lie on any axis. They are followed through elementwise operations, slices,
    concatenations, transpositions, pools, normalisation over the batch, `jit`, `vmap`, `remat` and
    `custom_jvp`; anything else (loops, operations across channels, custom VJPs) is left as it is
    and saves nothing.
    Forward mode, higher derivatives and `vmap` work where they do for `fn`.

    Args:
      fn: function of pytrees of arrays. It is traced at each call. Arguments that are not of type
        `jax.Array` are passed on unchanged.

    Returns:
      A function of the same arguments and results.

    Example: the layer reads 3 channels, 1 of which is live: its input gradient is 1/3 as large.
      >>> import jax.numpy as jnp
      >>> def loss(w, v, x):
      ...     y = x @ v
      ...     y = jnp.concatenate([y[:, :1], jax.lax.stop_gradient(y[:, 1:])], axis=1)
      ...     return jnp.sum((y @ w) ** 2)
      >>> x, v, w = jnp.ones((2, 5)), jnp.ones((5, 3)), jnp.ones((3, 7))
      >>> backward = jax.grad(skip_dead_gradients(loss), argnums=(0, 1))
      >>> bool(jnp.array_equal(backward(w, v, x)[1], jax.grad(loss, 1)(w, v, x)))
      True
      >>> "f32[2,1] = dot_general" in str(jax.make_jaxpr(backward)(w, v, x))
      True
    """

    @functools.wraps(fn)
    def cheaper(*args: P.args, **kwargs: P.kwargs) -> R:
        closed, arrays, structure = trace(fn, *args, **kwargs)
        search = _Search()
        found = search(closed.jaxpr, closed.consts, [None] * len(arrays))
        results = _run(search, closed.jaxpr, closed.consts, arrays, found)
        return jax.tree.unflatten(structure, results)

    return cheaper


# The rule of a linear function may apply the function itself, and so on without end.
_DEEPEST = 3


class _Found(NamedTuple):
    """Result of a search.

    Attributes:
      live: live channels of each variable.
      saves: whether some contraction reads dead channels, so that its derivative can be cheaper.
    """

    live: dict[Any, LiveChannels]
    saves: bool

    def inputs(self, equation: JaxprEqn) -> tuple[LiveChannels, ...]:
        return tuple(live_of(variable, self.live) for variable in equation.invars)


class _Search:
    """Search for the live channels of a program and of the programs that it calls.

    Equal programs with equal live inputs are searched once.
    """

    def __init__(self):
        self._known: dict[Any, _Found] = {}
        self._kept: list[Jaxpr] = []  # keeps the jaxprs alive, whose ids are keys
        self._within = 0  # rules of custom derivatives that are being searched

    def __call__(self, jaxpr: Jaxpr, consts: Sequence[Any], live: Sequence[LiveChannels]) -> _Found:
        key = id(jaxpr), tuple(live)
        if key not in self._known:
            self._known[key] = self._follow(jaxpr, consts, live)
            self._kept.append(jaxpr)
        return self._known[key]

    def _follow(self, jaxpr: Jaxpr, consts: Sequence[Any], live: Sequence[LiveChannels]) -> _Found:
        found = _Found({}, False)
        # A constant that is being traced belongs to an outer function, which may differentiate it.
        closed_over = [None if isinstance(const, Tracer) else DEAD for const in consts]
        variables = (*jaxpr.constvars, *jaxpr.invars)
        for variable, one in zip(variables, (*closed_over, *live), strict=True):
            found.live[variable] = one if is_differentiable(variable.aval) else DEAD
        saves = False
        for equation in jaxpr.eqns:
            inputs = found.inputs(equation)
            inner = self.inside(equation, inputs)
            if inner is not None:
                results = [live_of(v, inner[1].live) for v in inner[0].outvars]
                saves |= inner[1].saves
            elif equation.primitive.name == "custom_jvp_call":
                results = self._by_its_rule(equation, inputs)
            else:
                results = propagate(equation, inputs)
                saves |= _contracted(equation, inputs) is not None
            found.live.update(zip(equation.outvars, results, strict=True))
        return found._replace(saves=saves)

    def inside(
        self, equation: JaxprEqn, live: Sequence[LiveChannels]
    ) -> tuple[Jaxpr, _Found] | None:
        """Returns the program that an equation calls and what is found in it; None otherwise."""
        name = _CALLS.get(equation.primitive.name)
        if name not in equation.params or equation.effects:
            return None
        jaxpr, consts = opened(equation.params[name])
        return jaxpr, self(jaxpr, consts, live)

    def _by_its_rule(
        self, equation: JaxprEqn, live: Sequence[LiveChannels]
    ) -> Sequence[LiveChannels]:
        """A custom JVP need not be the function's derivative: its own rule is searched."""
        if all(one == DEAD for one in live) or equation.effects or self._within == _DEEPEST:
            return propagate(equation, live)
        avals = [variable.aval for variable in equation.invars]
        places = [i for i, one in enumerate(live) if one != DEAD]

        def tangents_of(primals: list[Any], tangents: list[Any]) -> list[Any]:
            def call(*some: Any) -> list[Any]:
                filled = list(primals)
                for i, value in zip(places, some, strict=True):
                    filled[i] = value
                return bind(equation, filled)

            return jax.jvp(call, [primals[i] for i in places], tangents)[1]

        traced = jax.make_jaxpr(tangents_of)(avals, [avals[i] for i in places])
        inputs = [*[DEAD] * len(avals), *(live[i] for i in places)]
        self._within += 1
        found = self(traced.jaxpr, traced.consts, inputs)
        self._within -= 1
        return [live_of(variable, found.live) for variable in traced.jaxpr.outvars]


def _run(
    search: _Search, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], found: _Found
) -> list[Any]:
    """Evaluates the program, with contractions differentiated for their live channels alone."""
    return evaluate(
        jaxpr, consts, args, lambda e, inputs: _apply(search, e, inputs, found.inputs(e))
    )


def _apply(
    search: _Search, equation: JaxprEqn, inputs: list[Any], live: Sequence[LiveChannels]
) -> list[Any]:
    axes = _contracted(equation, live)
    if axes is not None:
        return [_contract_live(equation, axes, live, *inputs)]
    inner = search.inside(equation, live)
    if inner is None or not inner[1].saves:
        return bind(equation, inputs)
    name = _CALLS[equation.primitive.name]
    program = equation.params[name]
    jaxpr, consts = opened(program)
    cheaper = jax.make_jaxpr(lambda *args: _run(search, jaxpr, consts, args, inner[1]))(
        *(variable.aval for variable in jaxpr.invars)
    )
    if isinstance(program, ClosedJaxpr):
        return bind(equation, inputs, {**equation.params, name: cheaper})
    if cheaper.consts:  # an open program has no place for them
        return bind(equation, inputs)
    return bind(equation, inputs, {**equation.params, name: cheaper.jaxpr})


def _contracted(equation: JaxprEqn, live: Sequence[LiveChannels]) -> tuple[int, int] | None:
    """Returns the axes of both operands that are summed over and partly dead; None otherwise."""
    params = equation.params
    if equation.primitive.name == "conv_general_dilated":
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return None
        pairs = [(params["dimension_numbers"].lhs_spec[1], params["dimension_numbers"].rhs_spec[1])]
    elif equation.primitive.name == "dot_general":
        pairs = list(zip(*params["dimension_numbers"][0], strict=True))
    else:
        return None
    for axes in pairs:
        avals: list[Any] = [variable.aval for variable in equation.invars]
        sizes = [aval.shape[axis] for aval, axis in zip(avals, axes, strict=True)]
        kept = map(intervals, live, axes, sizes)
        if any(some != ((0, size),) for some, size in zip(kept, sizes, strict=True)):
            return axes
    return None


def _contract_live(
    equation: JaxprEqn,
    axes: tuple[int, int],
    live: Sequence[LiveChannels],
    lhs: jax.Array,
    rhs: jax.Array,
) -> jax.Array:
    """Returns the equation's result, whose tangent sums over the live channels alone."""
    sets = [
        intervals(one, axis, operand.shape[axis])
        for operand, one, axis in zip((lhs, rhs), live, axes, strict=True)
    ]

    def over(some: Sequence[tuple[int, int]], *operands: jax.Array) -> jax.Array:
        return bind(equation, [_taken(x, some, a) for x, a in zip(operands, axes, strict=True)])[0]

    @jax.custom_jvp
    def contract(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return bind(equation, [lhs, rhs])[0]

    def tangent(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
        (lhs, rhs), (dlhs, drhs) = primals, tangents
        result = contract(lhs, rhs)
        terms = []
        if sets[0] and not isinstance(dlhs, SymbolicZero):
            terms.append(over(sets[0], dlhs, rhs))
        if sets[1] and not isinstance(drhs, SymbolicZero):
            terms.append(over(sets[1], lhs, drhs))
        if not terms:
            return result, SymbolicZero(jax.typeof(result).to_tangent_aval())
        return result, terms[0] if len(terms) == 1 else jax.numpy.add(*terms)

    contract.defjvp(tangent, symbolic_zeros=True)
    return contract(lhs, rhs)


def _taken(x: jax.Array, some: Sequence[tuple[int, int]], axis: int) -> jax.Array:
    """Returns the intervals of an axis, one after the other."""
    if tuple(some) == ((0, x.shape[axis]),):
        return x
    pieces = [lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in some]
    return lax.concatenate(pieces, axis) if pieces[1:] else pieces[0]
