"""Examples from an iterator, answers in order: batches are merged so that deep stages run full."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dfs_jax.inference.answers import AnswerTable, Prediction, check_images
from dfs_jax.inference.pipeline import Pipeline

_READ_AHEAD = 2  # batches
_PATIENCE = 0.1  # seconds between looks at whether anybody still reads


class Arrived(NamedTuple):
    """A batch that has been read: its good images and their places, and what is wrong elsewhere."""

    n: int
    images: np.ndarray
    places: np.ndarray
    errors: dict[int, str]
    time: float


def stream_answers(
    batches: Iterable[Any],
    make_pipeline: Callable[[AnswerTable], Pipeline],
    table: AnswerTable,
    example: jax.ShapeDtypeStruct,
    *,
    chunk: int,
    max_wait: float | None,
) -> Iterator[Prediction]:
    """Yields a `Prediction` for every example of every batch, in order.

    The input is read in a thread of its own, at most two batches ahead. At most as many examples
    as the table has rows are under way; if the first of them holds all others up, the stage it
    waits for runs without being full.

    Args:
      batches: arrays `[n, height, width, channels]` or lists of n images.
      make_pipeline: what runs the stages, for a table.
      table: where answers wait for their turn; new.
      example: what one image must be.
      chunk: how many examples are taken at a time, at most half of the table.
      max_wait: seconds for which an example waits at a stage for others to fill the batch; None
        for as long as it takes.

    Raises:
      Whatever reading the input raises, after the answers to what was read before.
    """
    pipeline, reader = make_pipeline(table), _Reader(batches, example)
    try:
        while not reader.is_exhausted:
            left = None if max_wait is None else pipeline.seconds_left(max_wait)
            arrived = reader.next(timeout=left)
            for start in range(0, arrived.n, chunk):
                n = min(chunk, arrived.n - start)
                while table.free < n:
                    pipeline.run_first(table.released)
                    yield from table.release()
                _add(pipeline, table, arrived, start, n)
                yield from table.release()
            if max_wait is not None:
                pipeline.run_overdue(max_wait)
                yield from table.release()
        pipeline.finish()
        yield from table.release()
        reader.raise_error()
    finally:
        reader.stop()


def _add(pipeline: Pipeline, table: AnswerTable, arrived: Arrived, start: int, n: int) -> None:
    """Gives tickets to n examples of a batch, and the good ones to the pipeline."""
    tickets = table.take(n, arrived.time)
    low, high = np.searchsorted(arrived.places, (start, start + n))
    good = arrived.places[low:high] - start
    is_bad = np.ones(n, bool)
    is_bad[good] = False
    for i in np.flatnonzero(is_bad):
        table.fail(int(tickets[i]), arrived.errors[start + int(i)])
    pipeline.add(arrived.images[low:high], tickets[good])


class _Reader:
    """Reads and checks batches in a thread, a few ahead.

    Attributes:
      is_exhausted: whether `next` has nothing more to give.
    """

    def __init__(self, batches: Iterable[Any], example: jax.ShapeDtypeStruct):
        self.is_exhausted = False
        self._queue: queue.Queue[Arrived | None] = queue.Queue(_READ_AHEAD)
        self._stopped = threading.Event()
        self._error: Exception | None = None
        threading.Thread(target=self._read, args=(batches, example), daemon=True).start()

    def next(self, timeout: float | None) -> Arrived:
        """Returns the next batch; an empty one at the end, or if none comes in time (seconds)."""
        try:
            arrived = self._queue.get(timeout=timeout)
        except queue.Empty:
            return _NOTHING
        self.is_exhausted = arrived is None
        return arrived or _NOTHING

    def raise_error(self) -> None:
        """Raises what reading raised, if it did."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Lets the thread end, once its input has given the batch that it is waiting for."""
        self._stopped.set()

    def _read(self, batches: Iterable[Any], example: jax.ShapeDtypeStruct) -> None:
        try:
            for batch in batches:
                arrived = _check(batch, example)
                if not self._put(arrived):
                    return
        except Exception as error:  # raised again where the answers are read
            self._error = error
        self._put(None)

    def _put(self, arrived: Arrived | None) -> bool:
        """Waits for room in the queue; returns whether there was any before `stop`."""
        while not self._stopped.is_set():
            try:
                self._queue.put(arrived, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False


def _check(batch: Any, example: jax.ShapeDtypeStruct) -> Arrived:
    now = time.perf_counter()
    images, places, errors = check_images(batch, example)
    # A copy: the input may fill the same array again while these wait.
    return Arrived(len(places) + len(errors), images.copy(), places, errors, now)


_NOTHING = Arrived(0, np.empty(0), np.empty(0, int), {}, 0.0)
