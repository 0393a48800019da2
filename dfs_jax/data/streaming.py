"""Sets that do not fit into memory: batches decoded while training runs, a function of the step.

What a step trains on depends on nothing but the seed, the step and the set: neither on the number
of workers or processes, nor on where a run was interrupted.
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

# What is drawn while an image is cut; all else is drawn on the device.
RANDOM_CUT, FLIP = "random_resized_crop", "flip"
# Batches that a worker has ready before they are asked for.
_READY_BATCHES = 2
_MANY_STEPS = 2**40

_log = logging.getLogger(__name__)


class Records(Protocol):
    """Encoded images with labels, in a fixed order; it is pickled to reach worker processes."""

    @property
    def name(self) -> str:
        """What messages call them."""
        ...

    def __len__(self) -> int: ...

    def describe(self, position: int) -> str:
        """Returns what a message calls one of them."""
        ...

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns the encoded image and the label at each position; no bytes: cannot be read."""
        ...


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How a streamed set's images are cut, and by whom.

    Args:
      image_size: side in pixels of what a network is given.
      augmentations: of training images, from `random_resized_crop` and `flip`.
      crop_area: least and largest share of the image that a random crop covers.
      centre_fraction: side of the square that is cut out of the middle elsewhere, as a fraction of
        the shorter side; 0.875 is the usual 224 out of 256.
      num_workers: processes that read and decode; 0: threads of this process.
      max_corrupt: different images that may turn out unreadable before the run is stopped.

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
    """What a worker hands over.

    Attributes:
      images: uint8 `[batch, size, size, 3]`.
      labels: int32 `[batch]`.
      is_whole: bool `[batch]`; False where the image could not be read.
      corrupt: int64 `[any]`, the records that could not be read.
    """

    images: np.ndarray
    labels: np.ndarray
    is_whole: np.ndarray
    corrupt: np.ndarray


class StreamedSplit:
    """Some examples of a set that stays on disk; stands where a `Split` in memory would.

    Args:
      records: the whole published split.
      streaming: how its images are cut.
      indices: the records that belong to this split, `[n]`; None for all.
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
        """Returns the examples at `indices`, in that order; nothing is read."""
        return StreamedSplit(self.records, self.streaming, self.indices[indices])

    def take(self, indices: np.ndarray) -> Split:
        """Reads the examples at `indices` into memory, their centres, without what is corrupt."""
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
        """Yields what `train_batches` of the pipeline does; `rows` of each batch.

        An image that cannot be read is replaced in its place by the next readable one of the split,
        as that one is cut in this epoch.
        """
        read = _TrainReader(self.records, self.streaming, self.indices, sampler, rows)
        stop = _MANY_STEPS if stop_step is None else stop_step
        for batch in self._stream(read, start_step, stop):
            yield batch.images, batch.labels

    def eval_batches(
        self, batch_size: int, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields what `eval_batches` of the pipeline does; corrupt images are masked too."""
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
        """Counts and names images that could not be read; stops at too many."""
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
    """From a step to this process's rows of its batch."""

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
        """The next readable example, and the records that were found corrupt on the way."""
        passed: list[int] = []
        for distance in range(1, self.streaming.max_corrupt + 2):
            other = (place + distance) % len(self.indices)
            (item,) = self._read([other], epoch)
            if item is not None:
                return item, passed
            passed.append(self.indices[other])
        # Too many by now: whoever takes this batch stops.
        return (np.zeros((*[self.streaming.image_size] * 2, 3), np.uint8), 0), passed

    def _read(
        self, places: Sequence[int] | np.ndarray, epoch: int
    ) -> list[tuple[np.ndarray, int] | None]:
        """The examples at places of the split, as this epoch cuts them; None where unreadable."""
        indices = self.indices[places].tolist()
        found: list[tuple[np.ndarray, int] | None] = []
        for index, (encoded, label) in zip(indices, self.records.read(indices), strict=True):
            image = decode_photograph(encoded)
            found.append(None if image is None else (self._augment(image, epoch, index), label))
        return found

    def _augment(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """One draw for each (seed, epoch, example)."""
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
    """From a batch's number to the examples in order, centres cut out; padded and masked."""

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
        # A last batch may leave a process nothing.
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

    # In a process of its own a worker needs no further threads; one process fills its cores.
    threads = 1 if num_workers else os.cpu_count() or 1
    ahead = _READY_BATCHES if num_workers else threads + _READY_BATCHES
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    # A whole batch is one element: workers take turns by batch, and their number changes nothing.
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
    """A plain tuple of the arrays, which reach another process through shared memory."""

    read: Callable[[int], _Batch]

    def __call__(self, number: int) -> tuple[np.ndarray, ...]:
        return tuple(self.read(int(number)))


def _let_grain_read_its_flags() -> None:
    """Grain's workers read absl's flags, which nobody has parsed in a program without absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
