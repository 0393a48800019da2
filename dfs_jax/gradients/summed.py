"""The plain sum of the exits' losses: ordinary backpropagation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dfs_jax.gradients.rule import Batch, GradientRule, Outcome, RuleStep, StepParts, Trained
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
