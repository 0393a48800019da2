"""Weights from and to other programs; `python -m dfs_jax.interop check` compares results."""

from dfs_jax.interop.files import load_trunk, load_weights, save_weights
from dfs_jax.interop.torch_names import (
    from_torch_state_dict,
    to_torch_gradients,
    to_torch_state_dict,
)

__all__ = [
    "from_torch_state_dict",
    "load_trunk",
    "load_weights",
    "save_weights",
    "to_torch_gradients",
    "to_torch_state_dict",
]
