"""Nash-MTL: the direction of the Nash bargaining solution between the exits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.gradients.combiner import GramCombiner
from dfs_jax.gradients.gram import inverse_norms, norms_and_cosines

ITERATIONS = 30
# Added to the squares of the unit gradients: keeps weights finite where no bargain exists.
RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class NashMTL(GramCombiner):
    """Takes the Nash bargaining solution: the direction with the largest product of gains.

        combined = sqrt(||G||_F) sum_i alpha_i g_i,   G alpha = 1 / alpha,   alpha > 0

    where G holds the gradients' inner products. The direction does not change when an exit's loss
    is scaled. Its length is that of the published code, which divides G by its Frobenius norm:
    L equal gradients give their sum, and no combination is longer than sqrt(L ||G||_F). Where no
    bargain exists (some weighted mean of the gradients is zero), a small ridge bounds the weights.

    alpha minimises 1/2 alpha' G alpha - sum_i log alpha_i, which is convex and self-concordant:
    damped Newton steps always converge. (The published code approaches it by a sequence of convex
    problems.)

    Args:
      max_norm: largest norm of the combined gradient, 1 in the published code; None for no limit.

    Raises:
      ValueError: a length that is not above 0.

    Reference: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.

    Example: orthogonal gradients get the same length.
      >>> grads = {"block1": jnp.array([[4.0, 0.0], [0.0, 3.0]])}
      >>> combined, _ = NashMTL().update(grads, (), None, key=jax.random.key(0))
      >>> (combined["block1"] / combined["block1"][0]).round(3)
      Array([1., 1.], dtype=float32)
    """

    max_norm: float | None = None

    def __post_init__(self):
        if self.max_norm is not None and not 0 < self.max_norm < float("inf"):
            raise ValueError(f"max_norm must be finite and above 0, got {self.max_norm!r}")

    def weights(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weights, scaled."""
        del key
        norms, cosines = norms_and_cosines(gram)
        scale = jnp.sqrt(jnp.linalg.norm(gram))
        weights = scale * bargain(cosines) * inverse_norms(norms)
        if self.max_norm is None:
            return weights
        length = jnp.sqrt(jnp.maximum(weights @ gram @ weights, 0))
        return weights * jnp.minimum(1, self.max_norm * inverse_norms(length))


def bargain(cosines: jax.Array) -> jax.Array:
    """Returns the alpha > 0 with C alpha = 1 / alpha, for the cosines C of unit gradients.

    Example:
      >>> bargain(jnp.ones((4, 4))).round(4)
      Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """
    identity = jnp.eye(len(cosines), dtype=cosines.dtype)
    matrix = cosines + RIDGE * identity

    def step(_: jax.Array, alpha: jax.Array) -> jax.Array:
        """One Newton step for log-like coordinates alpha (1 + t), damped far from the solution."""
        scaled = alpha[:, None] * matrix * alpha
        hessian = scaled + identity
        gradient = scaled.sum(axis=1) - 1
        newton = -jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
        decrement = jnp.sqrt(jnp.maximum(-newton @ gradient, 0))
        return alpha * (1 + jnp.where(decrement < 0.25, 1, 1 / (1 + decrement)) * newton)

    start = 1 / jnp.sqrt(jnp.abs(matrix).sum(axis=1))
    return lax.fori_loop(0, ITERATIONS, step, start)
