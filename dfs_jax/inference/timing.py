"""Times of the stages on this machine, and whether early exits save time here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.inference.programs import Programs
from dfs_jax.inference.waiting import Carry
from dfs_jax.stopwatch import median_seconds
from dfs_jax.types import Example

# Least ideal speed-up at which stages are used, which covers the cost of merging and deciding.
LEAST_GAIN = 1.03


class StageTimes(NamedTuple):
    """Measured times, in seconds for each example.

    Attributes:
      batch: number of examples in a batch.
      stages: time of each stage, including its head and its answers.
      whole: time of the whole network as one program, with the last head alone.
    """

    batch: int
    stages: tuple[float, ...]
    whole: float

    def up_to_exit(self) -> tuple[float, ...]:
        """Returns the time up to and including each exit, in seconds for each example.

        >>> StageTimes(1, (0.5, 0.25), 0.6).up_to_exit()
        (0.5, 0.75)
        """
        return tuple(np.cumsum(self.stages).tolist())

    def staged(self, exit_shares: Sequence[float]) -> float:
        """Returns the mean time of an example if exit k answers a fraction `exit_shares[k]`.

        >>> StageTimes(1, (0.5, 0.25), 0.6).staged([0.75, 0.25])
        0.5625
        """
        seconds, left = 0.0, 1.0
        for stage, share in zip(self.stages, exit_shares, strict=True):
            seconds += left * stage
            left -= share
        return seconds

    def ideal_speedup(self, exit_shares: Sequence[float]) -> float:
        """Returns the speed-up of stages over the whole network, without any overhead."""
        return self.whole / self.staged(exit_shares)

    def stopping_pays(self, exit_shares: Sequence[float]) -> bool:
        """Returns whether stages are expected to be faster than the whole network."""
        return self.ideal_speedup(exit_shares) >= LEAST_GAIN


def measure_stages(programs: Programs, batch: int, *, rounds: int) -> StageTimes:
    """Returns the times of every stage and of the whole network, medians over rounds.

    Stages and whole network alternate, so that other work of the machine affects them equally.

    Args:
      programs: compiled stages.
      batch: number of examples in the batch of noise that they run on.
      rounds: number of measurements.
    """
    images = noise_like(programs.example, batch)
    *stages, whole = median_seconds(stage_runs(programs, images), rounds)
    return StageTimes(batch, tuple(s / batch for s in stages), whole / batch)


def stage_runs(programs: Programs, images: np.ndarray) -> list[Callable[[], Any]]:
    """Returns functions that run each stage, and last the whole network, as predictors do.

    Args:
      programs: compiled stages.
      images: images `[batch, height, width, channels]`.
    """
    if len(images) == 1:
        single = programs.single()
        single.start(images)
        for k in range(programs.num_exits):
            single.run(k)
        stages = [functools.partial(single.run, k) for k in range(programs.num_exits)]
        return [*stages, single.run_whole]
    carries: list[Carry] = [(images,)]
    for k in range(programs.num_exits - 1):
        carries.append(programs.run(k, carries[k])[0])
    stages = [functools.partial(programs.run, k, carry) for k, carry in enumerate(carries)]
    return [*stages, functools.partial(programs.run_whole, images)]


def noise_like(example: Example, batch: int) -> np.ndarray:
    """Returns random images `[batch, height, width, channels]`."""
    shape, dtype = (batch, *example.shape), np.dtype(example.dtype)
    draw = np.random.default_rng(0)
    if dtype.kind == "f":
        return draw.standard_normal(shape).astype(dtype)
    return draw.integers(0, 256, shape).astype(dtype)
