"""The plain sum of the exits' losses: ordinary backpropagation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dfs_jax.forks import Fork
from dfs_jax.gradients.rule import Batch, GradientRule, Outcome, RuleStep, StepParts, Trained
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.tracing.dead_gradients import skip_dead_gradients
from dfs_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Sum(GradientRule):
    """Minimises the sum of the exits' losses: one forward and one backward pass.

    >>> Sum().is_plain_sum
    True
    """

    is_plain_sum: ClassVar[bool] = True

    def wrap(self, parts: StepParts) -> RuleStep:
        """Returns the ordinary training step."""

        def step(trained: Trained, state: PyTree, batch: Batch) -> Outcome:
            found = parts.gradients(trained, batch, parts.loss)
            trained = trained._replace(batch_stats=found.batch_stats)
            after, updates = parts.update(trained, found.grads)
            return Outcome(after, state, found.loss, found.logits, updates)

        return step


def summed_loss(
    model: MultiExitModel, fork: Fork, loss: Loss
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, PyTree]]]:
    """Returns the training loss `(params, variables, images, labels, key) -> (total, aux)`.

    `total` is summed over the exits, `aux` is `(logits, batch_stats)`; `params` take the place of
    those in `variables`, so that the loss can be differentiated with respect to them. The gradient
    skips channels that train nothing unless the model's `partitioned_backward` is False.
    """

    def total_loss(params: PyTree, variables: dict[str, Any], images, labels, key):
        outputs, updated = model.apply(
            {**variables, "params": params},
            images,
            fork,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        total = jnp.sum(loss(outputs, labels))
        return total, (outputs.logits, updated.get("batch_stats", {}))

    return skip_dead_gradients(total_loss) if model.partitioned_backward else total_loss
