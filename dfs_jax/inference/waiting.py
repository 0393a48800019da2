"""Examples that wait for a stage: rows of several batches, put together into full ones.

On a CPU rows are copied by the host (measured on VGG7, batches of 256: 3 ms for 33 MB, where a
gather inside the next stage's program took 22), on accelerators by the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.types import PyTree

_ALIGNMENT = 64  # bytes: what XLA wants of host memory that it reads in place


class Buffer(Protocol):
    """Room for the carries of a fixed number of examples."""

    def put(self, carry: PyTree, rows: np.ndarray, at: int) -> None:
        """Copies rows of a carry to places `at`, `at + 1`, ..."""
        ...

    def first(self, size: int) -> PyTree:
        """Returns the first `size` places; valid until the next `put` or `drop`."""
        ...

    def drop(self, n: int, count: int) -> None:
        """Moves places n to count to the front."""
        ...


class HostBuffer:
    """In the host's memory, which programs on a CPU read in place."""

    def __init__(self, example: PyTree, capacity: int):
        leaves, self._structure = jax.tree.flatten(example)
        self._arrays = [_aligned((capacity, *leaf.shape), leaf.dtype) for leaf in leaves]

    def put(self, carry: PyTree, rows: np.ndarray, at: int) -> None:
        for array, leaf in zip(self._arrays, jax.tree.leaves(carry), strict=True):
            # "clip": the default would copy once more, to leave `out` untouched by a bad index
            np.take(np.asarray(leaf), rows, axis=0, out=array[at : at + len(rows)], mode="clip")

    def first(self, size: int) -> PyTree:
        return jax.tree.unflatten(self._structure, [array[:size] for array in self._arrays])

    def drop(self, n: int, count: int) -> None:
        for array in self._arrays:
            array[: count - n] = array[n:count]


class DeviceBuffer:
    """In the device's memory, changed in place by small programs."""

    def __init__(self, example: PyTree, capacity: int):
        self._capacity = capacity
        self._arrays = jax.tree.map(
            lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), example
        )

    def put(self, carry: PyTree, rows: np.ndarray, at: int) -> None:
        # Every row of the carry gets a place, those that are not kept one outside.
        places = np.full(_batch(carry), self._capacity, np.int32)
        places[rows] = np.arange(at, at + len(rows))
        self._arrays = _scatter(self._arrays, carry, places)

    def first(self, size: int) -> PyTree:
        return _first(self._arrays, size) if size < self._capacity else self._arrays

    def drop(self, n: int, count: int) -> None:
        if count > n:
            self._arrays = _roll(self._arrays, np.int32(-n))


@functools.partial(jax.jit, donate_argnums=0)
def _scatter(arrays: PyTree, carry: PyTree, places: jax.Array) -> PyTree:
    return jax.tree.map(lambda a, c: a.at[places].set(c, mode="drop"), arrays, carry)


@functools.partial(jax.jit, static_argnums=1)
def _first(arrays: PyTree, size: int) -> PyTree:
    return jax.tree.map(lambda a: a[:size], arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _roll(arrays: PyTree, shift: jax.Array) -> PyTree:
    return jax.tree.map(lambda a: jnp.roll(a, shift, axis=0), arrays)


class Waiting:
    """The queue before one stage: first come, first run.

    A batch that comes as a whole to an empty queue is kept as it is, and never copied if it also
    leaves as a whole.

    Attributes:
      count: how many wait.
      tickets: `[capacity]` int64, the examples' numbers, of which the first `count` count.
      since: `[capacity]` seconds, when they came.
    """

    def __init__(self, make_buffer: Callable[[], Buffer], capacity: int):
        self.count = 0
        self.tickets = np.zeros(capacity, np.int64)
        self.since = np.zeros(capacity)
        self._capacity = capacity
        self._make_buffer = make_buffer
        self._buffer: Buffer | None = None  # made when first needed
        self._whole: PyTree = None

    @property
    def free(self) -> int:
        """How many more can come."""
        return self._capacity - self.count

    def put(self, carry: PyTree, rows: np.ndarray, tickets: np.ndarray, now: float) -> None:
        """Adds the rows of a carry, ascending and at most `free` of them."""
        n, count = len(rows), self.count
        if not n:
            return
        if not count and rows[-1] == n - 1:
            self._whole = carry
        else:
            self._settle()
            self._room().put(carry, rows, count)
        self.tickets[count : count + n] = tickets
        self.since[count : count + n] = now
        self.count += n

    def first(self, n: int, size: int) -> PyTree:
        """Returns the carries of the first n, filled up to `size` with anything."""
        if self._whole is not None and n == self.count and _batch(self._whole) == size:
            return self._whole
        self._settle()
        return self._room().first(size)

    def drop(self, n: int) -> None:
        """Forgets the first n, whose program has run."""
        left = self.count - n
        if left:
            self._settle()
            self._room().drop(n, self.count)
        self._whole = None
        self.tickets[:left] = self.tickets[n : self.count]
        self.since[:left] = self.since[n : self.count]
        self.count = left

    def clear(self) -> None:
        """Forgets everybody."""
        self.count, self._whole = 0, None

    def _settle(self) -> None:
        """Copies a batch that was kept as it is."""
        if self._whole is not None:
            self._room().put(self._whole, np.arange(self.count), 0)
            self._whole = None

    def _room(self) -> Buffer:
        if self._buffer is None:
            self._buffer = self._make_buffer()
        return self._buffer


def _batch(carry: PyTree) -> int:
    return len(jax.tree.leaves(carry)[0])


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
