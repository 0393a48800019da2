"""A stage's time: what is left of it, what still fits, and an end that nothing can delay."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from dfs_jax.types import UserError

SECONDS_TO_SAVE = 60.0  # from the request to stop until everything is on disk
SECONDS_TO_RESCUE = 30.0  # what is left when a run that does not stop is saved from beside it
SECONDS_TO_LEAVE = 5.0  # for the process to end
OVERTIME_STATUS = 3


class Clock:
    """How much of a stage's minutes is left.

    Args:
      minutes: time of the whole stage, counted from here.
      now: returns seconds; a test's own, or `time.monotonic`.

    Raises:
      UserError: minutes that are not above 0.

    Example:
      >>> moments = iter([0.0, 50.0, 50.0])
      >>> clock = Clock(1.0, now=lambda: next(moments))
      >>> clock.left(), clock.allows(11)
      (10.0, False)
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic):
        if not minutes > 0:
            raise UserError(f"minutes must be above 0, got {minutes:g}")
        self._now = now
        self._end = now() + 60 * minutes

    def left(self) -> float:
        """Returns the seconds that are left, below 0 once the time is over."""
        return self._end - self._now()

    def allows(self, seconds: float) -> bool:
        """Returns whether so many seconds are left."""
        return self.left() >= seconds


class Expected:
    """How long a piece of work takes: the longest of its kind so far, or a first guess.

    Args:
      guess: seconds, used until one piece has been timed.
    """

    def __init__(self, guess: float):
        self.seconds, self._is_guess = guess, True

    @contextlib.contextmanager
    def timed(self, clock: Clock) -> Iterator[None]:
        """Times one piece of work."""
        begin = clock.left()
        yield
        taken = begin - clock.left()
        self.seconds = taken if self._is_guess else max(self.seconds, taken)
        self._is_guess = False


@contextlib.contextmanager
def ends_in_time(clock: Clock) -> Iterator[None]:
    """Ends the process shortly before the time is over, wherever it is; results are on disk."""

    def leave() -> None:
        sys.stdout.write("the time is over: what was finished is saved\n")
        sys.stdout.flush()
        os._exit(OVERTIME_STATUS)

    with _after(clock.left() - SECONDS_TO_LEAVE, leave):
        yield


@contextlib.contextmanager
def stops_in_time(clock: Clock, seconds: float = SECONDS_TO_SAVE) -> Iterator[None]:
    """Sends this process SIGTERM when so many seconds are left; a training run then saves.

    Outside a run, which has a handler of its own, the signal does nothing.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with _after(clock.left() - seconds, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def rescued(
    clock: Clock, save: Callable[[], None], seconds: float = SECONDS_TO_RESCUE
) -> Iterator[None]:
    """Calls `save` from another thread if the work within still goes on with so many seconds left.

    So a run that is being compiled or evaluated, and hears no signal, is not lost.
    """
    with _after(clock.left() - seconds, save):
        yield


@contextlib.contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(max(seconds, 0.0), act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
