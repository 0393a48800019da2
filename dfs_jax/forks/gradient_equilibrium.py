"""Gradient equilibrium: features are unchanged, gradients are scaled to limit their sum."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from dfs_jax.surgery import ExitFork


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x`, bit for bit, whose derivative is `factor` times the identity.

    In both modes, and again in derivatives of derivatives: as `factor * x` and a constant would.

    >>> float(jax.grad(lambda x: scale_gradient(x, 0.25))(3.0))
    0.25
    """
    del factor
    return x


@scale_gradient.defjvp
def _scale_tangent(factor: float, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    return scale_gradient(x, factor), factor * dx


@dataclasses.dataclass(frozen=True)
class GradientEquilibrium:
    """Scales the gradients that come back to a feature, at exit i (0-based) of L:

        from exit i           1 / (L - i)
        from the next block   (L - i - 1) / (L - i)

    so that a block's gradient is a mean of the exits beyond it, not their sum: its size does not
    grow with their number. The exits' own parameters keep their gradients. The last exit is left
    alone.

    Reference: Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(x):
      ...     forked = GradientEquilibrium()(x, exit_index=0, num_exits=4)
      ...     return 100 * forked.to_head.sum() + forked.to_trunk.sum()
      >>> jax.grad(loss)(jnp.ones(2))
      Array([25.75, 25.75], dtype=float32)
    """

    def __call__(self, x: jax.Array, *, exit_index: int, num_exits: int) -> ExitFork:
        """Forks `x` `[..., channels]` at exit `exit_index` of `num_exits` (0-based)."""
        left = num_exits - exit_index
        if left == 1:
            return ExitFork(x, x)
        return ExitFork(scale_gradient(x, 1 / left), scale_gradient(x, (left - 1) / left))
