"""Early-exit inference: policies that choose the exit, and predictors that stop there.

The names below are imported on first use: those that read an ONNX export do not need jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfs_jax.inference.anytime import AnytimePredictor
    from dfs_jax.inference.exported import load_exported
    from dfs_jax.inference.policy import Policy, read_policy
    from dfs_jax.inference.predictor import EarlyExitPredictor

_HOMES = {
    "AnytimePredictor": "dfs_jax.inference.anytime",
    "EarlyExitPredictor": "dfs_jax.inference.predictor",
    "Policy": "dfs_jax.inference.policy",
    "load_exported": "dfs_jax.inference.exported",
    "read_policy": "dfs_jax.inference.policy",
}

__all__ = [
    "AnytimePredictor",
    "EarlyExitPredictor",
    "Policy",
    "load_exported",
    "read_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
