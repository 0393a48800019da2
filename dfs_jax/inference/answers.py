"""What early-exit inference returns, and the table in which answers wait for their turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dfs_jax.types import UserError


class Prediction(NamedTuple):
    """What the network says of one example.

    Attributes:
      index: its place in the input, over all batches.
      predicted: its class; None where there is an error, as for all that follow.
      probabilities: `[classes]` float32, of the exit taken, at the policy's temperature.
      exit_index: the exit that answered, 0-based.
      confidence: by the policy's measure.
      latency: seconds from when it was taken from the input to when its answer was known.
      error: why there is no answer, or None.
    """

    index: int
    predicted: int | None
    probabilities: np.ndarray | None
    exit_index: int | None
    confidence: float | None
    latency: float | None
    error: str | None = None


class BatchPrediction(NamedTuple):
    """What the network says of n examples; -1 and NaN stand for examples with an error.

    Attributes:
      predicted: `[n]` int64.
      probabilities: `[n, classes]` float32, of the exit taken, at the policy's temperature.
      exit_index: `[n]` int64, the exit that answered, 0-based.
      confidence: `[n]` float32, by the policy's measure.
      latency: `[n]` float64, seconds from the call to when the answer was known.
      errors: why there is no answer, by place.
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    exit_index: np.ndarray
    confidence: np.ndarray
    latency: np.ndarray
    errors: dict[int, str]


def one_answer(packed: np.ndarray, exit_index: int, came: float) -> BatchPrediction:
    """Returns what an exit said of a single example, `[1, classes + 2]`, that came at `came`."""
    # One probability tells: a logit that is no finite number makes all of them NaN.
    if not (math.isfinite(packed[0, 0]) and math.isfinite(packed[0, -2])):
        table = AnswerTable(1, packed.shape[1] - 2)
        table.record(table.take(1, came), packed, exit_index)
        return table.all()
    return BatchPrediction(
        predicted=packed[:, -1].astype(np.int64),
        probabilities=packed[:, :-2],
        exit_index=np.array([exit_index]),
        confidence=packed[:, -2],
        latency=np.array([time.perf_counter() - came]),
        errors={},
    )


class AnswerTable:
    """Answers of at most `capacity` examples in a row, in whatever order they come.

    Examples are numbered by tickets 0, 1, ...; ticket t lies in row t % capacity.

    Attributes:
      taken: how many tickets were given out.
      released: how many answers have been handed on; `taken - released` are under way.
    """

    def __init__(self, capacity: int, classes: int):
        self.taken = 0
        self.released = 0
        self._classes = classes
        self._packed = np.full((capacity, classes + 2), np.nan, np.float32)
        self._exits = np.full(capacity, -1)
        self._times = np.zeros(capacity)  # when it came; once answered, how long that took
        self._done = np.zeros(capacity, bool)
        self._errors: dict[int, str] = {}

    @property
    def free(self) -> int:
        """How many more examples can come before answers are handed on."""
        return len(self._done) - (self.taken - self.released)

    def take(self, n: int, now: float) -> np.ndarray:
        """Returns tickets `[n]` for n examples that come now."""
        tickets = np.arange(self.taken, self.taken + n)
        self.taken += n
        self._times[tickets % len(self._done)] = now
        return tickets

    def record(self, tickets: np.ndarray, packed: np.ndarray, exit_index: int) -> None:
        """Notes what an exit said, `[n, classes + 2]` (see `dfs_jax.inference.programs`)."""
        rows = tickets % len(self._done)
        self._packed[rows] = packed
        self._exits[rows] = exit_index
        self._times[rows] = time.perf_counter() - self._times[rows]
        self._done[rows] = True
        for i in np.flatnonzero(~np.isfinite(packed).all(axis=1)):
            self.fail(int(tickets[i]), "the network's answer is not a finite number")

    def fail(self, ticket: int, reason: str) -> None:
        """Notes that an example has no answer."""
        row = ticket % len(self._done)
        self._errors[ticket] = reason
        self._packed[row] = np.nan
        self._exits[row] = -1
        self._times[row] = np.nan
        self._done[row] = True

    def release(self) -> Iterator[Prediction]:
        """Yields the answers that are next in order and known, each once."""
        while self.released < self.taken:
            start = self.released % len(self._done)
            stop = min(len(self._done), start + self.taken - self.released)
            known = self._done[start:stop]
            n = len(known) if known.all() else int(known.argmin())
            if not n:
                return
            yield from self._predictions(slice(start, start + n))

    def all(self) -> BatchPrediction:
        """Returns every answer, of a table that has been filled once and not released from."""
        return BatchPrediction(
            predicted=self._classes_of(self._packed),
            probabilities=self._packed[:, : self._classes],
            exit_index=self._exits,
            confidence=self._packed[:, self._classes],
            latency=self._times,
            errors=self._errors,
        )

    def _predictions(self, rows: slice) -> Iterator[Prediction]:
        packed = self._packed[rows].copy()
        columns = (
            self._classes_of(packed).tolist(),
            packed[:, : self._classes],
            self._exits[rows].tolist(),
            packed[:, self._classes].tolist(),
            self._times[rows].tolist(),
        )
        self._done[rows] = False
        for answer in zip(*columns, strict=True):
            index = self.released
            self.released += 1
            reason = self._errors.pop(index, None)
            if reason is None:
                yield Prediction(index, *answer)
            else:
                yield Prediction(index, None, None, None, None, None, reason)

    def _classes_of(self, packed: np.ndarray) -> np.ndarray:
        return np.nan_to_num(packed[:, -1], nan=-1).astype(np.int64)


def check_images(
    images: np.ndarray | Sequence[Any], example: jax.ShapeDtypeStruct
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Sorts out what the network cannot be asked about.

    Args:
      images: an array `[n, height, width, channels]`, or n arrays of one image each.
      example: what one image must be.

    Returns:
      The good images as one array, their places `[m]`, and why the others are none, by place.

    Raises:
      UserError: no array and no list.

    Example:
      >>> example = jax.ShapeDtypeStruct((2, 2, 3), np.float32)
      >>> images = [np.zeros((2, 2, 3)), np.zeros((2, 2)), np.full((2, 2, 3), np.nan)]
      >>> good, places, errors = check_images(images, example)
      >>> good.shape, places.tolist(), errors
      ((1, 2, 2, 3), [0], {1: 'its shape is [2, 2], not [2, 2, 3]',
      2: 'a pixel is not a finite number'})
    """
    if hasattr(images, "__array__"):
        images = np.asarray(images)
        if images.ndim and _wrong_kind(images.shape[1:], images.dtype, example) is None:
            return _without_infinite(np.asarray(images, example.dtype), np.arange(len(images)), {})
    errors, good, places = {}, [], []
    for place, image in enumerate(_one_by_one(images)):
        reason = _problem(image, example)
        if reason is None:
            good.append(np.asarray(image, example.dtype))
            places.append(place)
        else:
            errors[place] = reason
    stacked = np.stack(good) if good else np.zeros((0, *example.shape), example.dtype)
    return _without_infinite(stacked, np.array(places, np.int64), errors)


def _one_by_one(images: Any) -> list[Any]:
    try:
        return list(images)
    except TypeError as error:
        raise UserError(
            f"a batch must be an array [n, height, width, channels] or a list of images, "
            f"got {images!r:.80}"
        ) from error


def _problem(image: Any, example: jax.ShapeDtypeStruct) -> str | None:
    try:
        image = np.asarray(image)
        return _wrong_kind(image.shape, image.dtype, example)
    except (ValueError, TypeError) as error:
        return f"it is no array ({error})"


def _wrong_kind(
    shape: tuple[int, ...], dtype: np.dtype, example: jax.ShapeDtypeStruct
) -> str | None:
    if shape != example.shape:
        return f"its shape is {list(shape)}, not {list(example.shape)}"
    both_float = dtype.kind == "f" and np.dtype(example.dtype).kind == "f"
    if dtype != example.dtype and not both_float:
        return f"its type is {dtype}, not {np.dtype(example.dtype)}"
    return None


def _without_infinite(
    images: np.ndarray, places: np.ndarray, errors: dict[int, str]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    if images.dtype.kind != "f":
        return images, places, errors
    finite = np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
    if finite.all():
        return images, places, errors
    reason = "a pixel is not a finite number"
    return images[finite], places[finite], errors | dict.fromkeys(places[~finite].tolist(), reason)
