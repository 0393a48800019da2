"""Times calls in turn, round after round.

Disturbances of the machine then affect all calls equally, so that ratios are more reliable than
times.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the duration of a call in seconds."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median_seconds(programs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Runs every program once untimed, then `repeats` times in turn; returns the median of each.

    Every other round runs in reverse order, so that no program always follows the same one.

    Example:
      >>> fast, slow = median_seconds([lambda: None, lambda: time.sleep(0.002)], repeats=3)
      >>> fast < 0.002 <= slow
      True
    """
    for program in programs:
        program()
    taken: list[list[float]] = [[] for _ in programs]
    with _without_garbage_collection():
        for number in range(repeats):
            order = range(len(programs))
            for i in reversed(order) if number % 2 else order:
                taken[i].append(seconds_of(programs[i]))
    return [median(seconds) for seconds in taken]


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
