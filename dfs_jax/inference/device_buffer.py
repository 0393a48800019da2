"""Storage for carries in the memory of an accelerator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.inference.waiting import Carry


class DeviceBuffer:
    """A buffer in device memory, updated in place by small programs."""

    def __init__(self, example: Sequence[Any], capacity: int):
        self._capacity = capacity
        self._arrays = tuple(jnp.zeros((capacity, *leaf.shape), leaf.dtype) for leaf in example)

    def put(self, carry: Carry, rows: np.ndarray, at: int) -> None:
        # Rows that are not kept go to a position outside of the buffer, which drops them.
        places = np.full(len(carry[0]), self._capacity, np.int32)
        places[rows] = np.arange(at, at + len(rows))
        self._arrays = _scatter(self._arrays, carry, places)

    def first(self, size: int) -> Carry:
        return _first(self._arrays, size) if size < self._capacity else self._arrays

    def drop(self, n: int, count: int) -> None:
        if count > n:
            self._arrays = _roll(self._arrays, np.int32(-n))


@functools.partial(jax.jit, donate_argnums=0)
def _scatter(arrays: Carry, carry: Carry, places: jax.Array) -> Carry:
    return jax.tree.map(lambda a, c: a.at[places].set(c, mode="drop"), arrays, carry)


@functools.partial(jax.jit, static_argnums=1)
def _first(arrays: Carry, size: int) -> Carry:
    return jax.tree.map(lambda a: a[:size], arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _roll(arrays: Carry, shift: jax.Array) -> Carry:
    return jax.tree.map(lambda a: jnp.roll(a, shift, axis=0), arrays)
