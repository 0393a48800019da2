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
    from dfs_jax.surgery import FeatureSurgery
    from dfs_jax.tracing import skip_dead_gradients

__version__ = "0.1.0"

_HOMES = {
    "EarlyExitPredictor": "dfs_jax.inference.predictor",
    "FeatureSurgery": "dfs_jax.surgery",
    "create_model": "dfs_jax.models",
    "load_exported": "dfs_jax.inference.exported",
    "skip_dead_gradients": "dfs_jax.tracing",
}

__all__ = [
    "EarlyExitPredictor",
    "FeatureSurgery",
    "create_model",
    "load_exported",
    "skip_dead_gradients",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
