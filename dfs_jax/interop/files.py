"""Reads and writes weights: safetensors, npz, and PyTorch's own format (reading only)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from dfs_jax.files import replacing
from dfs_jax.interop.torch_files import read_torch_file
from dfs_jax.interop.torch_names import (
    Key,
    check_names_and_shapes,
    convert_from_torch,
    family_of,
    flatten,
    inner_state_dict,
    unwrapped,
)
from dfs_jax.models.added_exits import BACKBONE
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.paths import local_path, reason
from dfs_jax.types import UserError

COLLECTIONS = ("params", "batch_stats")
STEP = "step"  # key of the checkpoint's step in the header of a run's weights


def load_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads named arrays from a `.safetensors`, `.npz`, `.pth` or `.pt` file.

    PyTorch's files are read without PyTorch, and without running any code that they contain; a
    state_dict inside a checkpoint is found. Parts of names added by
    module wrappers (`module.`, `_orig_mod.` and similar) are removed in every format.

    Returns:
      Arrays by name; `flax.traverse_util.unflatten_dict(flat, sep="/")` returns our variables.

    Raises:
      UserError: the file is missing, damaged, or of another kind.
    """
    path = local_path(path, "file of weights")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(
            f"{path}: cannot tell weights by the ending {path.suffix!r}, "
            f"which must be one of {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}: check the path")
    try:
        return unwrapped(reader(path))
    except UserError:
        raise
    except Exception as error:  # parsers raise exceptions of all types for damaged files
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} is damaged or not a {path.suffix} file ({said}): copy it again"
        ) from error


def save_weights(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes variables under flat names like `params/block1/conv/kernel`, atomically.

    Args:
      path: path that ends in `.safetensors` or `.npz`.
      variables: `{"params": ..., "batch_stats": ...}`.
      about: notes for the header (`weights_notes` reads them); only safetensors has one.

    Raises:
      UserError: another extension, or the file cannot be written.
    """
    path = local_path(path, "file of weights")
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise UserError(f"{path}: weights are written to {' or '.join(_WRITERS)}, rename the file")
    arrays = {"/".join(key): np.asarray(x, order="C") for key, x in flatten(variables).items()}
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            writer(file, arrays, dict(about or {}))
    except OSError as error:
        raise UserError(f"cannot write weights to {path}: {reason(error)}") from error


def weights_notes(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the notes in a file's header; empty for files without one."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError:  # reading the weights reports the error
        return {}


def load_trunk(
    path: str | os.PathLike[str], model: MultiExitModel, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Initialises the trunk, parameters and batch statistics, from any checkpoint.

    Args:
      path: file as in `load_weights`, with our flat names or the published PyTorch names; for a
        network with added exits, also with the names of the network itself.
      model: model of the `variables`.
      variables: `{"params": ..., "batch_stats": ...}`; heads are kept, even if the file has some.

    Returns:
      New variables, in the dtypes of the old ones.

    Raises:
      UserError: the file is missing or damaged, or its trunk does not fit; lists all missing,
        unexpected and misshapen names.
    """
    weights = load_weights(path)
    old = flatten(variables)
    shapes = {key: leaf.shape for key, leaf in old.items() if not _is_head(key)}
    # Our names may have a prefix, which the message about names that do not fit reports.
    ours = any(name.rpartition(".")[2].startswith(f"{COLLECTIONS[0]}/") for name in weights)
    read = _trunk_by_our_names if ours else _trunk_by_published_names
    trunk = read(model, shapes, weights, str(path))
    new = {key: jnp.asarray(leaf, old[key].dtype) for key, leaf in trunk.items()}
    return {**{key: {} for key in variables}, **traverse_util.unflatten_dict({**old, **new})}


def _is_head(key: Key) -> bool:
    return key[1].startswith("head")


def _trunk_by_our_names(
    model: MultiExitModel, shapes: Mapping[Key, Any], weights: Mapping[str, np.ndarray], path: str
) -> dict[Key, np.ndarray]:
    flat = {tuple(name.split("/")): array for name, array in weights.items()}
    if not model.runs_in_blocks and all(BACKBONE not in key for key in flat):
        flat = {(key[0], BACKBONE, *key[1:]): array for key, array in flat.items()}
    flat = {key: array for key, array in flat.items() if len(key) < 2 or not _is_head(key)}
    check_names_and_shapes(
        {"/".join(key): shape for key, shape in shapes.items()},
        {"/".join(key): array.shape for key, array in flat.items()},
        path,
    )
    return flat


def _trunk_by_published_names(
    model: MultiExitModel, shapes: Mapping[Key, Any], weights: Mapping[str, np.ndarray], path: str
) -> dict[Key, np.ndarray]:
    family = family_of(model)
    entries = [entry for entry in family.entries(model) if not _is_head(entry.path)]
    trunk = {
        name: array for name, array in weights.items() if not name.startswith(family.head_prefixes)
    }
    return convert_from_torch(entries, shapes, trunk, partition_ratio=None, what=path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # Opened here, because np.load does not close a damaged file.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = read_torch_file(path)
    except pickle.UnpicklingError as error:
        if "nsupported" not in str(error):  # "Unsupported global ...": anything else is damage
            raise
        raise UserError(
            f"{path} holds more than weights, which is not read because it can run code: save "
            f"model.state_dict() instead of the model"
        ) from error
    weights = inner_state_dict(loaded) if isinstance(loaded, Mapping) else {}
    arrays = {name: x for name, x in weights.items() if isinstance(x, np.ndarray)}
    if not arrays:
        found = ", ".join(map(str, weights)) or type(loaded).__name__
        raise UserError(f"{path} holds no state_dict that can be found, but {found[:200]}")
    return arrays


def _write_safetensors(
    file: BinaryIO, arrays: dict[str, np.ndarray], about: dict[str, str]
) -> None:
    file.write(safetensors.numpy.save(arrays, metadata=about or None))


def _write_npz(file: BinaryIO, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    del about
    np.savez(file, **arrays)  # type: ignore[arg-type]


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": safetensors.numpy.load_file,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
_WRITERS: dict[str, Callable[[BinaryIO, dict[str, np.ndarray], dict[str, str]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
}
