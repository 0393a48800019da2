"""How long training takes between two evaluations, and how much of it is waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Lap(NamedTuple):
    """What the clock counted up to an evaluation: steps, and seconds of waiting for their data."""

    steps: int
    waited: float


class Clock:
    """Times training between two evaluations, and how much of it was waiting for the next batch."""

    def __init__(self):
        self._steps, self._waited = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Begins here; steps that have been sent already count."""
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def waiting_for(self, steps: int) -> Iterator[None]:
        """Counts so many steps, and the time within as waiting for their batches."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        self._steps += steps

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves the time within out."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def lap(self) -> Lap:
        """Returns what has been counted, and counts from zero."""
        lap = Lap(self._steps, self._waited)
        self._steps, self._waited = 0, 0.0
        return lap

    def read(self, lap: Lap, batch_size: int) -> dict[str, float]:
        """Returns the speed and the fraction of time spent waiting for data, up to now."""
        seconds = time.perf_counter() - self._begin
        speed = lap.steps * batch_size / seconds
        return {"images_per_second": speed, "data_wait": lap.waited / seconds}
