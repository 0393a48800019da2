"""Streams sets that do not fit into memory: batches are decoded during training.

A step's batch depends only on the seed, the step and the set: neither on the number of workers or
processes, nor on where a run was interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dfs_jax.data.dataset import Split
from dfs_jax.data.photographs import (
    centre_box,
    cut_out,
    decode_photograph,
    mirrored,
    random_box,
)
from dfs_jax.types import UserError

if TYPE_CHECKING:
    from dfs_jax.data.pipeline import TrainSampler

# Augmentations that the crop includes; all others run on the device.
RANDOM_CUT, FLIP = "random_resized_crop", "flip"
# Number of batches that a worker prepares in advance.
_READY_BATCHES = 2
_MANY_STEPS = 2**40

_log = logging.getLogger(__name__)


class Records(Protocol):
    """Encoded images with labels, in a fixed order; can be pickled for worker processes."""

    @property
    def name(self) -> str:
        """Name of the records, for messages."""
        ...

    def __len__(self) -> int: ...

    def describe(self, position: int) -> str:
        """Returns the name of one record, for messages."""
        ...

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns the encoded image and label at each position; no bytes if it cannot be read."""
        ...


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How the images of a streamed set are cropped, and by which workers.

    Args:
      image_size: side of the network's input in pixels.
      augmentations: augmentations of training images, from `random_resized_crop` and `flip`.
      crop_area: smallest and largest fraction of the image that a random crop covers.
      centre_fraction: side of the centre crop, used without a random crop, as a fraction of the
        shorter side; 0.875 is the usual 224 out of 256.
      num_workers: number of processes that read and decode; 0 for threads of this process.
      max_corrupt: largest number of distinct unreadable images before the run is stopped.

    Raises:
      UserError: a value out of its range.
    """

    image_size: int
    augmentations: tuple[str, ...] = ()
    crop_area: tuple[float, float] = (0.08, 1.0)
    centre_fraction: float = 0.875
    num_workers: int = 0
    max_corrupt: int = 10

    def __post_init__(self):
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_area must be two rising shares in (0, 1], got {self.crop_area}")
        if not 0 < self.centre_fraction <= 1:
            raise UserError(f"centre_fraction must lie in (0, 1], got {self.centre_fraction}")
        for option in ("num_workers", "max_corrupt"):
            if getattr(self, option) < 0:
                raise UserError(f"{option} must not be negative, got {getattr(self, option)}")


class _Batch(NamedTuple):
    """Batch that a worker returns.

    Attributes:
      images: uint8 `[batch, size, size, 3]`.
      labels: int32 `[batch]`.
      is_whole: bool `[batch]`; False if the image could not be read.
      corrupt: int64 `[any]`, indices of the records that could not be read.
    """

    images: np.ndarray
    labels: np.ndarray
    is_whole: np.ndarray
    corrupt: np.ndarray


class StreamedSplit:
    """A split that stays on disk, with the interface of a `Split` in memory.

    Args:
      records: records of the whole published split.
      streaming: how its images are cropped.
      indices: indices of the records that belong to this split, `[n]`; None for all.
    """

    def __init__(self, records: Records, streaming: Streaming, indices: np.ndarray | None = None):
        self.records, self.streaming = records, streaming
        self.indices = np.arange(len(records)) if indices is None else np.asarray(indices)
        self._corrupt: set[int] = set()

    @property
    def num_examples(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        return self.streaming.image_size, self.streaming.image_size, 3

    def part(self, indices: np.ndarray) -> StreamedSplit:
        """Returns the examples at `indices`, in that order, without reading them."""
        return StreamedSplit(self.records, self.streaming, self.indices[indices])

    def take(self, indices: np.ndarray) -> Split:
        """Reads the centre crops of the examples at `indices` into memory, without corrupt ones."""
        size = min(256, max(1, len(indices)))
        parts = list(self.part(indices).eval_batches(size, np.arange(size)))
        images, labels = (
            np.concatenate([part[k][part[2]] for part in parts]).astype(dtype)
            for k, dtype in ((0, np.uint8), (1, np.int32))
        )
        return Split(images, labels)

    def train_batches(
        self, sampler: TrainSampler, start_step: int, stop_step: int | None, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the same as `train_batches` of the pipeline; `rows` of each batch.

        An image that cannot be read is replaced by the next readable one of the split, cropped as
        that one is in this epoch.
        """
        read = _TrainReader(self.records, self.streaming, self.indices, sampler, rows)
        stop = _MANY_STEPS if stop_step is None else stop_step
        for batch in self._stream(read, start_step, stop):
            yield batch.images, batch.labels

    def eval_batches(
        self, batch_size: int, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the same as `eval_batches` of the pipeline; corrupt images are masked too."""
        read = _EvalReader(self.records, self.streaming, self.indices, batch_size, rows)
        for batch in self._stream(read, 0, -(-self.num_examples // batch_size)):
            yield batch.images, batch.labels, batch.is_whole

    def _stream(self, read: Callable[[int], _Batch], start: int, stop: int) -> Iterator[_Batch]:
        batches = _batches_in_order(read, start, stop, self.streaming.num_workers)
        try:
            for images, labels, is_whole, corrupt in batches:
                self._note_corrupt(corrupt)
                yield _Batch(images, labels, is_whole, corrupt)
        finally:
            batches.close()

    def _note_corrupt(self, corrupt: np.ndarray) -> None:
        """Counts and logs images that could not be read; raises if there are too many."""
        for record in sorted(set(corrupt.tolist()) - self._corrupt):
            self._corrupt.add(record)
            _log.warning(
                "image %s of %s cannot be read, it is left out (%d so far)",
                self.records.describe(record),
                self.records.name,
                len(self._corrupt),
            )
        limit = self.streaming.max_corrupt
        if len(self._corrupt) > limit:
            named = ", ".join(map(self.records.describe, sorted(self._corrupt)[: limit + 1][:20]))
            raise UserError(
                f"{len(self._corrupt)} images of {self.records.name} cannot be read, more than "
                f"max_corrupt {limit}: {named}; replace them or raise data.max_corrupt"
            )


@dataclasses.dataclass(frozen=True)
class _TrainReader:
    """Reads this process's rows of a step's batch."""

    records: Records
    streaming: Streaming
    indices: np.ndarray
    sampler: TrainSampler
    rows: np.ndarray

    def __call__(self, step: int) -> _Batch:
        places = self.sampler.indices(step)[self.rows]
        epoch = self.sampler.epoch_of(step)
        found = self._read(places, epoch)
        corrupt = [self.indices[p] for p, item in zip(places, found, strict=True) if item is None]
        for slot, item in enumerate(found):
            if item is None:
                found[slot], passed = self._replacement(places[slot], epoch)
                corrupt += passed
        images, labels = zip(*(item for item in found if item is not None), strict=True)
        return _Batch(
            np.stack(images),
            np.array(labels, np.int32),
            np.ones(len(labels), bool),
            np.array(corrupt, np.int64),
        )

    def _replacement(self, place: int, epoch: int) -> tuple[tuple[np.ndarray, int], list[int]]:
        """Returns the next readable example, and the corrupt records found before it."""
        passed: list[int] = []
        for distance in range(1, self.streaming.max_corrupt + 2):
            other = (place + distance) % len(self.indices)
            (item,) = self._read([other], epoch)
            if item is not None:
                return item, passed
            passed.append(self.indices[other])
        # There are now too many corrupt images, so this batch will stop the run.
        return (np.zeros((*[self.streaming.image_size] * 2, 3), np.uint8), 0), passed

    def _read(
        self, places: Sequence[int] | np.ndarray, epoch: int
    ) -> list[tuple[np.ndarray, int] | None]:
        """Returns examples of the split, cropped as in this epoch; None if unreadable."""
        indices = self.indices[places].tolist()
        found: list[tuple[np.ndarray, int] | None] = []
        for index, (encoded, label) in zip(indices, self.records.read(indices), strict=True):
            image = decode_photograph(encoded)
            found.append(None if image is None else (self._augment(image, epoch, index), label))
        return found

    def _augment(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Augments an image with randomness that depends on (seed, epoch, example)."""
        how = self.streaming
        entropy = np.random.SeedSequence((self.sampler.seed, epoch, index))
        generator = np.random.Generator(np.random.Philox(entropy))
        height, width = image.shape[:2]
        if RANDOM_CUT in how.augmentations:
            box = random_box(generator, height, width, how.crop_area)
        else:
            box = centre_box(height, width, how.centre_fraction)
        image = cut_out(image, box, how.image_size)
        is_mirrored = FLIP in how.augmentations and generator.random() < 0.5
        return mirrored(image) if is_mirrored else image


@dataclasses.dataclass(frozen=True)
class _EvalReader:
    """Reads the batch of a given number in order: centre crops, padded and masked."""

    records: Records
    streaming: Streaming
    indices: np.ndarray
    batch_size: int
    rows: np.ndarray

    def __call__(self, number: int) -> _Batch:
        size, count = self.streaming.image_size, len(self.rows)
        batch = _Batch(
            np.zeros((count, size, size, 3), np.uint8),
            np.zeros(count, np.int32),
            np.zeros(count, bool),
            np.empty(0, np.int64),
        )
        places = number * self.batch_size + self.rows
        indices = self.indices[places[places < len(self.indices)]].tolist()
        # The last batch may have no rows for this process.
        found = self.records.read(indices) if indices else []
        for slot, (encoded, label) in enumerate(found):
            image = decode_photograph(encoded)
            if image is not None:
                height, width, _ = image.shape
                box = centre_box(height, width, self.streaming.centre_fraction)
                batch.images[slot] = cut_out(image, box, size)
                batch.labels[slot] = label
                batch.is_whole[slot] = True
        corrupt = np.array(indices, np.int64)[~batch.is_whole[: len(indices)]]
        return batch._replace(corrupt=corrupt)


def _batches_in_order(
    read: Callable[[int], _Batch], start: int, stop: int, num_workers: int
) -> Any:
    """Yields `read(start)`, `read(start + 1)`, ... in order, from threads or worker processes."""
    import grain

    # A worker process needs no further threads; a single process uses all cores.
    threads = 1 if num_workers else os.cpu_count() or 1
    ahead = _READY_BATCHES if num_workers else threads + _READY_BATCHES
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    # One element is a whole batch: workers alternate by batch, whatever their number.
    map_dataset: Any = grain.MapDataset  # its type is a metaclass's, which pyright misreads
    numbers = map_dataset.range(start, stop)
    batches = numbers.map(_AsTuple(read)).to_iter_dataset(reading)
    if num_workers:
        _let_grain_read_its_flags()
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options)
    return iter(batches)


@dataclasses.dataclass(frozen=True)
class _AsTuple:
    """A batch as a plain tuple of arrays, which workers send through shared memory."""

    read: Callable[[int], _Batch]

    def __call__(self, number: int) -> tuple[np.ndarray, ...]:
        return tuple(self.read(int(number)))


def _let_grain_read_its_flags() -> None:
    """Marks absl's flags as parsed, since Grain's workers read them in programs without absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
