"""Transformations of traced functions, see `docs/architecture.md`."""

from dfs_jax.tracing.dead_gradients import skip_dead_gradients
from dfs_jax.tracing.exit_markers import exit_logits, with_exit_logits
from dfs_jax.tracing.stages_of import stages_of

__all__ = ["exit_logits", "skip_dead_gradients", "stages_of", "with_exit_logits"]
