"""What reads or rewrites a traced program."""

from dfs_jax.tracing.dead_gradients import skip_dead_gradients

__all__ = ["skip_dead_gradients"]
