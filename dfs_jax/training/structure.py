"""Compares a checkpoint's shapes and types with a run's state, to tell a mismatch from damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dfs_jax.types import PyTree

# Maps a leaf's name, such as "params/block1/conv/kernel", to its type and shape.
Structure = dict[str, str]


def structure_of(tree: PyTree) -> Structure:
    """Returns the type and shape of every leaf of a pytree.

    Example:
      >>> structure_of({"w": np.zeros((3, 5), np.float32), "none": None})
      {'w': 'float32 [3, 5]'}
    """
    return {
        _name(path): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def saved_structure(state_directory: Path) -> Structure:
    """Returns the type and shape of every leaf of a saved state, without reading the arrays.

    Raises:
      Exception: of various types, if files are missing or damaged.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
        metadata: Any = handler.metadata(epath.Path(state_directory))
    finally:
        handler.close()
    return structure_of(metadata.tree)


def difference(saved: Mapping[str, str], needed: Mapping[str, str]) -> str | None:
    """Describes the difference of the first leaf that differs; None if all agree.

    Example:
      >>> difference({"w": "float32 [3, 5]"}, {"w": "float32 [3, 7]"})
      'w is float32 [3, 5] there and float32 [3, 7] in this run'
    """
    absent = "absent"
    different = [name for name in sorted({*saved, *needed}) if saved.get(name) != needed.get(name)]
    if not different:
        return None
    # Parameters of the network are named first, since the optimizer's state follows from them.
    first = min(different, key=lambda name: (not name.startswith("params/"), name))
    others = f" ({len(different) - 1} more differ)" if len(different) > 1 else ""
    return (
        f"{first} is {saved.get(first, absent)} there and {needed.get(first, absent)} in this run"
        f"{others}"
    )


def _name(path: tuple[Any, ...]) -> str:
    """Returns a leaf's path, independent of the kinds of its containers."""
    return "/".join(str(_key(entry)) for entry in path)


def _key(entry: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry
