"""Early-exit inference: policies that choose the exit, and predictors that stop there."""

from dfs_jax.inference.anytime import AnytimePredictor
from dfs_jax.inference.exported import load_exported
from dfs_jax.inference.policy import Policy, read_policy
from dfs_jax.inference.predictor import EarlyExitPredictor

__all__ = [
    "AnytimePredictor",
    "EarlyExitPredictor",
    "Policy",
    "load_exported",
    "read_policy",
]
