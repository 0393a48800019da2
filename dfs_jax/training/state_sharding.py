"""Shardings of parameters and of all that is shaped like them, by one rule on path and shape.

    tensor   splits the axis that the model names for the parameter (`tensor_axes`)
    fsdp     splits the largest remaining axis that divides evenly, of large arrays only

Optimizer and rule states, averaged weights and gradients hold arrays with the names and shapes of
the parameters, so that the same rule gives them the same shardings. All else is replicated.

Arrays split along `fsdp` are gathered before layers use them. Otherwise the compiler would split
layers like their parameters, and gather the features of the batch, which are larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dfs_jax.models.contract import TENSOR_AXIS, MultiExitModel
from dfs_jax.training.sharding import FSDP_AXIS
from dfs_jax.types import PyTree, UserError

# Elements. For smaller arrays, the latency of a gather dominates and little memory is saved.
LEAST_SPLIT = 2**12


def is_split(mesh: Mesh) -> bool:
    """Returns whether some arrays are split over devices."""
    return mesh.shape.get(FSDP_AXIS, 1) > 1 or mesh.shape.get(TENSOR_AXIS, 1) > 1


def tree_shardings(
    tree: PyTree,
    mesh: Mesh,
    tensor_axes: Mapping[str, int],
    *,
    leading: int = 0,
    gathered: bool = False,
) -> PyTree:
    """Returns the shardings of a tree of parameters, or of a tree that contains such trees.

    Args:
      tree: tree of arrays or their shapes.
      mesh: device mesh.
      tensor_axes: axis that is split along `tensor`, by path, see `MultiExitModel.tensor_axes`.
      leading: number of axes before those of the parameters, which are never split: 1 for
        gradients by exit.
      gathered: whether arrays are whole along `fsdp`, as layers use them.
    """
    fsdp = 1 if gathered else mesh.shape.get(FSDP_AXIS, 1)
    tensor = mesh.shape.get(TENSOR_AXIS, 1)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes: list[str | None] = [None] * len(leaf.shape)
        _split_tensor(axes, name, leaf.shape, tensor, tensor_axes)
        _split_fsdp(axes, leaf.shape, fsdp, leading)
        return NamedSharding(mesh, PartitionSpec(*axes) if any(axes) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain(
    tree: PyTree,
    mesh: Mesh | None,
    model: MultiExitModel,
    *,
    leading: int = 0,
    gathered: bool = False,
) -> PyTree:
    """Constrains a tree to its `tree_shardings`, inside a compiled step."""
    if mesh is None or not is_split(mesh):
        return tree
    shardings = tree_shardings(tree, mesh, model.tensor_axes, leading=leading, gathered=gathered)
    return lax.with_sharding_constraint(tree, shardings)


def scatter(grads: PyTree, mesh: Mesh | None, model: MultiExitModel, *, leading: int = 0) -> PyTree:
    """Sums gradients over the devices' examples and shards them like their parameters."""
    summed = constrain(grads, mesh, model, leading=leading, gathered=True)
    return constrain(summed, mesh, model, leading=leading)


def check_split(params: PyTree, mesh: Mesh, model: MultiExitModel) -> None:
    """Raises UserError if an axis of the mesh would split nothing of the model.

    Args:
      params: parameters of the model, or their shapes.
      mesh: device mesh.
      model: model, which names the axes that can be split along `tensor`.
    """
    parts = mesh.shape.get(TENSOR_AXIS, 1)
    if parts > 1 and not model.tensor_axes:
        raise UserError(
            f"mesh.tensor={parts} is for models that say how their layers are split, as ViT does, "
            f"not for {type(model).__name__}: use mesh.fsdp"
        )
    shardings = tree_shardings(params, mesh, model.tensor_axes)
    used = {axis for sharding in jax.tree.leaves(shardings) for axis in sharding.spec}
    for axis in (FSDP_AXIS, TENSOR_AXIS):
        if mesh.shape.get(axis, 1) > 1 and axis not in used:
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]} splits nothing: no parameter of "
                f"{type(model).__name__} is large enough and divisible by it: use mesh.data"
            )


def _split_tensor(
    axes: list[str | None],
    name: str,
    shape: tuple[int, ...],
    parts: int,
    tensor_axes: Mapping[str, int],
) -> None:
    if parts == 1:
        return
    for end, axis in tensor_axes.items():
        if f"/{name}".endswith(f"/{end}") and len(shape) >= -axis and shape[axis] % parts == 0:
            axes[axis] = TENSOR_AXIS


def _split_fsdp(axes: list[str | None], shape: tuple[int, ...], parts: int, leading: int) -> None:
    if parts == 1 or math.prod(shape[leading:]) < LEAST_SPLIT:
        return
    free = [i for i in range(leading, len(shape)) if axes[i] is None and shape[i] % parts == 0]
    if free:
        axes[max(free, key=lambda i: (shape[i], i))] = FSDP_AXIS
