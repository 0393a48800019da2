"""UPGrad: each exit's gradient is changed as little as possible until it hurts no exit."""

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
ITERATIONS = 25
# Added to the squares of the unit gradients: rounding must not make the problem non-convex.
RIDGE = 1e-6
# Each step aims at this part of the complementarity, and goes this part of the way to the boundary.
CENTRING, STEP = 0.1, 0.95


@dataclasses.dataclass(frozen=True)
class UPGrad(GramCombiner):
    """Projects each gradient onto the directions that conflict with no exit, then adds them up.

        combined = sum_i argmin_x ||x - g_i||^2   subject to   <g_j, x> >= 0 for every exit j

    so that the combined gradient conflicts with no exit either. Each projection is a quadratic
    programme in the exits' weights, solved by an interior-point method.

    Args:
      scaling: "sum", or "mean" as in the paper.

    Raises:
      ValueError: an unknown scaling.

    Reference: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024
    (arXiv 2406.16232).

    Example: (1, 0) and (-1, 1) become (1/2, 1/2) and (0, 1).
      >>> grads = {"block1": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> UPGrad().update(grads, (), None, key=jax.random.key(0))[0]["block1"].round(4)
      Array([0.5, 1.5], dtype=float32)
    """

    scaling: str = "sum"

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")

    def weights(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weights of the projected gradients' sum, in terms of the gradients."""
        del key
        norms, cosines = norms_and_cosines(gram)
        units = jnp.eye(len(norms), dtype=cosines.dtype)
        projected = jax.vmap(_project, (0, None))(units, cosines)
        weights = (norms @ projected) * inverse_norms(norms)
        return weights / count_gradients(norms) if self.scaling == "mean" else weights


def _project(unit: jax.Array, cosines: jax.Array) -> jax.Array:
    """Returns the projection of one unit gradient in terms of all: the v >= unit with least v'Cv.

    Primal-dual interior point for u = v - unit >= 0 and its slopes s = C (u + unit) >= 0, whose
    products go to zero. Once they are as small as rounding allows, steps stop to make sense and are
    not taken.
    """
    matrix = cosines + RIDGE * jnp.eye(len(unit), dtype=cosines.dtype)
    constant = matrix @ unit

    def step(_: jax.Array, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, s = point
        target = CENTRING * jnp.mean(u * s)
        residual = matrix @ u + constant - s
        system = matrix + jnp.diag(s / u)
        du = jax.scipy.linalg.solve(system, target / u - s - residual, assume_a="pos")
        ds = matrix @ du + residual
        steepest = jnp.maximum(jnp.max(-du / u), jnp.max(-ds / s))
        length = jnp.minimum(1, STEP / jnp.maximum(steepest, STEP))
        new = u + length * du, s + length * ds
        is_fine = jnp.all(jnp.isfinite(new[0]) & jnp.isfinite(new[1]) & (new[0] > 0) & (new[1] > 0))
        return jnp.where(is_fine, new[0], u), jnp.where(is_fine, new[1], s)

    start = jnp.ones_like(unit)
    u, _ = lax.fori_loop(0, ITERATIONS, step, (start, jnp.maximum(matrix @ start + constant, 1)))
    return unit + u
