"""Losses of the exits: `create_loss(name, **options)` builds any of them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax

from dfs_jax.registry import Registry
from dfs_jax.types import ExitOutputs

# `(outputs, labels) -> losses`, labels `[batch]` and losses `[exits]`.
LossFunction = Callable[[ExitOutputs, jax.Array], jax.Array]

LOSSES = Registry(
    "loss",
    {
        "deep_supervision": "dfs_jax.losses.deep_supervision:DeepSupervision",
        "byot": "dfs_jax.losses.distillation:BYOT",
        "distillation": "dfs_jax.losses.distillation:MultiExitDistillation",
    },
)


class Loss:
    """Base of losses: maps a network's outputs and `labels` `[batch]` to losses `[exits]`.

    Attributes:
      adapts_features: whether the loss compares features across exits, which gives early heads an
        adaptation layer.
      couples_exits: whether an exit's loss may send gradient to the outputs of another exit;
        gradients of single exits are cheaper if not.
    """

    adapts_features: Any = False
    couples_exits: ClassVar[bool] = True

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns one loss for each exit, `[exits]`."""
        raise NotImplementedError

    def example_losses(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns losses `[exits, batch]`, of which `__call__` is the mean over examples."""
        raise NotImplementedError

    @property
    def is_mean_of_examples(self) -> bool:
        """Whether the loss defines `example_losses`, for methods that weight examples."""
        return type(self).example_losses is not Loss.example_losses

    @property
    def label(self) -> str:
        """Name of the loss in messages."""
        return type(self).__name__


class _Function(Loss):
    """A loss made of any callable, with those attributes of `Loss` that it has."""

    def __init__(self, function: LossFunction):
        self._function = function
        for name in ("adapts_features", "couples_exits", "example_losses"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        return self._function(outputs, labels)

    @property
    def is_mean_of_examples(self) -> bool:
        return hasattr(self._function, "example_losses")

    @property
    def label(self) -> str:
        return getattr(self._function, "__name__", type(self._function).__name__)


def as_loss(function: LossFunction) -> Loss:
    """Returns a callable `(outputs, labels) -> [exits]` as a `Loss`.

    >>> as_loss(lambda outputs, labels: outputs.logits[:, 0, 0]).couples_exits
    True
    """
    return function if isinstance(function, Loss) else _Function(function)


def create_loss(name: str, **options: Any) -> Loss:
    """Builds a loss by its registered name, or a user's own `package.module:attribute`.

    >>> create_loss("byot").temperature
    3.0
    """
    return as_loss(LOSSES.create(name, **options))
