"""Results of early-exit inference, and the table in which answers wait for their turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.types import Example, UserError


class Prediction(NamedTuple):
    """Answer of the network for one example.

    Where there is an error, all fields but `index` and `error` are None.

    Attributes:
      index: position in the input, counted over all batches.
      predicted: predicted class.
      probabilities: class probabilities of the exit taken, at the policy's temperature,
        `[classes]` float32.
      exit_index: exit that answered, 0-based.
      confidence: confidence by the policy's measure.
      latency: seconds from reading the example to knowing its answer.
      error: reason why there is no answer, or None.
    """

    index: int
    predicted: int | None
    probabilities: np.ndarray | None
    exit_index: int | None
    confidence: float | None
    latency: float | None
    error: str | None = None


class BatchPrediction(NamedTuple):
    """Answers of the network for n examples; those with an error have -1 and NaN.

    Attributes:
      predicted: predicted classes, `[n]` int64.
      probabilities: class probabilities of the exit taken, at the policy's temperature,
        `[n, classes]` float32.
      exit_index: exits that answered, 0-based, `[n]` int64.
      confidence: confidence by the policy's measure, `[n]` float32.
      latency: seconds from the call to knowing the answer, `[n]` float64.
      errors: reasons why there is no answer, by position.
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    exit_index: np.ndarray
    confidence: np.ndarray
    latency: np.ndarray
    errors: dict[int, str]


def one_answer(packed: np.ndarray, exit_index: int, came: float) -> BatchPrediction:
    """Returns the answer of a single example from its packed row.

    Args:
      packed: packed answer, `[1, classes + 2]` (see `dfs_jax.inference.programs`).
      exit_index: exit that answered, 0-based.
      came: time of arrival, in seconds of `time.perf_counter`.
    """
    # One probability is enough: a logit that is not finite makes all of them NaN.
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
    """Table that takes answers in any order and releases them in the order of the examples.

    Examples are numbered by tickets 0, 1, ..., and ticket t uses row t % capacity.

    Args:
      capacity: number of rows, the maximum number of examples in flight.
      classes: number of classes.

    Attributes:
      taken: number of tickets given out.
      released: number of answers released; `taken - released` examples are in flight.
    """

    def __init__(self, capacity: int, classes: int):
        self.taken = 0
        self.released = 0
        self._classes = classes
        self._packed = np.full((capacity, classes + 2), np.nan, np.float32)
        self._exits = np.full(capacity, -1)
        self._times = np.zeros(capacity)  # time of arrival; once answered, latency
        self._done = np.zeros(capacity, bool)
        self._errors: dict[int, str] = {}

    @property
    def free(self) -> int:
        """Number of further examples that the table can take before answers are released."""
        return len(self._done) - (self.taken - self.released)

    def take(self, n: int, now: float) -> np.ndarray:
        """Returns tickets `[n]` for n examples that arrive at the time `now`."""
        tickets = np.arange(self.taken, self.taken + n)
        self.taken += n
        self._times[tickets % len(self._done)] = now
        return tickets

    def record(self, tickets: np.ndarray, packed: np.ndarray, exit_index: int) -> None:
        """Records an exit's answers `[n, classes + 2]` (see `dfs_jax.inference.programs`)."""
        rows = tickets % len(self._done)
        self._packed[rows] = packed
        self._exits[rows] = exit_index
        self._times[rows] = time.perf_counter() - self._times[rows]
        self._done[rows] = True
        for i in np.flatnonzero(~np.isfinite(packed).all(axis=1)):
            self.fail(int(tickets[i]), "the network's answer is not a finite number")

    def fail(self, ticket: int, reason: str) -> None:
        """Records that an example has no answer, and why."""
        row = ticket % len(self._done)
        self._errors[ticket] = reason
        self._packed[row] = np.nan
        self._exits[row] = -1
        self._times[row] = np.nan
        self._done[row] = True

    def release(self) -> Iterator[Prediction]:
        """Yields the known answers that are next in order."""
        while self.released < self.taken:
            start = self.released % len(self._done)
            stop = min(len(self._done), start + self.taken - self.released)
            known = self._done[start:stop]
            n = len(known) if known.all() else int(known.argmin())
            if not n:
                return
            yield from self._predictions(slice(start, start + n))

    def all(self) -> BatchPrediction:
        """Returns all answers of a table that was filled once and has released none."""
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
    images: np.ndarray | Sequence[Any], example: Example
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Separates the images that the network accepts from the others.

    Args:
      images: array `[n, height, width, channels]`, or n arrays of one image each.
      example: required shape and type of an image.

    Returns:
      The valid images as one array, their positions `[m]`, and the reasons why the others are
      refused, by position.

    Raises:
      UserError: neither an array nor a list.

    Example:
      >>> from dfs_jax.types import ArrayShape
      >>> example = ArrayShape((2, 2, 3), np.float32)
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


def _problem(image: Any, example: Example) -> str | None:
    try:
        image = np.asarray(image)
        return _wrong_kind(image.shape, image.dtype, example)
    except (ValueError, TypeError) as error:
        return f"it is not an array ({error})"


def _wrong_kind(shape: tuple[int, ...], dtype: np.dtype, example: Example) -> str | None:
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
