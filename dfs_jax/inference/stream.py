"""Streaming inference: answers in order, with batches merged so that deep stages run full."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.inference.answers import AnswerTable, Prediction, check_images
from dfs_jax.inference.pipeline import Pipeline
from dfs_jax.types import Example

_READ_AHEAD = 2  # batches
_PATIENCE = 0.1  # seconds between checks whether the stream has been closed


class Arrived(NamedTuple):
    """A batch that has been read.

    Attributes:
      n: number of examples.
      images: images that the network accepts, `[m, height, width, channels]`.
      places: positions of these images in the batch, `[m]`, ascending.
      errors: reasons why the other images are refused, by position.
      time: time of arrival, in seconds of `time.perf_counter`.
    """

    n: int
    images: np.ndarray
    places: np.ndarray
    errors: dict[int, str]
    time: float


def stream_answers(
    batches: Iterable[Any],
    make_pipeline: Callable[[AnswerTable], Pipeline],
    table: AnswerTable,
    example: Example,
    *,
    chunk: int,
    max_wait: float | None,
) -> Iterator[Prediction]:
    """Yields a `Prediction` for every example of every batch, in order.

    The input is read in a separate thread, at most two batches ahead. The number of rows of the
    table bounds the number of examples in flight. If the table is full, the stage that its first
    example waits for runs with a batch that is not full.

    Args:
      batches: iterable of arrays `[n, height, width, channels]` or lists of n images.
      make_pipeline: function from a table to the pipeline that fills it.
      table: empty table in which answers wait for their turn.
      example: required shape and type of an image.
      chunk: number of examples that are added at a time, at most half of the table.
      max_wait: seconds for which an example waits at a stage for others to fill the batch; None
        for no limit.

    Raises:
      Any exception of the input, after the answers to the batches before it.
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
    """Takes tickets for n examples of a batch, and adds the valid ones to the pipeline."""
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
      is_exhausted: whether the end of the input was reached.
    """

    def __init__(self, batches: Iterable[Any], example: Example):
        self.is_exhausted = False
        self._queue: queue.Queue[Arrived | None] = queue.Queue(_READ_AHEAD)
        self._stopped = threading.Event()
        self._error: Exception | None = None
        threading.Thread(target=self._read, args=(batches, example), daemon=True).start()

    def next(self, timeout: float | None) -> Arrived:
        """Returns the next batch, or an empty one at the end and after `timeout` seconds."""
        try:
            arrived = self._queue.get(timeout=timeout)
        except queue.Empty:
            return _NOTHING
        self.is_exhausted = arrived is None
        return arrived or _NOTHING

    def raise_error(self) -> None:
        """Raises the exception of the input, if there was one."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends the thread, once the input has returned the batch that it waits for."""
        self._stopped.set()

    def _read(self, batches: Iterable[Any], example: Example) -> None:
        try:
            for batch in batches:
                arrived = _check(batch, example)
                if not self._put(arrived):
                    return
        except Exception as error:  # raised again where the answers are read
            self._error = error
        self._put(None)

    def _put(self, arrived: Arrived | None) -> bool:
        """Adds to the queue when it has room; returns False if `stop` came first."""
        while not self._stopped.is_set():
            try:
                self._queue.put(arrived, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False


def _check(batch: Any, example: Example) -> Arrived:
    now = time.perf_counter()
    images, places, errors = check_images(batch, example)
    # A copy, because the input may reuse its array while these wait.
    return Arrived(len(places) + len(errors), images.copy(), places, errors, now)


_NOTHING = Arrived(0, np.empty(0), np.empty(0, int), {}, 0.0)
