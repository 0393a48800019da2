"""How an MSDNet is laid out: scales, channels, live channels of every layer, by arithmetic alone.

Scales count from 1, finest first; layers count from 1 through the whole network, the first layer,
which makes the scales, not among them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from dfs_jax.surgery import LiveChannels, limit_live
from dfs_jax.types import UserError, check_whole

STEP_MODES = ("even", "lin_grow")
PRUNINGS = ("max", "min")


class Bottleneck(NamedTuple):
    """A 1x1 convolution to `hidden` channels and a 3x3 convolution to `features`."""

    hidden: int
    features: int


class ScaleGrowth(NamedTuple):
    """What a layer appends at one scale, in this order: [input, `down`, `same`].

    Attributes:
      scale: which one.
      channels: how many it had.
      down: reads the next finer scale with stride 2; None where there is none to read.
      same: reads this scale.
    """

    scale: int
    channels: int
    down: Bottleneck | None
    same: Bottleneck

    @property
    def features(self) -> int:
        """Channels after the layer."""
        return self.channels + self.same.features + (self.down.features if self.down else 0)


class ScaleMix(NamedTuple):
    """A transition's 1x1 convolution at one scale, from `channels` to `features`."""

    scale: int
    channels: int
    features: int


class Layer(NamedTuple):
    """A layer of the network: how each scale that it keeps grows, finest first."""

    name: str
    scales: tuple[ScaleGrowth, ...]

    def live_after(self, live: LiveChannels) -> LiveChannels:
        """Returns the coarsest scale's live channels after the layer: the old ones and all new."""
        coarsest = self.scales[-1]
        if live is None:
            return None
        return append_live(live, coarsest.channels, coarsest.features)


class Transition(NamedTuple):
    """Fewer channels at every kept scale, finest first."""

    name: str
    scales: tuple[ScaleMix, ...]

    def live_after(self, live: LiveChannels) -> LiveChannels:
        """Returns None, every channel: each new channel reads all old ones."""
        del live
        return None


Step: TypeAlias = Layer | Transition


class Block(NamedTuple):
    """What lies between two exits.

    Attributes:
      first: channels of each scale after the network's first layer; empty but in block 1.
      steps: layers and transitions, in their order.
    """

    first: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def features(self) -> int:
        """Channels of the coarsest scale at the block's end, where it is forked."""
        return self.steps[-1].scales[-1].features

    def live(self, live: LiveChannels) -> tuple[LiveChannels, ...]:
        """Returns the coarsest scale's live channels before each step and, last, at the end.

        Finer scales are never forked: all of their channels are live.

        Args:
          live: those of the block's input.
        """
        found = [live]
        for step in self.steps:
            found.append(step.live_after(found[-1]))
        return tuple(found)


def append_live(live: tuple[tuple[int, int], ...], old: int, new: int) -> LiveChannels:
    """Returns the live channels once live ones, `old` to `new`, are appended to `old` channels.

    >>> append_live(((0, 3),), 7, 11), append_live(((2, 7),), 7, 11), append_live((), 7, 11)
    (((0, 3), (7, 11)), ((2, 11),), ((7, 11),))
    """
    kept, start = live, old
    if live and live[-1][1] == old:
        kept, start = live[:-1], live[-1][0]
    return limit_live((*kept, (start, new)), 0, new, new)


def block_sizes(num_exits: int, base: int, step: int, step_mode: str) -> tuple[int, ...]:
    """Returns the layers in each block: `base`, then `step` or, in block k, `step * (k - 1) + 1`.

    >>> block_sizes(4, 4, 2, "even"), block_sizes(4, 1, 1, "lin_grow")
    ((4, 2, 2, 2), (1, 2, 3, 4))

    Raises:
      UserError: an argument is out of range, or a block would have no layer.
    """
    check_whole("num_exits", num_exits)
    check_whole("base", base, at_least=0)
    check_whole("step", step, at_least=0)
    check_name("step_mode", step_mode, STEP_MODES)
    grows = step_mode == "lin_grow"
    sizes = (base, *(step * k + 1 if grows else step for k in range(1, num_exits)))
    if not all(sizes):
        raise UserError(
            f"num_exits {num_exits} are more exits than the {sum(sizes)} layers of base {base} and "
            f"step {step} can serve: every exit needs a layer of its own, so raise base and step"
        )
    return sizes


def kept_scales(num_layers: int, num_scales: int, prune: str) -> tuple[int, ...]:
    """Returns how many scales, the coarsest, each layer outputs.

    "max" drops the finest one at equal distances; "min" keeps all that the last layer's coarsest
    scale still depends on.

    >>> kept_scales(7, 3, "max"), kept_scales(7, 3, "min")
    ((3, 3, 3, 2, 2, 2, 1), (3, 3, 3, 3, 3, 2, 1))

    Raises:
      UserError: "min" and so few layers that one would have to drop several scales.
    """
    check_name("prune", prune, PRUNINGS)
    if prune == "max":
        interval = math.ceil(num_layers / num_scales)
        return tuple(num_scales - n // interval for n in range(num_layers))
    if num_layers < num_scales - 1:
        raise UserError(
            f"prune 'min' drops one scale a layer and so needs at least {num_scales - 1} layers "
            f"for {num_scales} scales, got {num_layers}: raise base, step or num_exits"
        )
    return tuple(min(num_scales, num_layers - n) for n in range(num_layers))


def transition_layers(kept: Sequence[int], num_scales: int, prune: str) -> frozenset[int]:
    """Returns the numbers of the layers that a transition follows.

    "max": those that drop a scale; "min": the last ones of the first and second third of them all.

    >>> sorted(transition_layers((3, 3, 2, 2, 1), 3, "max"))
    [3, 5]
    >>> sorted(transition_layers((3,) * 5 + (2, 1), 3, "min"))
    [2, 4]
    """
    if prune == "min":
        return frozenset({len(kept) // 3, 2 * len(kept) // 3})
    before = (num_scales, *kept)
    return frozenset(n for n, scales in enumerate(kept, start=1) if scales < before[n - 1])


@functools.lru_cache(maxsize=128)
def plan_blocks(
    *,
    num_exits: int,
    base: int,
    step: int,
    step_mode: str,
    initial_channels: int,
    growth: int,
    scale_factors: tuple[float, ...],
    bottleneck_factors: tuple[int, ...],
    prune: str,
    reduction: float,
) -> tuple[Block, ...]:
    """Lays out a whole network; the arguments are those of `MSDNet`.

    Before layer n a scale has width x scale factor channels; a layer adds `growth` to the width, a
    transition leaves floor(reduction x width) of it.

    Raises:
      UserError: an argument is out of range or does not fit another.

    Example: one scale, 5 + 3 channels in its only layer.
      >>> block, = plan_blocks(
      ...     num_exits=1, base=1, step=1, step_mode="even", initial_channels=5, growth=3,
      ...     scale_factors=(1,), bottleneck_factors=(1,), prune="max", reduction=0.5)
      >>> block.first, block.features, block.steps[0].scales[0].same
      ((5,), 8, Bottleneck(hidden=3, features=3))
    """
    check_whole("initial_channels", initial_channels)
    check_whole("growth", growth)
    _check_factors(scale_factors, bottleneck_factors)
    check_fraction("reduction", reduction)
    sizes = block_sizes(num_exits, base, step, step_mode)
    scales = _Scales(growth, scale_factors, bottleneck_factors)
    kept = kept_scales(sum(sizes), len(scale_factors), prune)
    reduced = transition_layers(kept, len(scale_factors), prune) if reduction else frozenset()
    width, numbers, blocks = initial_channels, iter(range(1, sum(sizes) + 1)), []
    for i, size in enumerate(sizes):
        first, steps = scales.channels(width) if i == 0 else (), []
        for number in (next(numbers) for _ in range(size)):
            steps.append(scales.layer(number, width, kept))
            width += growth
            if number in reduced:
                narrow = _reduced(width, reduction, number)
                steps.append(scales.transition(number, width, narrow, kept))
                width = narrow
        blocks.append(Block(first, tuple(steps)))
    return tuple(blocks)


class _Scales(NamedTuple):
    """What is the same in every layer."""

    growth: int
    factors: tuple[float, ...]
    bottleneck_factors: tuple[int, ...]

    def channels(self, width: int) -> tuple[int, ...]:
        """Returns every scale's channels at a width, finest first."""
        return tuple(_times(width, factor, f"a width of {width}") for factor in self.factors)

    def layer(self, number: int, width: int, kept: Sequence[int]) -> Layer:
        """Plans layer `number`, which reads what the layer before kept."""
        read = kept[number - 2] if number > 1 else len(self.factors)
        grown = (self._growth(s, width, read) for s in self._coarsest(kept[number - 1]))
        return Layer(f"layer{number}", tuple(grown))

    def transition(self, number: int, width: int, narrow: int, kept: Sequence[int]) -> Transition:
        """Plans the transition after layer `number`."""
        wide, narrowed = self.channels(width), self.channels(narrow)
        mixes = (ScaleMix(s + 1, wide[s], narrowed[s]) for s in self._coarsest(kept[number - 1]))
        return Transition(f"transition{number}", tuple(mixes))

    def _coarsest(self, count: int) -> range:
        return range(len(self.factors) - count, len(self.factors))

    def _growth(self, s: int, width: int, read: int) -> ScaleGrowth:
        """Plans scale `s` (0-based) of a layer that reads the `read` coarsest scales."""
        grown = _times(self.growth, self.factors[s], f"growth {self.growth}")
        channels = self.channels(width)
        if s == len(self.factors) - read:
            return ScaleGrowth(s + 1, channels[s], None, self._bottleneck(s, channels, grown))
        if grown % 2:
            raise UserError(
                f"scale {s + 1} grows by growth {self.growth} x scale factor {self.factors[s]:g} = "
                f"{grown} channels, of which two convolutions make half each: make it even"
            )
        down = self._bottleneck(s - 1, channels, grown // 2)
        return ScaleGrowth(s + 1, channels[s], down, self._bottleneck(s, channels, grown // 2))

    def _bottleneck(self, source: int, channels: Sequence[int], features: int) -> Bottleneck:
        hidden = min(channels[source], self.bottleneck_factors[source] * features)
        return Bottleneck(hidden, features)


def check_fraction(name: str, value: Any, *, below_one: bool = False) -> None:
    """Raises UserError unless `value` is a number from 0 to 1, itself excluded if `below_one`."""
    if not (_is_number(value) and 0 <= value <= 1) or (below_one and value == 1):
        raise UserError(f"{name} must lie in [0, 1{')' if below_one else ']'}, got {value!r}")


def check_name(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises UserError unless `value` is one of the known names."""
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_factors(scale_factors: tuple, bottleneck_factors: tuple) -> None:
    if len(scale_factors) != len(bottleneck_factors) or not scale_factors:
        raise UserError(
            f"scale_factors and bottleneck_factors need one number for each scale, got "
            f"{scale_factors} and {bottleneck_factors}"
        )
    for factor in scale_factors:
        if not (_is_number(factor) and 0 < factor < math.inf):
            raise UserError(f"scale_factors must be numbers above 0, got {scale_factors}")
    for factor in bottleneck_factors:
        check_whole("each of bottleneck_factors", factor)


def _times(width: int, factor: float, what: str) -> int:
    """Returns `width * factor`, which must be a whole number of channels."""
    product = width * factor
    if product != math.floor(product):
        raise UserError(
            f"{what} times the scale factor {factor:g} is {product:g}, no whole number of "
            f"channels: choose widths and scale_factors that fit"
        )
    return int(product)


def _reduced(width: int, reduction: float, number: int) -> int:
    # Published programs round the width down, then multiply by each scale's factor.
    narrow = math.floor(reduction * width)
    if not narrow:
        raise UserError(
            f"reduction {reduction:g} leaves nothing of the width {width} after layer {number}: "
            f"raise it, or 0 for no transitions"
        )
    return narrow
