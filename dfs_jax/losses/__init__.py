"""Losses of the exits: `create_loss(name, **options)` builds any of them by name."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from dfs_jax.registry import Registry
from dfs_jax.types import ExitOutputs

LOSSES = Registry(
    "loss",
    {
        "deep_supervision": "dfs_jax.losses.deep_supervision:DeepSupervision",
        "byot": "dfs_jax.losses.distillation:BYOT",
        "distillation": "dfs_jax.losses.distillation:MultiExitDistillation",
    },
)


class Loss(Protocol):
    """Maps a network's outputs and `labels` `[batch]` to one loss for each exit, `[exits]`.

    A loss that compares features across exits sets `adapts_features = True`, which gives early
    heads an adaptation layer. A loss whose value for an exit sends gradient only to the outputs of
    that exit sets `couples_exits = False`, which makes gradients of single exits cheaper. A loss
    that is a mean over examples may define `example_losses(outputs, labels)`, `[exits, batch]`,
    for methods that weight examples.
    """

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array: ...


def create_loss(name: str, **options: Any) -> Loss:
    """Builds a loss by its registered name, or a user's own `package.module:attribute`.

    >>> create_loss("byot").temperature
    3.0
    """
    return LOSSES.create(name, **options)
