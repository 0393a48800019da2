"""A weighted sum of the exits' gradients in the trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dfs_jax.gradients.combiner import Combiner
from dfs_jax.gradients.gram import combine
from dfs_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class WeightedSum(Combiner):
    """Adds up the exits' gradients of the trunk, each times its weight: `sum_i w_i g_i`.

    The weights act on the trunk alone; `exit_weights` of deep supervision act on the heads too.

    Args:
      weights: w, one number for each exit, shallow first; None for 1 everywhere, which gives the
        gradients of `Sum` at a higher cost.

    Raises:
      ValueError: a weight that is not finite or negative, none above 0, or (when called) another
        count of weights than exits.

    Example:
      >>> grads = {"block1": jnp.array([[1.0], [10.0]])}
      >>> WeightedSum((2, 3)).update(grads, (), None, key=jax.random.key(0))[0]
      {'block1': Array([32.], dtype=float32)}
    """

    weights: Sequence[float] | None = None

    def __post_init__(self):
        if self.weights is None:
            return
        weights = tuple(self.weights)
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be finite and not negative, got {weights}")
        if not any(weights):
            raise ValueError(f"a weight must be above 0 to train the trunk, got {weights}")
        object.__setattr__(self, "weights", weights)

    def update(
        self, per_exit_grads: PyTree, state: PyTree, params: PyTree, *, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the weighted sum of the exits' gradients, and the unchanged state."""
        del params, key
        exits = max(len(leaf) for leaf in jax.tree.leaves(per_exit_grads))
        weights = (1,) * exits if self.weights is None else self.weights
        if len(weights) != exits:
            raise ValueError(f"{exits} exits take {exits} weights in the sum, got {weights}")
        return combine(per_exit_grads, jnp.asarray(weights, jnp.float32)), state
