"""Propagation of live channels through the equations of a traced program.

The live channels of a value are the indices along one of its axes that can carry gradient: `None`
for all, `()` for none. They are an upper bound: a primitive without a rule makes every channel of
its results live, unless no input carries gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

# Disjoint ascending [start, stop) intervals.
Intervals: TypeAlias = tuple[tuple[int, int], ...]


class Along(NamedTuple):
    """Live channels along an axis, some but not all of them."""

    axis: int
    kept: Intervals


LiveChannels: TypeAlias = Along | tuple[()] | None
DEAD: LiveChannels = ()


def is_differentiable(aval: Any) -> bool:
    """Returns whether a value of this type can have a gradient; integers and keys cannot."""
    return not hasattr(aval, "dtype") or jnp.issubdtype(aval.dtype, jnp.inexact)


def intervals(live: LiveChannels, axis: int, size: int) -> Intervals:
    """Returns the live indices of an axis of this size: those of the channels if they lie there.

    >>> intervals(Along(1, ((2, 3),)), 1, 5), intervals(Along(1, ((2, 3),)), 0, 5)
    (((2, 3),), ((0, 5),))
    """
    if isinstance(live, Along) and live.axis == axis:
        return live.kept
    return () if live == DEAD else ((0, size),)


def along(axis: int, kept: Iterable[tuple[int, int]], size: int) -> LiveChannels:
    """Returns the live channels that intervals along an axis of this size are; they may overlap.

    >>> along(3, [(0, 2), (5, 7), (1, 3)], size=11)
    Along(axis=3, kept=((0, 3), (5, 7)))
    >>> along(3, [(0, 2), (2, 5)], size=5) is None
    True
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(kept):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    if merged == [(0, size)]:
        return None
    return Along(axis, tuple(merged)) if merged else DEAD


def union(sets: Iterable[LiveChannels], shape: Sequence[int]) -> LiveChannels:
    """Returns the channels that are live in any of the sets, of values of one shape.

    >>> union([Along(0, ((0, 2),)), (), Along(0, ((1, 3),))], shape=(5, 7))
    Along(axis=0, kept=((0, 3),))
    >>> union([Along(0, ((0, 2),)), Along(1, ((1, 3),))], shape=(5, 7)) is None
    True
    """
    living = [live for live in sets if live != DEAD]
    axes = {live.axis if isinstance(live, Along) else None for live in living}
    if len(axes) != 1:
        return None if axes else DEAD
    (axis,) = axes
    if axis is None:
        return None
    kept = [pair for live in living for pair in intervals(live, axis, shape[axis])]
    return along(axis, kept, shape[axis])


def joined(sets: Sequence[LiveChannels], sizes: Sequence[int], axis: int) -> LiveChannels:
    """Returns the live channels of a concatenation along an axis.

    >>> joined([Along(1, ((1, 3),)), (), None], sizes=[3, 2, 5], axis=1)
    Along(axis=1, kept=((1, 3), (5, 10)))
    """
    start, shifted = 0, []
    for live, size in zip(sets, sizes, strict=True):
        shifted += [(start + a, start + b) for a, b in intervals(live, axis, size)]
        start += size
    return along(axis, shifted, start)


def window(live: LiveChannels, axis: int, start: int, stop: int, size: int) -> LiveChannels:
    """Returns the live channels of the slice `[start, stop)` of an axis.

    >>> window(Along(1, ((0, 4), (7, 11))), 1, 2, 9, size=11)
    Along(axis=1, kept=((0, 2), (5, 7)))
    """
    if isinstance(live, Along) and live.axis != axis:
        return live
    cut = ((max(start, a) - start, min(stop, b) - start) for a, b in intervals(live, axis, size))
    return along(axis, [(a, b) for a, b in cut if a < b], stop - start)


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
    """Rule of elementwise primitives; sizes of 1 are broadcast, channels are not."""
    shape = _shape(equation.outvars[0])
    sets: list[LiveChannels] = []
    for variable, one in zip(equation.invars, live, strict=True):
        own = _shape(variable)
        fits = len(own) == len(shape) and (
            not isinstance(one, Along) or own[one.axis] == shape[one.axis]
        )
        sets.append(one if fits or one == DEAD else None)
    return [union(sets, shape)]


def _one_to_one(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    return list(live)


def _moved(axis_after: Callable[[int, Any, Any, dict[str, Any]], int | None]) -> Callable:
    """Returns the rule of a primitive that moves its first input's channels to another axis.

    Args:
      axis_after: function of the axis of the channels, the first input's shape, the result's shape
        and the parameters; None if channels mix. Other inputs must be dead.
    """

    def rule(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
        first, *others = live
        found: LiveChannels = None
        if isinstance(first, Along) and all(one == DEAD for one in others):
            before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
            axis = axis_after(first.axis, before, after, equation.params)
            if axis is not None and before[first.axis] == after[axis]:
                found = Along(axis, first.kept)
        return [found] * len(equation.outvars)

    return rule


def _after_reduction(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    reduced = params["axes"] if "axes" in params else params["dimensions"]
    return None if axis in reduced else axis - sum(gone < axis for gone in reduced)


def _after_cumulation(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    return None if axis == params["axis"] else axis


def _after_reversal(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    return None if axis in params["dimensions"] else axis


def _after_pool(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    sizes = params["window_dimensions"], params["window_strides"]
    dilations = params.get("base_dilation"), params.get("window_dilation")
    single = all(size is None or size[axis] == 1 for size in (*sizes, *dilations))
    return axis if single and tuple(params["padding"][axis]) == (0, 0) else None


def _after_broadcast(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    return params["broadcast_dimensions"][axis]


def _after_transposition(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    return params["permutation"].index(axis)


def _after_reshape(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    """The axis of the same size with as many elements before it, if there is one."""
    if params.get("dimensions") is not None:
        return None
    ahead = math.prod(before[:axis])
    places = [k for k in range(len(after)) if math.prod(after[:k]) == ahead]
    return next((k for k in places if after[k] == before[axis]), None)


def _unmoved(axis: int, before: Any, after: Any, params: dict[str, Any]) -> int | None:
    return axis


def _concatenate(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    axis = equation.params["dimension"]
    if all(one == DEAD or (isinstance(one, Along) and one.axis != axis) for one in live):
        return [union(live, _shape(equation.outvars[0]))]
    return [joined(live, [_shape(variable)[axis] for variable in equation.invars], axis)]


def _slice(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    params, shape = equation.params, _shape(equation.invars[0])
    if not isinstance(live[0], Along):
        return [live[0]]
    axis = live[0].axis
    if params["strides"] is not None and params["strides"][axis] != 1:
        return [None]
    start, stop = params["start_indices"][axis], params["limit_indices"][axis]
    return [window(live[0], axis, start, stop, shape[axis])]


def _split(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    axis, size = equation.params["axis"], _shape(equation.invars[0])[equation.params["axis"]]
    found, start = [], 0
    for part in equation.params["sizes"]:
        found.append(window(live[0], axis, start, start + part, size))
        start += part
    return found


def _pad(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    config, shape = equation.params["padding_config"], _shape(equation.invars[0])
    if isinstance(live[0], Along):
        axis = live[0].axis
    else:  # what is appended to a live value is dead
        axis = max((k for k, (low, high, _) in enumerate(config) if low or high), default=0)
    low, high, inner = config[axis] if config else (0, 0, 0)
    if live[1] != DEAD or low < 0 or high < 0 or inner or not config:
        return [None]
    return [joined([DEAD, live[0], DEAD], [low, shape[axis], high], axis)]


def _dynamic_update_slice(equation: JaxprEqn, live: Sequence[LiveChannels]) -> list[LiveChannels]:
    before, update = (_shape(variable) for variable in equation.invars[:2])
    found = union(live[:2], before)
    whole = isinstance(found, Along) and before[found.axis] == update[found.axis]
    return [found if whole or live[1] == DEAD else None]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


_ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p copysign cos cosh
    digamma div erf erf_inv erfc exit_logits exp exp2 expm1 floor imag integer_pow is_finite lgamma
    log log1p logistic max min mul name neg nextafter not or pow pvary real reduce_precision rem
    round rsqrt select_n sharding_constraint sign sin sinh sqrt square sub tan tanh
"""
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_POOLS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")

RULES: dict[str, Callable[[JaxprEqn, Sequence[LiveChannels]], list[LiveChannels]]] = {
    "stop_gradient": lambda equation, live: [DEAD] * len(equation.outvars),
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("device_put", "optimization_barrier"), _one_to_one),
    **dict.fromkeys((*_REDUCTIONS, "squeeze"), _moved(_after_reduction)),
    **dict.fromkeys(_CUMULATIVE, _moved(_after_cumulation)),
    **dict.fromkeys(_POOLS, _moved(_after_pool)),
    "broadcast_in_dim": _moved(_after_broadcast),
    "concatenate": _concatenate,
    "dynamic_slice": _moved(_unmoved),
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "reshape": _moved(_after_reshape),
    "rev": _moved(_after_reversal),
    "slice": _slice,
    "split": _split,
    "transpose": _moved(_after_transposition),
}


def live_of(variable: Any, known: dict[Any, LiveChannels]) -> LiveChannels:
    """Returns a variable's live channels; literals have none."""
    return DEAD if isinstance(variable, Literal) else known[variable]
