"""Measured limits of the card, and lower bounds of a training step's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.costs.chips import Chip, roofline
from dfs_jax.costs.compiled import Operations, operations
from dfs_jax.stopwatch import median_seconds

DTYPES = ("bfloat16", "float32")
_ROUNDS, _PRODUCTS = 5, 10


class Ceilings(NamedTuple):
    """Measured rates of the card.

    Attributes:
      flops: FLOPs per second of one large matrix product, by type; float32 at default precision.
      bandwidth: bytes per second of a large copy, read and written together.
    """

    flops: dict[str, float]
    bandwidth: float


class Floors(NamedTuple):
    """Lower bounds of a step's time.

    Attributes:
      flops: FLOPs of its convolutions and matrix products.
      bytes: bytes read and written, as counted by the compiler.
      flops_floor_ms: time of the FLOPs at the measured peak of the type.
      bytes_floor_ms: time of the bytes at the measured bandwidth.
      bound_by: the larger of the two: "products" or "memory".
    """

    flops: float
    bytes: float
    flops_floor_ms: float
    bytes_floor_ms: float
    bound_by: str


def measure_ceilings(*, side: int = 8192, mebibytes: int = 1024) -> Ceilings:
    """Measures products of random square matrices, and a copy.

    Args:
      side: side of the matrices.
      mebibytes: size of the copied array, far above the size of caches.
    """
    flops = {dtype: 2 * side**3 / _seconds_of_product(dtype, side) for dtype in DTYPES}
    size = mebibytes * 2**20
    array = jax.random.normal(jax.random.key(0), (size // 4,))
    shift = jax.jit(lambda x, by: x + by)
    (seconds,) = median_seconds([_waiting(shift, array, jnp.float32(1))], _ROUNDS)
    return Ceilings(flops, 2 * size / seconds)


def floors(ceilings: Ceilings, compiled: Any, flops: float, dtype: str) -> Floors:
    """Returns the lower bounds of a compiled step.

    Args:
      ceilings: measured rates of the card.
      compiled: compiled program, a `jax.stages.Compiled`.
      flops: FLOPs of the step's convolutions and products in the traced program: on a GPU they are
        calls of libraries, which the compiler cannot count.
      dtype: type of the products.
    """
    moved = operations(compiled).bytes_accessed
    chip = Chip(ceilings.flops["bfloat16"], ceilings.flops["float32"], 0.0, ceilings.bandwidth, 1.0)
    counted = Operations(flops, moved, int(flops))
    line = roofline(chip, counted, (), bf16=dtype == "bfloat16")
    return Floors(flops, moved, 1e3 * line.products_s, 1e3 * line.memory_s, line.bound_by)


def _seconds_of_product(dtype: str, side: int) -> float:
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))

    @jax.jit
    def chain(a: jax.Array, b: jax.Array) -> jax.Array:
        scale = jnp.asarray(side**-0.5, dtype)  # keeps the entries near 1
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: (x @ b) * scale, a)

    (seconds,) = median_seconds([_waiting(chain, a, b)], _ROUNDS)
    return seconds / _PRODUCTS


def _waiting(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*arguments))
