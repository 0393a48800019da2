"""Speed of inference, in streams and single batches: early exits against whole programs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dfs_jax.exits.scores import max_softmax
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.programs import make_programs
from dfs_jax.inference.timing import StageTimes, measure_stages
from dfs_jax.stopwatch import seconds_of
from dfs_jax.types import Example

_ROUNDS_FULL, _ROUNDS_ALONE = 5, 31  # measurements of the stages' times in each round
_CALLED = 512  # examples (or one full batch) whose latencies are measured in each round


class Contender(Protocol):
    """A way to classify images `[n, height, width, channels]`, whose speed is measured."""

    def go_through(self, images: np.ndarray, batch: int) -> None:
        """Classifies all images in batches, as fast as possible."""
        ...

    def answer(self, images: np.ndarray) -> np.ndarray:
        """Classifies one batch; returns each answer's latency in seconds, `[n]`."""
        ...


class OneProgram:
    """A network as one program, with its last head alone.

    Args:
      stages: stages of the network, such as those up to an exit of a larger one.
      example: shape and type of an image.
    """

    def __init__(self, stages: Sequence[Any], example: Example):
        self._programs = make_programs(stages, max_softmax, (1.0,) * len(stages), example)
        self._single = self._programs.single()

    def go_through(self, images: np.ndarray, batch: int) -> None:
        for part in _batches(images, batch):
            self._run(part)

    def answer(self, images: np.ndarray) -> np.ndarray:
        seconds = seconds_of(lambda: self._run(images))
        return np.full(len(images), seconds)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if len(images) > 1:
            return self._programs.run_whole(images)
        self._single.start(images)  # one at a time as predictors do
        return self._single.run_whole()


class EarlyExits:
    """A predictor's stream, or its calls for examples one at a time."""

    def __init__(self, predictor: EarlyExitPredictor):
        self.predictor = predictor

    def go_through(self, images: np.ndarray, batch: int) -> None:
        if batch == 1:
            for part in _batches(images, 1):
                self.predictor(part)
        else:
            for _ in self.predictor.stream(_batches(images, batch), max_wait=None):
                pass

    def answer(self, images: np.ndarray) -> np.ndarray:
        return self.predictor(images).latency

    def times(self, batch: int, *, rounds: int) -> StageTimes:
        """Returns the times of the stages and of the whole network."""
        return measure_stages(self.predictor.programs, batch, rounds=rounds)


class Speed(NamedTuple):
    """Measured speed of one contender.

    Attributes:
      seconds: time for each example, the median over rounds. With batches of one, the median is
        taken for each example.
      speedup: speed-up over the first contender, see `race`.
      p50: median latency over examples, in seconds from a call with one batch to the answer.
      p99: 99th percentile of the same latency.
    """

    seconds: float
    speedup: float
    p50: float
    p99: float


def race(
    contenders: Sequence[Contender],
    stage_times: Sequence[Callable[..., StageTimes]],
    images: np.ndarray,
    *,
    batch: int,
    rounds: int,
) -> tuple[list[Speed], list[StageTimes]]:
    """Measures contenders and stages, which alternate, in another order in each round.

    A machine's speed may drift from minute to minute. The first contender, which is the reference,
    therefore also runs between all others. The speed-up in a round is the mean time of the
    reference just before and just after, divided by the contender's time; the median over rounds is
    reported. With batches of one, the median is taken for each example, and the mean of these
    medians is weighted by the examples' times.

    Args:
      contenders: contenders whose programs are compiled (`go_through` has been called).
      stage_times: functions `(batch, *, rounds)` that measure stages, such as those of a runtime.
      images: images `[n, height, width, channels]`, with n a multiple of `batch`.
      batch: number of examples in a full batch.
      rounds: number of rounds that medians are taken over.

    Returns:
      The speed of each contender, and of each function in `stage_times` its times for a full
      batch.
    """
    parts = list(_batches(images, 1)) if batch == 1 else [images]

    def timed(contender: Contender) -> list[float]:
        return [seconds_of(lambda x=part: contender.go_through(x, batch)) for part in parts]

    seconds = [[] for _ in contenders]
    references = [[] for _ in contenders]
    latencies = [[] for _ in contenders]
    times = [[] for _ in stage_times]
    for turn in range(rounds):
        order = [(turn + n) % len(contenders) for n in range(len(contenders))]
        before = timed(contenders[0])
        for i in order:
            seconds[i].append(timed(contenders[i]))
            after = timed(contenders[0])
            references[i].append(np.mean([before, after], axis=0))
            before = after
        for i in order:
            called = images[: max(batch, _CALLED)]
            latencies[i] += [contenders[i].answer(part) for part in _batches(called, batch)]
        of_stages = _ROUNDS_ALONE if batch == 1 else _ROUNDS_FULL
        for found, measured in zip(times, stage_times, strict=True):
            found.append(measured(batch, rounds=of_stages))
    speeds = [
        Speed(
            float(np.median(own, axis=0).sum()) / len(images),
            _speedup(np.array(reference), np.array(own)),
            *np.percentile(np.concatenate(ls), (50, 99)).tolist(),
        )
        for own, reference, ls in zip(seconds, references, latencies, strict=True)
    ]
    return speeds, list(map(_median, times))


def _speedup(reference: np.ndarray, own: np.ndarray) -> float:
    """Returns the speed-up of `own` over `reference`, both `[rounds, parts]` seconds."""
    ratios = np.median(reference / own, axis=0)
    return float(np.average(ratios, weights=np.median(own, axis=0)))


def _batches(images: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), batch):
        yield images[start : start + batch]


def _median(times: Sequence[StageTimes]) -> StageTimes:
    stages = zip(*(t.stages for t in times), strict=True)
    return StageTimes(
        times[0].batch,
        tuple(statistics.median(stage) for stage in stages),
        statistics.median(t.whole for t in times),
    )
