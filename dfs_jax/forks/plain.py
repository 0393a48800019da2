"""The fork of an ordinary multi-exit network: both readers see, and train, the whole feature."""

from __future__ import annotations

import dataclasses

import jax

from dfs_jax.surgery import ExitFork


@dataclasses.dataclass(frozen=True)
class PlainFork:
    """Passes the feature on unchanged, its whole gradient included, to the exit and the next block.

    Example:
      >>> import jax.numpy as jnp
      >>> PlainFork()(jnp.ones((2, 3)), exit_index=0, num_exits=2).to_head.shape
      (2, 3)
    """

    def __call__(self, x: jax.Array, *, exit_index: int, num_exits: int) -> ExitFork:
        del exit_index, num_exits  # every exit is treated alike
        return ExitFork(x, x)
