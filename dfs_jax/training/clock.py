"""Times training between two evaluations, and the part of it spent waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Lap(NamedTuple):
    """Number of steps since the last evaluation, and seconds spent waiting for their data."""

    steps: int
    waited: float


class Clock:
    """Times training between two evaluations, and the part of it spent waiting for batches."""

    def __init__(self):
        self._steps, self._waited = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Restarts the clock; steps that were sent before still count."""
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def waiting_for(self, steps: int) -> Iterator[None]:
        """Counts `steps` steps, and the time in the context as waiting for their batches."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        self._steps += steps

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Excludes the time in the context."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def lap(self) -> Lap:
        """Returns the counts and resets them to zero."""
        lap = Lap(self._steps, self._waited)
        self._steps, self._waited = 0, 0.0
        return lap

    def read(self, lap: Lap, batch_size: int) -> dict[str, float]:
        """Returns images per second and the fraction of time spent waiting for data, until now."""
        seconds = time.perf_counter() - self._begin
        speed = lap.steps * batch_size / seconds
        return {"images_per_second": speed, "data_wait": lap.waited / seconds}
