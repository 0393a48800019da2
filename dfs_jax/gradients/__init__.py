"""Rules that turn the exits' gradients into one update: `create_rule(name, **options)`."""

from __future__ import annotations

from typing import Any

from dfs_jax.gradients.rule import (
    Batch,
    GradientRule,
    Outcome,
    RuleStep,
    Setup,
    StepParts,
    Trained,
)
from dfs_jax.registry import Registry

__all__ = [
    "RULES",
    "Batch",
    "GradientRule",
    "Outcome",
    "RuleStep",
    "Setup",
    "StepParts",
    "Trained",
    "create_rule",
]

RULES = Registry(
    "gradient rule",
    {
        "sum": "dfs_jax.gradients.summed:Sum",
        "weighted_sum": "dfs_jax.gradients.weighted_sum:WeightedSum",
        "pcgrad": "dfs_jax.gradients.pcgrad:PCGrad",
        "cagrad": "dfs_jax.gradients.cagrad:CAGrad",
        "nash_mtl": "dfs_jax.gradients.nash_mtl:NashMTL",
        "upgrad": "dfs_jax.gradients.upgrad:UPGrad",
        "meta_gf": "dfs_jax.gradients.meta_gf:MetaGF",
        "wpn": "dfs_jax.gradients.wpn:WPN",
    },
)


def create_rule(name: str, **options: Any) -> GradientRule:
    """Builds a rule by its registered name, or a user's own `package.module:attribute`.

    >>> create_rule("cagrad", radius=0.5).radius
    0.5
    """
    return RULES.create(name, **options)
