"""Multi-exit networks in JAX, trained with Deep Feature Surgery and other methods.

The names below are imported on first use, so that `import dfs_jax` is fast.

Example:
  >>> import dfs_jax
  >>> dfs_jax.FeatureSurgery(partition_ratio=0.25).referencing
  'symmetric'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfs_jax.inference.exported import load_exported
    from dfs_jax.inference.predictor import EarlyExitPredictor
    from dfs_jax.models import create_model
    from dfs_jax.models.added_exits import add_exits
    from dfs_jax.surgery import FeatureSurgery
    from dfs_jax.tracing import exit_logits, skip_dead_gradients, stages_of, with_exit_logits

__version__ = "0.1.0"

_HOMES = {
    "EarlyExitPredictor": "dfs_jax.inference.predictor",
    "FeatureSurgery": "dfs_jax.surgery",
    "add_exits": "dfs_jax.models.added_exits",
    "create_model": "dfs_jax.models",
    "exit_logits": "dfs_jax.tracing",
    "load_exported": "dfs_jax.inference.exported",
    "skip_dead_gradients": "dfs_jax.tracing",
    "stages_of": "dfs_jax.tracing",
    "with_exit_logits": "dfs_jax.tracing",
}

__all__ = [
    "EarlyExitPredictor",
    "FeatureSurgery",
    "add_exits",
    "create_model",
    "exit_logits",
    "load_exported",
    "skip_dead_gradients",
    "stages_of",
    "with_exit_logits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
