"""The device mesh, shardings of batches, and compilation for the mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dfs_jax.models.contract import TENSOR_AXIS, MultiExitModel
from dfs_jax.tracing.cpu import compiler_options
from dfs_jax.tracing.for_cpu import for_cpu
from dfs_jax.types import PyTree, UserError, check_whole

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"
AXES = (DATA_AXIS, FSDP_AXIS, TENSOR_AXIS)
# Axes whose devices have different examples.
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
THE_REST = -1
_DEFAULTS = {DATA_AXIS: THE_REST, FSDP_AXIS: 1, TENSOR_AXIS: 1}


def create_mesh(
    section: Mapping[str, Any] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns the mesh over all devices of all processes.

    Args:
      section: section `mesh` of a config, the number of devices along each axis, see `mesh_sizes`;
        None for all of them along the data axis.
      devices: devices of the mesh, such as those of a machine that is only compiled for; None for
        all devices.

    Raises:
      UserError: sizes that do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(section or {}, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(section: Mapping[str, Any], device_count: int) -> dict[str, int]:
    """Returns the number of devices along each axis.

    Args:
      section: size of each axis, a whole number, or -1 or None for all remaining devices; by
        default the axis "data" has all of them.
      device_count: number of devices.

    Raises:
      UserError: a size below 1, two axes for the remaining devices, or a product of sizes other
        than the number of devices.

    Example:
      >>> mesh_sizes({"fsdp": 2}, device_count=8)
      {'data': 4, 'fsdp': 2, 'tensor': 1}
    """
    sizes = {axis: section.get(axis, default) for axis, default in _DEFAULTS.items()}
    rest = [axis for axis, size in sizes.items() if size in (None, THE_REST)]
    for axis in sizes.keys() - rest:
        check_whole(f"mesh.{axis}", sizes[axis])
    known = math.prod(sizes[axis] for axis in sizes.keys() - rest)
    if len(rest) > 1:
        both = " and ".join(f"mesh.{axis}" for axis in rest)
        raise UserError(f"{both} cannot all take the rest of the devices: give all but one a size")
    if device_count % known or (not rest and known != device_count):
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if axis not in rest)
        raise UserError(
            f"the mesh {asked} does not fit {device_count} device(s): choose sizes whose product "
            f"is {device_count}, or -1 for one of them"
        )
    return {axis: device_count // known if axis in rest else sizes[axis] for axis in AXES}


def jit_for_mesh(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    runs: MultiExitModel | None = None,
    **options: Any,
) -> Any:
    """Returns `jax.jit(function, **options)` with the mesh's context and compiler options.

    Args:
      function: function of pytrees of arrays.
      mesh: device mesh that the program runs on.
      runs: model that the function runs, whose programs are rewritten for a CPU; None for none.
      options: arguments of `jax.jit`.
    """
    platform = mesh.devices.flat[0].platform
    if runs is not None and platform == "cpu":
        function = for_cpu(function, kernels=runs.cpu_kernels and mesh.size == 1)
    function = on_mesh(function, mesh)
    return jax.jit(function, compiler_options=compiler_options(platform), **options)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns the function, run in the context of the mesh if layers are split over devices."""
    if mesh.shape.get(TENSOR_AXIS, 1) == 1:
        return function

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return within


def batch_parts(mesh: Mesh) -> int:
    """Returns the number of devices that a batch is divided over."""
    return math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples of a micro batch.

    Args:
      batch_size: number of examples in a training step.
      mesh: device mesh that the batch is divided over.
      accumulate_steps: number of micro batches of a step.
    """
    check_whole("accumulate_steps", accumulate_steps)
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % (parts * accumulate_steps):
        micro = f" in {accumulate_steps} micro batches" if accumulate_steps > 1 else ""
        raise UserError(
            f"batch_size {batch_size} cannot be divided over {parts} device(s){micro}: "
            f"choose a positive multiple of {parts * accumulate_steps}"
        )


def round_up_to_devices(batch_size: int, mesh: Mesh) -> int:
    """Returns `batch_size` rounded up to a multiple of the devices that divide a batch."""
    parts = batch_parts(mesh)
    return -(-batch_size // parts) * parts


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Returns the sharding that splits one axis, by default the first, like a batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, _batch_axes(mesh)))


def rows_here(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the rows of a batch that this process's devices hold, ascending, `[rows]`.

    Processes that differ only along the tensor axis hold the same rows.
    """
    held = np.zeros(batch_size, bool)
    places = batch_sharded(mesh).addressable_devices_indices_map((batch_size,))
    for index in (places or {}).values():
        held[index] = True
    return np.flatnonzero(held)


def put_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Copies this process's rows of a batch, host arrays `[rows, ...]`, to its devices.

    Args:
      batch: arrays whose rows are those of `rows_here`.
      mesh: device mesh that the batch is divided over.
      axis: axis of the rows; 1 where several batches are stacked.

    Returns:
      Arrays `[batch, ...]` over the devices of all processes.
    """
    where = batch_sharded(mesh, axis=axis)
    if where.is_fully_addressable:
        return jax.device_put(batch, where)
    return jax.tree.map(lambda part: _put_rows(part, where, mesh, axis), batch)


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies arrays that every process holds to all devices, replicated."""
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def put_where(tree: PyTree, shardings: PyTree) -> PyTree:
    """Places arrays by their shardings: host arrays that every process holds, or global ones."""
    return jax.tree.map(_put, tree, shardings)


def gathered(tree: PyTree) -> PyTree:
    """Returns the whole arrays on the host of every process; all processes must call it."""
    return jax.tree.map(_gather, tree)


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if where.is_fully_addressable or not is_here:
        return jax.device_put(leaf, where)
    return jax.make_array_from_callback(leaf.shape, where, np.asarray(leaf).__getitem__)


def _put_rows(part: np.ndarray, where: NamedSharding, mesh: Mesh, axis: int) -> jax.Array:
    parts = batch_parts(mesh)
    size = part.shape[axis] * parts // len(rows_here(parts, mesh))
    held = rows_here(size, mesh)

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[axis].indices(size)
        first = np.searchsorted(held, start)
        rows = slice(first, first + stop - start)
        return part[(*index[:axis], rows, *index[axis + 1 :])]

    shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, where, shard)


def _gather(leaf: Any) -> np.ndarray:
    is_split = isinstance(leaf, jax.Array) and not leaf.is_fully_replicated
    if is_split and not leaf.is_fully_addressable:
        where: Any = leaf.sharding
        leaf = jax.jit(_same, out_shardings=replicated(where.mesh))(leaf)
    return np.asarray(leaf)


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
