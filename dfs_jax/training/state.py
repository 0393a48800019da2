"""State that a training run carries from step to step, which is the content of a checkpoint."""

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
# Folded into the run's key for draws before the first step; steps fold in their numbers.
_NO_STEP = 2**32 - 1
_SUM = Sum()


class EpochTotals(struct.PyTreeNode):
    """Sums over the training examples of the epoch so far.

    Attributes:
      loss: sum over examples of the training loss, which is summed over exits.
      correct: number of examples that each exit classified correctly, `[exits]`.
      examples: number of examples.
    """

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array

    @classmethod
    def zero(cls, num_exits: int) -> EpochTotals:
        """Returns sums over no examples."""
        return cls(jnp.float32(0), jnp.zeros(num_exits, jnp.int32), jnp.int32(0))


class TrainState(struct.PyTreeNode):
    """State of a run after a step.

    Attributes:
      step: number of steps taken.
      params: trained parameters, under `block1`.. and `head1`..
      batch_stats: running statistics.
      opt_state: state of the optimizer.
      rule_state: state of the gradient rule.
      averaged: exponential moving average of parameters and statistics, or None.
      totals: sums over the epoch so far.
      key_data: data of the run's random key, from which each step's keys are derived.
      first_bad_step: first step with a non-finite loss or update, or `NO_BAD_STEP`.
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
        """Variables for evaluation: the moving average if there is one, else the trained values."""
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
    """Returns the state before the first step.

    Args:
      variables: initial variables of the model, `{"params": ..., "batch_stats": ...}`.
      optimizer: optimizer of the run.
      key: random key of the run, from which each step's keys are derived.
      num_exits: number of exits of the model.
      keep_average: whether to keep a moving average of parameters and statistics.
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
