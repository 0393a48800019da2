"""Deep Feature Surgery: partitions a shared feature by channel, and lets every exit read all of it.

Gong et al., "Deep Feature Surgery: Towards Accurate and Efficient Multi-Exit Networks", ECCV 2024.
This module needs only jax and works in any model whose channels are on the last axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

REFERENCINGS = ("symmetric", "trunk_only", "none")


class ExitFork(NamedTuple):
    """A feature as its two readers receive it: exit i and the next block."""

    to_head: jax.Array
    to_trunk: jax.Array


def partition_channels(num_channels: int, partition_ratio: float) -> int:
    """Returns the number of shared channels, `round(beta * C)` with halves to even.

    >>> partition_channels(64, 0.3), partition_channels(5, 0.5)
    (19, 2)
    """
    return round(partition_ratio * num_channels)


@dataclasses.dataclass(frozen=True)
class FeatureSurgery:
    """Forks a feature f = [f+ | f-] so that deeper exits train f+, this exit f-, and both read all.

    With k = round(beta * C) and sg = stop_gradient:

        referencing   next block reads   exit i reads
        "symmetric"   [f+, sg(f-)]       [sg(f+), f-]   the paper; published VGG and ResNet
        "trunk_only"  [f+, sg(f-)]       [f+, f-]       published MSDNet and ViT
        "none"        [f+, 0]            [0, f-]        partitioning without referencing (ablation)

    The last exit is never partitioned.

    Args:
      partition_ratio: beta in [0, 1], the fraction of channels that deeper exits train; one number
        (or a sequence of one) for every exit, or one for each exit but the last.
      referencing: "symmetric", "trunk_only" or "none", as in the table.

    Raises:
      ValueError: a beta outside [0, 1], an unknown referencing, or (when called) a number of betas
        other than 1 or that of the exits but the last.

    Example:
      >>> x = jnp.ones((2, 8, 8, 16))
      >>> forked = FeatureSurgery(partition_ratio=0.5)(x, exit_index=0, num_exits=4)
      >>> forked.to_head.shape, forked.to_trunk.shape
      ((2, 8, 8, 16), (2, 8, 8, 16))
    """

    partition_ratio: float | Sequence[float] = 0.5
    referencing: str = "symmetric"

    def __post_init__(self):
        ratios = self.partition_ratio
        if isinstance(ratios, Sequence) and not isinstance(ratios, str):
            ratios = tuple(ratios)
            object.__setattr__(self, "partition_ratio", ratios)
        for ratio in ratios if isinstance(ratios, tuple) else (ratios,):
            if isinstance(ratio, (bool, str)) or not 0 <= ratio <= 1:
                raise ValueError(f"partition_ratio must lie in [0, 1], got {ratio!r}")
        if self.referencing not in REFERENCINGS:
            names = ", ".join(REFERENCINGS)
            raise ValueError(f"referencing must be one of {names}, got {self.referencing!r}")

    def ratio_at(self, exit_index: int, num_exits: int) -> float:
        """Returns beta at one exit (0-based)."""
        ratios = self.partition_ratio
        if not isinstance(ratios, Sequence):
            return ratios
        if len(ratios) not in (1, num_exits - 1):
            raise ValueError(
                f"{num_exits} exits take 1 or {num_exits - 1} partition ratios (the last exit is "
                f"never partitioned), got {len(ratios)}: {ratios}"
            )
        return ratios[0] if len(ratios) == 1 else ratios[exit_index]

    def __call__(self, x: jax.Array, *, exit_index: int, num_exits: int) -> ExitFork:
        """Forks `x` `[..., channels]` at exit `exit_index` of `num_exits` (0-based)."""
        if not 0 <= exit_index < num_exits:
            raise ValueError(f"exit_index must lie in [0, {num_exits}), got {exit_index}")
        if exit_index == num_exits - 1:
            return ExitFork(x, x)
        k = partition_channels(x.shape[-1], self.ratio_at(exit_index, num_exits))
        foreign = jnp.zeros_like if self.referencing == "none" else jax.lax.stop_gradient
        shared, specific = x[..., :k], x[..., k:]
        to_trunk = jnp.concatenate([shared, foreign(specific)], axis=-1)
        if self.referencing == "trunk_only":
            return ExitFork(x, to_trunk)
        to_head = jnp.concatenate([foreign(shared), specific], axis=-1)
        return ExitFork(to_head, to_trunk)
