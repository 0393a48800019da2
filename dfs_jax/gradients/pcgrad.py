"""PCGrad: removes from each exit's gradient its components against those of other exits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.gradients.combiner import GramCombiner
from dfs_jax.gradients.gram import (
    count_gradients,
    inverse_norms,
    norms_and_cosines,
)

SCALINGS = ("sum", "mean")


@dataclasses.dataclass(frozen=True)
class PCGrad(GramCombiner):
    """Projects conflicting gradients onto each other's normal planes, then sums them.

        for each exit i, for the other exits j in random order:
            p_i <- p_i - min(0, <p_i, g_j>) / ||g_j||^2 g_j          beginning with p_i = g_i
        combined = sum_i p_i

    The g_j are the gradients before any projection.

    Args:
      scaling: "sum" as in the paper and its code, or "mean" as in its common PyTorch version.

    Raises:
      ValueError: an unknown scaling.

    Reference: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.

    Example: (1, 0) and (-1, 1) become (1/2, 1/2) and (0, 1).
      >>> grads = {"block1": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> PCGrad().update(grads, (), None, key=jax.random.key(0))[0]["block1"].round(5)
      Array([0.5, 1.5], dtype=float32)
    """

    scaling: str = "sum"

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")

    def weights(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weights of the projected gradients' sum, in terms of the gradients."""
        norms, cosines = norms_and_cosines(gram)
        exits = len(norms)
        numbers = jnp.broadcast_to(jnp.arange(exits), (exits, exits))
        orders = jax.random.permutation(key, numbers, axis=1, independent=True)
        # Row i holds p_i / ||g_i|| in terms of the unit gradients.
        projected = jax.vmap(_project, (0, 0, None))(jnp.eye(exits), orders, cosines)
        weights = (norms @ projected) * inverse_norms(norms)
        return weights / count_gradients(norms) if self.scaling == "mean" else weights


def _project(unit: jax.Array, order: jax.Array, cosines: jax.Array) -> jax.Array:
    """Returns a gradient after successive projections; the one for itself has no effect."""

    def step(k: jax.Array, p: jax.Array) -> jax.Array:
        j = order[k]
        against = jnp.minimum(p @ cosines[j], 0) * (1 - unit[j])
        return p.at[j].add(-against)

    return lax.fori_loop(0, len(unit), step, unit)
