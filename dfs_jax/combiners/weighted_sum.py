"""The sum of the exits' gradients: what ordinary backpropagation of the summed losses computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dfs_jax.combiners.base import combine
from dfs_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """Adds up the exits' gradients, each times its weight: `sum_i w_i g_i`.

    The weights act on the trunk alone; `exit_weights` of deep supervision act on the heads too.

    Args:
      weights: w, one number an exit, shallow first; None for 1 everywhere, which needs no gradients
        of single exits.

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

    @property
    def is_plain_sum(self) -> bool:
        """Whether one ordinary backward pass of the summed losses does all."""
        return self.weights is None

    def init(self, params: PyTree) -> PyTree:
        """Returns no state."""
        del params
        return ()

    def update(
        self, per_exit_grads: PyTree, state: PyTree, params: PyTree, *, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the weighted sum of the exits' gradients, and the state as it was."""
        del params, key
        exits = max(len(leaf) for leaf in jax.tree.leaves(per_exit_grads))
        weights = (1,) * exits if self.weights is None else self.weights
        if len(weights) != exits:
            raise ValueError(f"{exits} exits take {exits} weights in the sum, got {weights}")
        return combine(per_exit_grads, jnp.asarray(weights, jnp.float32)), state
