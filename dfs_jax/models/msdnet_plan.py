"""Layout of an MSDNet: scales and channels of every layer, by arithmetic alone.

Scales are counted from 1, finest first. Layers are counted from 1 through the whole network,
except the first layer, which creates the scales.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from dfs_jax.types import UserError, check_whole

STEP_MODES = ("even", "lin_grow")
PRUNINGS = ("max", "min")


class Bottleneck(NamedTuple):
    """A 1x1 convolution to `hidden` channels and a 3x3 convolution to `features`."""

    hidden: int
    features: int


class ScaleGrowth(NamedTuple):
    """Channels that a layer appends at one scale, in this order: [input, `down`, `same`].

    Attributes:
      scale: number of the scale.
      channels: number of channels before the layer.
      down: convolutions that read the next finer scale with stride 2; None if there is none to
        read.
      same: convolutions that read this scale.
    """

    scale: int
    channels: int
    down: Bottleneck | None
    same: Bottleneck

    @property
    def features(self) -> int:
        """Number of channels after the layer."""
        return self.channels + self.same.features + (self.down.features if self.down else 0)


class ScaleMix(NamedTuple):
    """A transition's 1x1 convolution at one scale, from `channels` to `features`."""

    scale: int
    channels: int
    features: int


class Layer(NamedTuple):
    """A layer of the network: the growth of each scale that it keeps, finest first."""

    name: str
    scales: tuple[ScaleGrowth, ...]


class Transition(NamedTuple):
    """A transition: 1x1 convolutions that narrow every kept scale, finest first."""

    name: str
    scales: tuple[ScaleMix, ...]


Step: TypeAlias = Layer | Transition


class Block(NamedTuple):
    """Layers and transitions up to an exit.

    Attributes:
      first: number of channels of each scale after the network's first layer, in block 1; empty in
        later blocks.
      steps: layers and transitions, in their order.
    """

    first: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def features(self) -> int:
        """Number of channels of the coarsest scale at the block's end, where it is forked."""
        return self.steps[-1].scales[-1].features


def block_sizes(num_exits: int, base: int, step: int, step_mode: str) -> tuple[int, ...]:
    """Returns the layers of each block: `base`, then `step` or, in block k, `step * (k - 1) + 1`.

    >>> block_sizes(4, 4, 2, "even"), block_sizes(4, 1, 1, "lin_grow")
    ((4, 2, 2, 2), (1, 2, 3, 4))

    Raises:
      UserError: an argument out of range, or a block without layers.
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
    """Returns the number of scales that each layer outputs, which are the coarsest.

    "max" drops the finest scale at equal distances; "min" keeps the scales that the last layer's
    coarsest scale depends on.

    >>> kept_scales(7, 3, "max"), kept_scales(7, 3, "min")
    ((3, 3, 3, 2, 2, 2, 1), (3, 3, 3, 3, 3, 2, 1))

    Raises:
      UserError: "min" with so few layers that one would have to drop several scales.
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

    "max": the layers that drop a scale; "min": the last layers of the first and the second third.

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
    """Returns the layout of a whole network; the arguments are those of `MSDNet`.

    A scale has width x scale factor channels. A layer adds `growth` to the width, and a transition
    reduces it to floor(reduction x width).

    Raises:
      UserError: an argument out of range, or arguments that do not fit together.

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
    """Settings that all layers share."""

    growth: int
    factors: tuple[float, ...]
    bottleneck_factors: tuple[int, ...]

    def channels(self, width: int) -> tuple[int, ...]:
        """Returns the number of channels of each scale at a width, finest first."""
        return tuple(_times(width, factor, f"a width of {width}") for factor in self.factors)

    def layer(self, number: int, width: int, kept: Sequence[int]) -> Layer:
        """Plans layer `number`, which reads the scales that the previous layer kept."""
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
    """Raises UserError unless `value` is a number from 0 to 1, or below 1 if `below_one`."""
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
    # As in the published programs: round the width down, then multiply by each scale's factor.
    narrow = math.floor(reduction * width)
    if not narrow:
        raise UserError(
            f"reduction {reduction:g} leaves nothing of the width {width} after layer {number}: "
            f"raise it, or 0 for no transitions"
        )
    return narrow
