"""Converts weights and gradients between published PyTorch names and layouts, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np
from flax import traverse_util

from dfs_jax.interop.entries import INPUT_AXIS, Entry, Family
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.registry import Registry
from dfs_jax.surgery import partition_channels
from dfs_jax.types import UserError

# Families by the name of a model's class or of a base class.
FAMILIES = Registry(
    "family of published weights",
    {
        "EfficientNetLite": "dfs_jax.interop.efficientnet:FAMILY",
        "MSDNet": "dfs_jax.interop.msdnet:FAMILY",
        "ResNet": "dfs_jax.interop.resnet:FAMILY",
        "VGG": "dfs_jax.interop.vgg:FAMILY",
        "ViT": "dfs_jax.interop.vit:FAMILY",
    },
)

Key = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]
COUNTER = "num_batches_tracked"  # PyTorch's count of updates, which our models do not use
# Parts of names that wrappers add: data parallel and distributed modules, compiled modules, shards,
# checkpointed blocks and engines.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
# Keys under which checkpoints of training programs store the weights.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "model_ema", "ema")


def from_torch_state_dict(
    model: MultiExitModel,
    state_dict: Mapping[str, Any],
    *,
    partition_ratio: float | None = 0.5,
    image_shape: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Converts published weights to our variables.

    Convolutions go from OIHW to HWIO, linear layers from [out, in] to [in, out], a BatchNorm's
    weight, bias, running_mean and running_var to scale, bias, mean and var; a weight published in
    halves becomes [shared | exit-specific] along its input axis.

    Args:
      model: model of a family with published names.
      state_dict: PyTorch name -> array or tensor. Counts of batches are ignored, and so are the
        parts of names that wrappers add, such as `module.` and `_orig_mod.`; a state_dict inside
        a checkpoint is found.
      partition_ratio: beta, which determines the widths of halves; None accepts any width.
      image_shape: `(height, width, channels)` of the images; None for the published model's.

    Returns:
      `{"params": ..., "batch_stats": ...}` of NumPy arrays, in the dtypes of `state_dict`.

    Raises:
      UserError: the model has no published names, or names or shapes differ (all are listed).
    """
    family = family_of(model)
    shapes = _variable_shapes(model, image_shape or family.image_shape)
    flat = convert_from_torch(
        family.entries(model),
        shapes,
        unwrapped(inner_state_dict(state_dict)),
        partition_ratio,
        what="state_dict",
    )
    return {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(flat)}


def to_torch_state_dict(
    model: MultiExitModel, variables: Mapping[str, Any], *, partition_ratio: float = 0.5
) -> dict[str, np.ndarray]:
    """Converts our variables to published names and layouts; inverts `from_torch_state_dict`.

    Weights published in halves are split at `round(beta * C)`; counts of batches are written as 0.

    Args:
      model: model of a family with published names.
      variables: `{"params": ..., "batch_stats": ...}`.
      partition_ratio: beta.

    Raises:
      UserError: the model has no published names, or the variables are not this model's.
    """
    entries = family_of(model).entries(model)
    state_dict = {}
    for name, array in _convert_to_torch(entries, variables, partition_ratio):
        state_dict[name] = array
        if name.endswith(".running_var"):
            state_dict[name.removesuffix("running_var") + COUNTER] = np.zeros((), np.int64)
    return state_dict


def to_torch_gradients(
    model: MultiExitModel, gradients: Mapping[str, Any], *, partition_ratio: float = 0.5
) -> dict[str, np.ndarray]:
    """Converts gradients with the structure of `params` to published names and layouts.

    Args and Raises as in `to_torch_state_dict`; there are no running statistics.
    """
    entries = [e for e in family_of(model).entries(model) if e.path[0] == "params"]
    return dict(_convert_to_torch(entries, {"params": gradients}, partition_ratio))


def family_of(model: MultiExitModel) -> Family:
    """Returns the published names of the model's family, found by its class or a base class.

    Raises:
      UserError: the model has no published names.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES.table:
            return cast(Family, FAMILIES.resolve(cls.__name__))
    known = ", ".join(sorted(FAMILIES.table))
    raise UserError(
        f"{type(model).__name__} has no published PyTorch names: only models of {known} have"
    )


def flatten(variables: Mapping[str, Any]) -> dict[Key, Any]:
    """Returns leaves by path, with the collection first."""
    return cast(dict[Key, Any], traverse_util.flatten_dict(dict(variables)))


def inner_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the state_dict inside a training program's checkpoint, at any depth.

    >>> inner_state_dict({"epoch": 3, "model": {"state_dict": {"fc.bias": 0}}})
    {'fc.bias': 0}
    """
    for key in _NESTED:
        if isinstance(checkpoint.get(key), Mapping):
            return inner_state_dict(checkpoint[key])
    return checkpoint


def unwrapped(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the parts of names that wrappers of PyTorch modules add, anywhere in the names.

    Names are unchanged if two of them would become equal.

    >>> unwrapped({"_orig_mod.module.stem.weight": 0, "_orig_mod.module.block._orig_mod.bias": 1})
    {'stem.weight': 0, 'block.bias': 1}
    """
    plain = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): value
        for name, value in weights.items()
    }
    return plain if len(plain) == len(weights) and "" not in plain else dict(weights)


def is_counter(name: str) -> bool:
    """Returns whether a PyTorch name is that of a count of batches."""
    return name.rpartition(".")[2] == COUNTER


def check_names_and_shapes(expected: Shapes, given: Shapes, what: str) -> None:
    """Raises UserError with every missing, unexpected and misshapen name of `what`."""
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(given[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & given.keys())
        if tuple(given[name]) != tuple(expected[name])
    ]
    lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    told = [f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names]
    if told:
        told = _common_prefix(expected, given) + told
        raise UserError(f"{what} does not fit the model, nothing was loaded; {'; '.join(told)}")


def _common_prefix(expected: Shapes, given: Shapes) -> list[str]:
    """Describes the longest common prefix of all names without which some are expected."""
    parts = next(iter(given), "").split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length]) + "."
        fitting = sum(name.removeprefix(prefix) in expected for name in given)
        if fitting and all(name.startswith(prefix) for name in given):
            return [
                f"all names begin with {prefix!r}, without which {fitting} of {len(expected)} "
                f"would fit: remove it from the names"
            ]
    return []


def convert_from_torch(
    entries: Iterable[Entry],
    shapes: Mapping[Key, tuple[int, ...]],
    state_dict: Mapping[str, Any],
    partition_ratio: float | None,
    what: str,
) -> dict[Key, np.ndarray]:
    """Returns path -> array for `entries`, whose shapes in our model are `shapes`.

    Raises:
      UserError: names or shapes of `what` (the `state_dict`) differ; counters are ignored.
    """
    entries = list(entries)
    given = {name: _to_numpy(x) for name, x in state_dict.items() if not is_counter(name)}

    def boundary(entry: Entry, channels: int) -> int:
        if partition_ratio is not None:
            return partition_channels(channels, partition_ratio)
        half = given.get(entry.names[0])
        if half is None or half.ndim <= INPUT_AXIS:
            return channels  # missing or misshapen, which is reported below
        return min(half.shape[INPUT_AXIS], channels)

    expected = {
        name: part.shape
        for entry in entries
        for name, part in _parts(entry, np.broadcast_to(0, shapes[entry.path]), boundary)
    }
    check_names_and_shapes(expected, {name: x.shape for name, x in given.items()}, what)
    return {entry.path: _joined(entry, given) for entry in entries}


def _convert_to_torch(
    entries: list[Entry], variables: Mapping[str, Any], partition_ratio: float
) -> Iterable[tuple[str, np.ndarray]]:
    flat = flatten(variables)
    paths = {"/".join(entry.path): () for entry in entries}
    check_names_and_shapes(paths, {"/".join(path): () for path in flat}, "the tree of variables")
    for entry in entries:
        yield from _parts(
            entry,
            np.asarray(flat[entry.path]),
            lambda _, channels: partition_channels(channels, partition_ratio),
        )


def _parts(
    entry: Entry, ours: np.ndarray, boundary: Callable[[Entry, int], int]
) -> list[tuple[str, np.ndarray]]:
    """Returns (name, array) of the published tensor, or of its two halves."""
    whole = entry.layout.to_torch(ours)
    if len(entry.names) == 1:
        return [(entry.names[0], whole)]
    cut = boundary(entry, whole.shape[INPUT_AXIS])
    return list(zip(entry.names, np.split(whole, [cut], axis=INPUT_AXIS), strict=True))


def _joined(entry: Entry, given: Mapping[str, np.ndarray]) -> np.ndarray:
    parts = [given[name] for name in entry.names]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=INPUT_AXIS)
    return np.ascontiguousarray(entry.layout.to_ours(whole))


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, which may require gradients or be on a GPU
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _variable_shapes(
    model: MultiExitModel, image_shape: tuple[int, int, int]
) -> dict[Key, tuple[int, ...]]:
    variables = jax.eval_shape(
        lambda key: init_variables(model, key, image_shape), jax.random.key(0)
    )
    return {path: leaf.shape for path, leaf in flatten(variables).items()}
