"""Forks, which define what crosses a block boundary; `create_fork` builds them by name."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from dfs_jax.registry import Registry
from dfs_jax.surgery import ExitFork

FORKS = Registry(
    "fork",
    {
        "plain": "dfs_jax.forks.plain:PlainFork",
        "dfs": "dfs_jax.surgery:FeatureSurgery",
        "gradient_equilibrium": "dfs_jax.forks.gradient_equilibrium:GradientEquilibrium",
    },
)


class Fork(Protocol):
    """Splits a feature between exit `exit_index` (0-based) of `num_exits` and the next block.

    A pure function: each of the two readers calls it and takes its own view.
    """

    def __call__(self, x: jax.Array, *, exit_index: int, num_exits: int) -> ExitFork: ...


def create_fork(name: str, **options: Any) -> Fork:
    """Builds a fork by its registered name, or a user's own `package.module:attribute`.

    >>> create_fork("dfs", partition_ratio=0.3).referencing
    'symmetric'
    """
    return FORKS.create(name, **options)
