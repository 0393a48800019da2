"""Rules that merge the exits' gradients in the trunk; heads keep the gradient of their own loss."""

from __future__ import annotations

from typing import ClassVar

import jax

from dfs_jax.gradients.gram import combine, gram_matrix
from dfs_jax.gradients.rule import Batch, GradientRule, Outcome, RuleStep, StepParts, Trained
from dfs_jax.models.contract import split_trunk_and_heads
from dfs_jax.types import PyTree


class Combiner(GradientRule):
    """Base of the rules that merge the exits' gradients of the trunk into one.

    A subclass defines `update`, and `init_trunk` if it keeps a state.
    """

    takes_exit_gradients: ClassVar[bool] = True

    def init_trunk(self, params: PyTree) -> PyTree:
        """Returns the state before the first step, given the parameters of the trunk."""
        del params
        return ()

    def update(
        self, per_exit_grads: PyTree, state: PyTree, params: PyTree, *, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the merged gradients, shaped as `params`, and the next state.

        Args:
          per_exit_grads: gradients of the trunk by exit, `[k, ...]` of the last k exits, see
            `dfs_jax.gradients.gram`.
          state: state before the step.
          params: parameters of the trunk.
          key: random key of the step.
        """
        raise NotImplementedError

    def init(self, params: PyTree, num_exits: int, key: jax.Array) -> PyTree:
        """Returns `init_trunk` of the trunk's parameters."""
        del num_exits, key
        trunk, _ = split_trunk_and_heads(params)
        return self.init_trunk(trunk)

    def wrap(self, parts: StepParts) -> RuleStep:
        """Returns a step that updates the trunk by the merged gradients."""

        def step(trained: Trained, state: PyTree, batch: Batch) -> Outcome:
            found = parts.exit_gradients(trained, batch)
            params, _ = split_trunk_and_heads(trained.params)
            trunk, state = self.update(found.grads.trunk, state, params, key=batch.rule_key)
            trained = trained._replace(batch_stats=found.batch_stats)
            after, updates = parts.update(trained, {**trunk, **found.grads.heads})
            return Outcome(after, state, found.loss, found.logits, updates)

        return step


class GramCombiner(Combiner):
    """Base of the combiners that weight whole gradients by their inner products.

    A subclass defines `weights`. An exit whose gradient is zero, because it trains nothing of
    the trunk, appears orthogonal to all others: its weight does not matter, and means are
    taken over the other exits (`count_gradients`).
    """

    def update(
        self, per_exit_grads: PyTree, state: PyTree, params: PyTree, *, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the weighted sum of the exits' gradients, and the unchanged state."""
        del params
        weights = self.weights(gram_matrix(per_exit_grads), key)
        return combine(per_exit_grads, weights), state

    def weights(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weight of each exit's gradient, `[exits]`.

        Args:
          gram: inner products of the exits' gradients, `[exits, exits]`, float32 or wider.
          key: random key of the step.
        """
        raise NotImplementedError
