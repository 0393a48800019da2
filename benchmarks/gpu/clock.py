"""Time limit of a stage: remaining time, and an end that nothing can delay."""

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
SECONDS_TO_RESCUE = 30.0  # remaining time at which another thread saves a run that does not stop
SECONDS_TO_LEAVE = 5.0  # for the process to end
OVERTIME_STATUS = 3


class Clock:
    """Remaining time of a stage.

    Args:
      minutes: time limit of the stage, counted from now.
      now: function that returns the time in seconds, for tests.

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
        """Returns the remaining seconds, negative after the time limit."""
        return self._end - self._now()

    def allows(self, seconds: float) -> bool:
        """Returns whether this number of seconds remains."""
        return self.left() >= seconds


class Expected:
    """Expected time of a piece of work: the longest of its kind so far, or an initial guess.

    Args:
      guess: seconds, used until a piece has been timed.
    """

    def __init__(self, guess: float):
        self.seconds, self._is_guess = guess, True

    @contextlib.contextmanager
    def timed(self, clock: Clock) -> Iterator[None]:
        """Times a piece of work."""
        begin = clock.left()
        yield
        taken = begin - clock.left()
        self.seconds = taken if self._is_guess else max(self.seconds, taken)
        self._is_guess = False


@contextlib.contextmanager
def ends_in_time(clock: Clock) -> Iterator[None]:
    """Ends the process shortly before the time limit, at any point; results are on disk."""

    def leave() -> None:
        sys.stdout.write("the time is over: what was finished is saved\n")
        sys.stdout.flush()
        os._exit(OVERTIME_STATUS)

    with _after(clock.left() - SECONDS_TO_LEAVE, leave):
        yield


@contextlib.contextmanager
def stops_in_time(clock: Clock, seconds: float = SECONDS_TO_SAVE) -> Iterator[None]:
    """Sends this process SIGTERM when `seconds` remain; a training run then saves.

    Outside of a run, which has its own handler, the signal does nothing.
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
    """Calls `save` from another thread if the context is still running when `seconds` remain.

    This saves a run that is compiling or evaluating and does not react to signals.
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
