"""Propagation of live channels through the equations of a traced program.

The live channels of a value are the indices of its last axis that can carry gradient: `None` for
all, `()` for none. They are an upper bound: a primitive without a rule makes every channel of its
results live, unless no input carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

# Disjoint ascending [start, stop) intervals; None for every channel.
LiveChannels: TypeAlias = tuple[tuple[int, int], ...] | None
DEAD: LiveChannels = ()


def is_differentiable(aval: Any) -> bool:
    """Returns whether a value of this type can have a gradient; integers and keys cannot."""
    return not hasattr(aval, "dtype") or jnp.issubdtype(aval.dtype, jnp.inexact)


def num_channels(aval: Any) -> int:
    """Returns the length of the last axis, 1 for a scalar."""
    return aval.shape[-1] if aval.shape else 1


def intervals(live: LiveChannels, channels: int) -> tuple[tuple[int, int], ...]:
    """Returns the live channels as intervals, also if all channels are live."""
    return ((0, channels),) if live is None else live


def union(sets: Iterable[LiveChannels], channels: int) -> LiveChannels:
    """Returns the channels that are live in any of the sets.

    >>> union([((0, 2), (5, 7)), ((1, 3),)], channels=11)
    ((0, 3), (5, 7))
    >>> union([((0, 2),), ((2, 5),)], channels=5) is None
    True
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(i for live in sets for i in intervals(live, channels)):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    return None if merged == [(0, channels)] else tuple(merged)


def joined(sets: Sequence[LiveChannels], sizes: Sequence[int]) -> LiveChannels:
    """Returns the live channels of a concatenation along the channels.

    >>> joined([((1, 3),), (), None], sizes=[3, 2, 5])
    ((1, 3), (5, 10))
    """
    start, shifted = 0, []
    for live, size in zip(sets, sizes, strict=True):
        shifted.append(tuple((start + a, start + b) for a, b in intervals(live, size)))
        start += size
    return union(shifted, start)


def window(live: LiveChannels, start: int, stop: int, channels: int) -> LiveChannels:
    """Returns the live channels of the slice `[start, stop)`.

    >>> window(((0, 4), (7, 11)), 2, 9, channels=11)
    ((0, 2), (5, 7))
    """
    cut = ((max(start, a) - start, min(stop, b) - start) for a, b in intervals(live, channels))
    return union([tuple((a, b) for a, b in cut if a < b)], stop - start)


def propagate(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    """Returns each result's live channels.

    Args:
      equation: equation of a jaxpr.
      live: live channels of each of its inputs.
    """
    rule = RULES.get(equation.primitive.name)
    if equation.effects:
        found: list[LiveChannels] = [None] * len(equation.outvars)
    elif all(one == DEAD for one in live):
        found = [DEAD] * len(equation.outvars)
    elif rule is None:
        found = [None] * len(equation.outvars)
    else:
        found = rule(equation, live)
    return [
        one if is_differentiable(variable.aval) else DEAD
        for variable, one in zip(equation.outvars, found, strict=True)
    ]


def _elementwise(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    """Rule of elementwise primitives; a live input without channels makes all channels live."""
    aval: Any = equation.outvars[0].aval
    avals: list[Any] = [variable.aval for variable in equation.invars]
    sets = [
        one if operand.shape[-1:] == aval.shape[-1:] or one == DEAD else None
        for operand, one in zip(avals, live, strict=True)
    ]
    return [union(sets, num_channels(aval))]


def _one_to_one(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    return list(live)


def _where(condition: Callable[[Any, Any, dict[str, Any]], bool]) -> Callable:
    """Returns the rule of a primitive that keeps its first input's channels if `condition` holds.

    Args:
      condition: function of the first input's type, the result's type and the parameters. Other
        inputs must be dead.
    """

    def rule(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
        before: Any = equation.invars[0].aval
        after: Any = equation.outvars[0].aval
        same = before.shape and after.shape and before.shape[-1] == after.shape[-1]
        others_dead = all(one == DEAD for one in live[1:])
        kept = same and others_dead and condition(before, after, equation.params)
        return [live[0] if kept else None] * len(equation.outvars)

    return rule


def _last(aval: Any) -> int:
    return len(aval.shape) - 1


def _is_window_of_one(before: Any, after: Any, params: dict[str, Any]) -> bool:
    sizes = params["window_dimensions"], params["window_strides"]
    dilations = params.get("base_dilation"), params.get("window_dilation")
    single = all(size is None or size[-1] == 1 for size in (*sizes, *dilations))
    return single and tuple(params["padding"][-1]) == (0, 0)


def _concatenate(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    aval = equation.outvars[0].aval
    if equation.params["dimension"] != _last(aval):
        return [union(live, num_channels(aval))]
    return [joined(live, [num_channels(variable.aval) for variable in equation.invars])]


def _slice(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    params, channels = equation.params, num_channels(equation.invars[0].aval)
    if params["strides"] is not None and params["strides"][-1] != 1:
        return [None]
    start, stop = params["start_indices"][-1], params["limit_indices"][-1]
    return [window(live[0], start, stop, channels)]


def _split(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    aval = equation.invars[0].aval
    if equation.params["axis"] != _last(aval):
        return [live[0]] * len(equation.outvars)
    found, start = [], 0
    for size in equation.params["sizes"]:
        found.append(window(live[0], start, start + size, num_channels(aval)))
        start += size
    return found


def _pad(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    low, high, inner = equation.params["padding_config"][-1]
    if live[1] != DEAD or low < 0 or high < 0 or inner:
        return [None]
    size = num_channels(equation.invars[0].aval)
    return [joined([DEAD, live[0], DEAD], [low, size, high])]


def _dynamic_update_slice(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    before, update = (num_channels(variable.aval) for variable in equation.invars[:2])
    return [union(live[:2], before) if before == update else None]


_ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p copysign cos cosh
    digamma div erf erf_inv erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p
    logistic max min mul name neg nextafter not or pow pvary real reduce_precision rem round rsqrt
    select_n sharding_constraint sign sin sinh sqrt square sub tan tanh
"""
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_POOLS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")

RULES: dict[str, Callable[[JaxprEqn, Sequence[LiveChannels]], list[LiveChannels]]] = {
    "stop_gradient": lambda equation, live: [DEAD] * len(equation.outvars),
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("device_put", "optimization_barrier"), _one_to_one),
    **dict.fromkeys(
        _REDUCTIONS, _where(lambda before, after, params: _last(before) not in params["axes"])
    ),
    **dict.fromkeys(
        _CUMULATIVE, _where(lambda before, after, params: params["axis"] != _last(before))
    ),
    **dict.fromkeys(_POOLS, _where(_is_window_of_one)),
    "broadcast_in_dim": _where(
        lambda before, after, params: params["broadcast_dimensions"][-1] == _last(after)
    ),
    "concatenate": _concatenate,
    "dynamic_slice": _where(lambda before, after, params: True),
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "reshape": _where(lambda before, after, params: params.get("dimensions") is None),
    "rev": _where(lambda before, after, params: _last(before) not in params["dimensions"]),
    "slice": _slice,
    "split": _split,
    "squeeze": _where(lambda before, after, params: _last(before) not in params["dimensions"]),
    "transpose": _where(lambda before, after, params: params["permutation"][-1] == _last(before)),
}


def live_of(variable: Any, known: dict[Any, LiveChannels]) -> LiveChannels:
    """Returns a variable's live channels; literals have none."""
    return DEAD if isinstance(variable, Literal) else known[variable]
