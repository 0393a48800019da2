"""Queues before stages: rows of several batches are repacked into full ones.

On a CPU the host copies rows (measured on VGG7, batches of 256: 3 ms for 33 MB, where a gather in
the next stage's program took 22 ms); on accelerators the device does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

Carry: TypeAlias = tuple[Any, ...]  # arrays with the batch first

_ALIGNMENT = 64  # bytes; XLA reads host memory of this alignment in place


class Buffer(Protocol):
    """Storage for the carries of a fixed number of examples."""

    def put(self, carry: Carry, rows: np.ndarray, at: int) -> None:
        """Copies rows of a carry to positions `at`, `at + 1`, ..."""
        ...

    def first(self, size: int) -> Carry:
        """Returns the first `size` positions; valid until the next `put` or `drop`."""
        ...

    def drop(self, n: int, count: int) -> None:
        """Moves positions n to count to the front."""
        ...


class HostBuffer:
    """A buffer in host memory, which programs on a CPU read in place."""

    def __init__(self, example: Sequence[Any], capacity: int):
        self._arrays = [_aligned((capacity, *leaf.shape), leaf.dtype) for leaf in example]

    def put(self, carry: Carry, rows: np.ndarray, at: int) -> None:
        for array, leaf in zip(self._arrays, carry, strict=True):
            # "clip" avoids the copy by which the default mode protects `out` from a bad index.
            np.take(np.asarray(leaf), rows, axis=0, out=array[at : at + len(rows)], mode="clip")

    def first(self, size: int) -> Carry:
        return tuple(array[:size] for array in self._arrays)

    def drop(self, n: int, count: int) -> None:
        for array in self._arrays:
            array[: count - n] = array[n:count]


class Waiting:
    """Queue of the examples before one stage, first in, first out.

    A whole batch that enters an empty queue is kept as it is, and is not copied if it also leaves
    as a whole.

    Attributes:
      count: number of examples in the queue.
      tickets: tickets of the examples, `[capacity]` int64, valid up to `count`.
      since: times of arrival in seconds, `[capacity]`, valid up to `count`.
    """

    def __init__(self, make_buffer: Callable[[], Buffer], capacity: int):
        self.count = 0
        self.tickets = np.zeros(capacity, np.int64)
        self.since = np.zeros(capacity)
        self._capacity = capacity
        self._make_buffer = make_buffer
        self._buffer: Buffer | None = None  # made when first needed
        self._whole: Carry | None = None

    @property
    def free(self) -> int:
        """Number of further examples that the queue can hold."""
        return self._capacity - self.count

    def put(self, carry: Carry, rows: np.ndarray, tickets: np.ndarray, now: float) -> None:
        """Adds rows of a carry, ascending and at most `free`."""
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

    def first(self, n: int, size: int) -> Carry:
        """Returns the carries of the first n examples, padded to `size` with arbitrary values."""
        if self._whole is not None and n == self.count and _batch(self._whole) == size:
            return self._whole
        self._settle()
        return self._room().first(size)

    def drop(self, n: int) -> None:
        """Removes the first n examples."""
        left = self.count - n
        if left:
            self._settle()
            self._room().drop(n, self.count)
        self._whole = None
        self.tickets[:left] = self.tickets[n : self.count]
        self.since[:left] = self.since[n : self.count]
        self.count = left

    def clear(self) -> None:
        """Removes all examples."""
        self.count, self._whole = 0, None

    def _settle(self) -> None:
        """Copies a batch that was kept as it is into the buffer."""
        if self._whole is not None:
            self._room().put(self._whole, np.arange(self.count), 0)
            self._whole = None

    def _room(self) -> Buffer:
        if self._buffer is None:
            self._buffer = self._make_buffer()
        return self._buffer


def _batch(carry: Carry) -> int:
    return len(carry[0])


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
