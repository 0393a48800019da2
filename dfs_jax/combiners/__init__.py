"""How the exits' gradients merge in the trunk: `create_combiner(name, **options)` builds any."""

from __future__ import annotations

from typing import Any

from dfs_jax.combiners.base import Combiner
from dfs_jax.registry import Registry

__all__ = ["COMBINERS", "Combiner", "create_combiner"]

COMBINERS = Registry(
    "combiner",
    {
        "weighted_sum": "dfs_jax.combiners.weighted_sum:WeightedSum",
        "pcgrad": "dfs_jax.combiners.pcgrad:PCGrad",
        "cagrad": "dfs_jax.combiners.cagrad:CAGrad",
        "nash_mtl": "dfs_jax.combiners.nash_mtl:NashMTL",
        "upgrad": "dfs_jax.combiners.upgrad:UPGrad",
    },
)


def create_combiner(name: str, **options: Any) -> Combiner:
    """Builds a combiner by its registered name, or a user's own `package.module:attribute`.

    >>> create_combiner("cagrad", radius=0.5).radius
    0.5
    """
    return COMBINERS.create(name, **options)
