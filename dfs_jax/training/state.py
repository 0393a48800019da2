"""All that a training run carries from step to step, and so all that a checkpoint holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfs_jax.gradients import GradientRule
from dfs_jax.gradients.summed import Sum
from dfs_jax.types import PyTree

NO_BAD_STEP = -1
# Folded into the run's key for what is drawn before the first step; steps fold in their numbers.
_NO_STEP = 2**32 - 1
_SUM = Sum()


class EpochTotals(struct.PyTreeNode):
    """Sums over the training examples of the epoch so far.

    Attributes:
      loss: sum over examples of the total training loss.
      correct: `[exits]`, examples that each exit classified correctly.
      examples: how many were counted.
    """

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array

    @classmethod
    def zero(cls, num_exits: int) -> EpochTotals:
        """Nothing counted yet."""
        return cls(jnp.float32(0), jnp.zeros(num_exits, jnp.int32), jnp.int32(0))


class TrainState(struct.PyTreeNode):
    """A run at the end of a step.

    Attributes:
      step: steps taken.
      params: trained parameters, under `block1`.. and `head1`..
      batch_stats: running statistics.
      opt_state: the optimizer's.
      rule_state: the gradient rule's.
      averaged: exponential moving average of parameters and statistics, or None.
      totals: sums over the epoch so far.
      key_data: the run's random key, from which each step's keys are folded.
      first_bad_step: the first step with a non-finite loss or update, or `NO_BAD_STEP`.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    rule_state: PyTree
    averaged: PyTree
    totals: EpochTotals
    key_data: jax.Array
    first_bad_step: jax.Array

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What evaluation uses: the average where there is one, else the trained values."""
        return self.averaged or {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    num_exits: int,
    keep_average: bool,
    rule: GradientRule = _SUM,
) -> TrainState:
    """Returns the state before the first step, from freshly initialised `variables`.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.
      optimizer: of the run.
      key: the run's, from which each step's keys are folded.
      num_exits: of the model.
      keep_average: of parameters and statistics.
      rule: gradient rule of the run.
    """
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        rule_state=rule.init(variables["params"], num_exits, jax.random.fold_in(key, _NO_STEP)),
        averaged=jax.tree.map(jnp.copy, variables) if keep_average else None,
        totals=EpochTotals.zero(num_exits),
        key_data=jax.random.key_data(key),
        first_bad_step=jnp.int32(NO_BAD_STEP),
    )
