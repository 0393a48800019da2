"""What looks one step ahead: `create_meta(name, **options)` builds any such method."""

from __future__ import annotations

from typing import Any

from dfs_jax.meta.base import Batch, Meta, MetaStep, Outcome, Setup, StepParts, Trained
from dfs_jax.registry import Registry

__all__ = [
    "METAS",
    "Batch",
    "Meta",
    "MetaStep",
    "Outcome",
    "Setup",
    "StepParts",
    "Trained",
    "create_meta",
]

METAS = Registry(
    "meta method",
    {"meta_gf": "dfs_jax.meta.meta_gf:MetaGF", "wpn": "dfs_jax.meta.wpn:WPN"},
)


def create_meta(name: str, **options: Any) -> Meta:
    """Builds a meta method by its registered name, or a user's own `package.module:attribute`.

    >>> create_meta("wpn", p=1.5).p
    1.5
    """
    return METAS.create(name, **options)
