"""How long each stage takes on this machine, and whether stopping early pays here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.inference.programs import Programs

# What merging and deciding cost besides the stages: below this gain the whole network runs instead.
LEAST_GAIN = 1.03


class StageTimes(NamedTuple):
    """Measured seconds an example.

    Attributes:
      batch: how many examples went through at a time.
      stages: of each stage, its head and its answers included.
      whole: of the whole network as one program, with the last head alone.
    """

    batch: int
    stages: tuple[float, ...]
    whole: float

    def up_to_exit(self) -> tuple[float, ...]:
        """Returns the seconds an example up to and including each exit: costs of thresholds.

        >>> StageTimes(1, (0.5, 0.25), 0.6).up_to_exit()
        (0.5, 0.75)
        """
        return tuple(np.cumsum(self.stages).tolist())

    def staged(self, exit_shares: Sequence[float]) -> float:
        """Returns the mean seconds an example where exit k answers a share `exit_shares[k]`.

        >>> StageTimes(1, (0.5, 0.25), 0.6).staged([0.75, 0.25])
        0.5625
        """
        seconds, left = 0.0, 1.0
        for stage, share in zip(self.stages, exit_shares, strict=True):
            seconds += left * stage
            left -= share
        return seconds

    def ideal_speedup(self, exit_shares: Sequence[float]) -> float:
        """Returns how much faster than the whole network stages are if all else is free."""
        return self.whole / self.staged(exit_shares)

    def stopping_pays(self, exit_shares: Sequence[float]) -> bool:
        """Returns whether stages are expected to be faster than the whole network."""
        return self.ideal_speedup(exit_shares) >= LEAST_GAIN


def measure_stages(programs: Programs, batch: int, *, rounds: int) -> StageTimes:
    """Measures every stage and the whole network on a batch of noise; medians over `rounds`.

    They take turns, so that what else the machine does meets them alike.
    """
    images = _noise(programs, batch)
    carries = [images]
    for k in range(programs.num_exits - 1):
        carries.append(programs.run(k, carries[k])[0])
    runs: list[Callable[[], Any]] = [
        lambda k=k, carry=carry: programs.run(k, carry) for k, carry in enumerate(carries)
    ]
    runs.append(lambda: programs.run_whole(images))
    for run in runs:
        run()
    seconds = [[_seconds(run) for run in runs] for _ in range(rounds)]
    *stages, whole = (statistics.median(column) / batch for column in zip(*seconds, strict=True))
    return StageTimes(batch, tuple(stages), whole)


def _noise(programs: Programs, batch: int) -> np.ndarray:
    shape, dtype = (batch, *programs.example.shape), np.dtype(programs.example.dtype)
    draw = np.random.default_rng(0)
    if dtype.kind == "f":
        return draw.standard_normal(shape).astype(dtype)
    return draw.integers(0, 256, shape).astype(dtype)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
