"""The plain sum of the exits' losses: ordinary backpropagation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from dfs_jax.forks import Fork
from dfs_jax.gradients.rule import Batch, GradientRule, Outcome, RuleStep, StepParts, Trained
from dfs_jax.losses import LossFunction
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
            (total, (logits, batch_stats)), grads = parts.differentiate(
                trained.params, trained.batch_stats, batch, parts.loss
            )
            after, updates = parts.update(trained._replace(batch_stats=batch_stats), grads)
            return Outcome(after, state, total, logits, updates)

        return step


def summed_loss(
    model: MultiExitModel,
    fork: Fork,
    prepare: Callable[[jax.Array], jax.Array] = lambda images: images,
    gather: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, PyTree]]]:
    """Returns the training loss `(params, batch_stats, batch, loss) -> (total, aux)`.

    `total` is `loss` summed over the exits, `aux` is `(logits, batch_stats)`. The gradient skips
    channels that train nothing unless the model's `partitioned_backward` is False.

    Args:
      model: backbone that is trained.
      fork: fork at each exit.
      prepare: function applied to the images first, such as normalisation.
      gather: function applied to the parameters first, such as a sharding constraint.
    """

    def total_loss(params: PyTree, batch_stats: PyTree, batch: Batch, loss: LossFunction):
        outputs, updated = model.apply(
            {"params": gather(params), "batch_stats": batch_stats},
            prepare(batch.images),
            fork,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": batch.dropout_key},
        )
        total = jnp.sum(loss(outputs, batch.labels))
        return total, (outputs.logits, updated.get("batch_stats", {}))

    return skip_dead_gradients(total_loss) if model.partitioned_backward else total_loss
