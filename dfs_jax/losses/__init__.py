"""What the exits are asked: `create_loss(name, **options)` builds any loss by name."""

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
    """Maps a network's outputs and `labels` `[batch]` to one loss an exit, `[exits]`.

    A loss that compares features across exits sets `adapts_features = True`: early heads then get
    an adaptation layer. One whose value for an exit sends gradient to that exit's outputs alone
    sets `couples_exits = False`: single exits' gradients are then cheaper. One that is a mean over
    the examples may say of what: `example_losses(outputs, labels)`, `[exits, batch]`, for methods
    that weigh examples.
    """

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array: ...


def create_loss(name: str, **options: Any) -> Loss:
    """Builds a loss by its registered name, or a user's own `package.module:attribute`.

    >>> create_loss("byot").temperature
    3.0
    """
    return LOSSES.create(name, **options)
