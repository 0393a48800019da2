"""CAGrad: the direction near the mean gradient that maximises the smallest gain of an exit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.gradients.combiner import GramCombiner

SCALINGS = ("sum", "released", "paper")
ITERATIONS = 100
# Relative to the mean square norm of the gradients: below it, their inner products are noise.
NOISE = 1e-7


@dataclasses.dataclass(frozen=True)
class CAGrad(GramCombiner):
    """Maximises the smallest gain over the exits within a ball around the mean gradient.

        d = argmax_d min_i <g_i, d>   subject to   ||d - g_0|| <= c ||g_0||,   g_0 = mean_i g_i
          = g_0 + c ||g_0|| / ||g_w|| g_w,   g_w = sum_i w_i g_i
        w = argmin over the simplex of   <g_w, g_0> + c ||g_0|| ||g_w||

    Exits whose gradient is zero are omitted from the mean and the minimum. The dual is solved by
    pairwise Frank-Wolfe steps with exact line search.

    Args:
      radius: c in [0, 1); 0 is the plain sum (scaled).
      scaling: factor of d, for L exits: "sum" L / (1 + c), so that equal gradients give
        their sum; "released" L / (1 + c^2), as in the published training code; "paper" 1.

    Raises:
      ValueError: an argument outside its range.

    Reference: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021.

    Example: (1, 0) and (0, 1) have equal gains.
      >>> grads = {"block1": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> CAGrad().update(grads, (), None, key=jax.random.key(0))[0]["block1"].round(5)
      Array([1., 1.], dtype=float32)
    """

    radius: float = 0.4
    scaling: str = "sum"

    def __post_init__(self):
        if not 0 <= self.radius < 1:
            raise ValueError(f"radius must lie in [0, 1), got {self.radius!r}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")

    def weights(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weights of d, scaled, in terms of the gradients."""
        del key
        active = jnp.diag(gram) > 0
        count = jnp.maximum(active.sum(), 1)
        gram = gram * count / jnp.where(active.any(), jnp.trace(gram), 1)
        mean = active / count
        reach = self.radius * jnp.sqrt(jnp.maximum(mean @ gram @ mean, 0))
        dual = _minimise(gram, mean, reach)
        norm = jnp.sqrt(jnp.maximum(dual @ gram @ dual, NOISE))
        weights = mean + reach / norm * dual
        return weights * self._factor(count)

    def _factor(self, count: jax.Array) -> jax.Array:
        divisors = {"sum": 1 + self.radius, "released": 1 + self.radius**2, "paper": count}
        return count / divisors[self.scaling]


def _minimise(gram: jax.Array, mean: jax.Array, reach: jax.Array) -> jax.Array:
    """Returns the least `<g_w, g_0> + reach ||g_w||`'s w on the simplex, 0 where the mean is 0.

    Each step moves weight from the exit where the slope is largest to that where it is smallest.
    """
    to_mean = gram @ mean

    def step(_: jax.Array, w: jax.Array) -> jax.Array:
        image = gram @ w
        square = jnp.maximum(w @ image, NOISE)
        slopes = to_mean + reach * image / jnp.sqrt(square)
        better = jnp.argmin(jnp.where(mean > 0, slopes, jnp.inf))
        worse = jnp.argmax(jnp.where(w > 0, slopes, -jnp.inf))
        direction = gram[better] - gram[worse]
        moved = _line_minimum(
            to_mean[better] - to_mean[worse],
            reach,
            square,
            image[better] - image[worse],
            direction[better] - direction[worse],
        )
        moved = jnp.clip(moved, 0, w[worse])
        return w.at[worse].add(-moved).at[better].add(moved)

    return lax.fori_loop(0, ITERATIONS, step, mean)


def _line_minimum(
    slope: jax.Array, reach: jax.Array, square: jax.Array, cross: jax.Array, curvature: jax.Array
) -> jax.Array:
    """Returns the t with the least `slope t + reach sqrt(square + 2 cross t + curvature t^2)`.

    Infinite where there is none. With t = s - cross / curvature the root is
    sqrt(curvature (s^2 + distance^2)), a hyperbola, and its slope is reached at one s.
    """
    tiny = jnp.finfo(square.dtype).tiny
    curvature = jnp.maximum(curvature, NOISE**2)
    distance = jnp.sqrt(jnp.maximum(square - cross**2 / curvature, 0) / curvature)
    steepness = -slope / jnp.maximum(reach * jnp.sqrt(curvature), tiny)
    inside = jnp.sqrt(jnp.maximum(1 - steepness**2, tiny))
    end = jnp.where(slope < 0, jnp.inf, -jnp.inf)
    return jnp.where(jnp.abs(steepness) < 1, steepness * distance / inside, end) - cross / curvature
