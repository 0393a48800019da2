"""Where arrays live: a data-parallel mesh over the local devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dfs_jax.cpu_kernels import compiler_options
from dfs_jax.types import PyTree, UserError

DATA_AXIS = "data"


def create_mesh() -> Mesh:
    """Returns a mesh of all local devices along the data axis."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def jit_for_mesh(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Any:
    """Returns `jax.jit(function, **options)`, compiled as suits the kind of the mesh's devices."""
    platform = mesh.devices.flat[0].platform
    return jax.jit(function, compiler_options=compiler_options(platform), **options)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    devices = mesh.shape[DATA_AXIS]
    if batch_size < 1 or batch_size % devices:
        raise UserError(
            f"batch_size {batch_size} cannot be divided over {devices} device(s): "
            f"choose a positive multiple of {devices}"
        )


def round_up_to_devices(batch_size: int, mesh: Mesh) -> int:
    """Returns the smallest multiple of the device count that is at least `batch_size`."""
    devices = mesh.shape[DATA_AXIS]
    return -(-batch_size // devices) * devices


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis split over the data axis of the mesh."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Copies host arrays `[batch, ...]` to the devices, each its own part."""
    return jax.device_put(batch, batch_sharded(mesh))
