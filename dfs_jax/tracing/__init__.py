"""Transformations of traced JAX programs."""

from dfs_jax.tracing.dead_gradients import skip_dead_gradients

__all__ = ["skip_dead_gradients"]
