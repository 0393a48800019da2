"""Names and checksum of the weights of stages that are JAX functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dfs_jax.inference.stages import Stage


def named_weights(stage: Stage) -> dict[str, np.ndarray]:
    """Returns a stage's weights under names such as `params/block1/conv/kernel`.

    Args:
      stage: a `jax.tree_util.Partial` whose weights are leaves; other callables have no weights.
    """
    leaves = jax.tree_util.tree_flatten_with_path(stage)[0]
    return {
        weight_name(path): np.asarray(leaf, order="C")
        for path, leaf in leaves
        if hasattr(leaf, "dtype")
    }


def weight_name(path: Sequence[Any]) -> str:
    """Returns a leaf's name: the dictionary keys on its path, joined by slashes."""
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return "/".join(map(str, keys))


def weights_fingerprint(stages: Sequence[Stage]) -> str | None:
    """Returns a checksum of a network's weights, the same before and after export.

    None for stages whose weights are not leaves.
    """
    weights = {name: array for stage in stages for name, array in named_weights(stage).items()}
    if not weights:
        return None
    checksum = hashlib.sha256()
    for name, array in sorted(weights.items()):
        checksum.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        checksum.update(array.tobytes())
    return checksum.hexdigest()
