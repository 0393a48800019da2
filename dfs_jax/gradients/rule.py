"""Interface of gradient rules, which turn the exits' gradients into one update of the network.

The plain sum, the combiners of the trunk's gradients and the methods that look one step ahead are
all rules. A rule is given the parts of a training step and returns the step, so that none of them
needs to know how the network is run, divided over devices or taken in micro batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax

from dfs_jax.losses import Loss, LossFunction
from dfs_jax.types import BatchGradients, PyTree


class Trained(NamedTuple):
    """Everything that a step changes, whatever the rule."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


class Batch(NamedTuple):
    """Input of one step.

    Attributes:
      images: `[batch, height, width, channels]`, augmented.
      labels: `[batch]`.
      dropout_key: random key of the step's dropout.
      rule_key: random key of the step's gradient rule.
    """

    images: jax.Array
    labels: jax.Array
    dropout_key: jax.Array
    rule_key: jax.Array


# `(params, batch_stats, batch, loss) -> ((total, (logits, batch_stats)), grads)`.
Passes = Callable[[PyTree, PyTree, Batch, LossFunction], tuple[Any, PyTree]]


class StepParts(NamedTuple):
    """The parts that a rule builds its training step from.

    Attributes:
      loss: loss of the exits.
      num_exits: number of exits.
      differentiate: `(params, batch_stats, batch, loss) -> ((total, (logits, batch_stats)), grads)`
        of a loss summed over the exits, as `jax.value_and_grad` returns it.
      differentiate_exits: the same for single exits; `grads` are `TrunkAndHeads`, the trunk's by
        exit.
      update: `(trained, grads) -> (trained, updates)`, the optimizer's update of the parameters;
        `batch_stats` stay as they are.
      divide: `(batch, count) -> batches`, equal parts of a batch.
    """

    loss: Loss
    num_exits: int
    differentiate: Passes
    differentiate_exits: Passes
    update: Callable[[Trained, PyTree], tuple[Trained, PyTree]]
    divide: Callable[[Batch, int], list[Batch]]

    def gradients(self, trained: Trained, batch: Batch, loss: LossFunction) -> BatchGradients:
        """Returns the gradients of a loss summed over the exits, shaped as the parameters."""
        return _named(self.differentiate(trained.params, trained.batch_stats, batch, loss))

    def exit_gradients(self, trained: Trained, batch: Batch) -> BatchGradients:
        """Returns `TrunkAndHeads` gradients of `loss`, the trunk's by exit."""
        passes = self.differentiate_exits
        return _named(passes(trained.params, trained.batch_stats, batch, self.loss))


def _named(found: tuple[Any, PyTree]) -> BatchGradients:
    (total, (logits, batch_stats)), grads = found
    return BatchGradients(total, logits, grads, batch_stats)


class Outcome(NamedTuple):
    """Result of one step.

    Attributes:
      trained: parameters, statistics and optimizer state after the step.
      state: state of the rule after the step.
      loss: loss that the step minimised, summed over the exits.
      logits: `[exits, batch, classes]`.
      updates: change of the parameters, checked for values that are not finite.
    """

    trained: Trained
    state: PyTree
    loss: jax.Array
    logits: jax.Array
    updates: PyTree


RuleStep = Callable[[Trained, PyTree, Batch], Outcome]


class Setup(NamedTuple):
    """The run that a rule is to train, for `GradientRule.check`.

    Attributes:
      loss: loss of the exits.
      num_exits: number of exits.
      total_steps: training steps of the run.
      batch_size: examples of a step.
      batch_parts: number of devices that a batch is divided over.
      accumulate_steps: micro batches of a step.
      batch_norm_groups: parts of a micro batch with batch statistics of their own.
    """

    loss: Loss
    num_exits: int
    total_steps: int
    batch_size: int
    batch_parts: int
    accumulate_steps: int
    batch_norm_groups: int


class GradientRule:
    """Base of every gradient rule. A rule defines `wrap`, and `init` if it keeps a state.

    Attributes:
      is_plain_sum: whether a step is one forward and one backward pass of the summed losses.
      needs_blocks: whether the model must run in blocks, whose exits the rule tells apart.
      takes_exit_gradients: whether the rule reads the gradients of single exits, which needs a
        model whose parameters all lie under `block1`.. and `head1`..
      looks_ahead: whether the rule takes trial steps, and so needs the optimizer's real update.
    """

    is_plain_sum: ClassVar[bool] = False
    takes_exit_gradients: ClassVar[bool] = False
    needs_blocks: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def init(self, params: PyTree, num_exits: int, key: jax.Array) -> PyTree:
        """Returns the state before the first step: a pytree of arrays of fixed shapes.

        Args:
          params: parameters of the model, under `block1`.. and `head1`..
          num_exits: number of exits.
          key: random key.
        """
        del params, num_exits, key
        return ()

    def wrap(self, parts: StepParts) -> RuleStep:
        """Returns the training step `(trained, state, batch) -> Outcome`."""
        raise NotImplementedError

    def check(self, setup: Setup) -> None:
        """Raises UserError if the rule cannot train a run that is set up like this."""
        del setup

    def published_loop(self, num_exits: int) -> str | None:
        """Describes the passes of the published program, where they differ from this rule's."""
        del num_exits
        return None
