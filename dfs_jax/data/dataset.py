"""Image classification sets: splits in memory or on disk, class names, statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from dfs_jax.types import UserError


class Split(NamedTuple):
    """Examples of a set in memory.

    Attributes:
      images: uint8 `[n, height, width, 3]`.
      labels: int32 `[n]`, in `[0, classes)`.
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> Split:
        """Returns the examples at `indices`, in that order (a copy)."""
        return Split(self.images[indices], self.labels[indices])

    def part(self, indices: np.ndarray) -> Split:
        """Returns `take(indices)`, since the images are already in memory."""
        return self.take(indices)

    @property
    def num_examples(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels


class SplitOnDisk(Protocol):
    """Examples of a set that are read when they are used; see `StreamedSplit`."""

    @property
    def num_examples(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def part(self, indices: np.ndarray) -> AnySplit: ...

    def take(self, indices: np.ndarray) -> Split: ...

    def train_batches(
        self, sampler: Any, start_step: int, stop_step: int | None, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...

    def eval_batches(
        self, batch_size: int, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]: ...


AnySplit: TypeAlias = Split | SplitOnDisk


class ImageFile(NamedTuple):
    """File of one example.

    Attributes:
      path: path relative to the set's directory, `SPLIT/CLASS/...` with forward slashes.
      size: size in bytes.
    """

    path: str
    size: int

    @property
    def class_name(self) -> str:
        """Directory of its class."""
        return self.path.split("/")[1]


class Origin(NamedTuple):
    """Record that identifies a version of a set without reading its images.

    Attributes:
      files: files of each split that is stored as files, in the order of its examples.
      version: version of a prepared TFDS set.
      left_out: files that are not readable images and belong to no split.
    """

    files: Mapping[str, tuple[ImageFile, ...]] = {}
    version: str | None = None
    left_out: tuple[ImageFile, ...] = ()


NO_ORIGIN = Origin()


class RawDataset(NamedTuple):
    """Result of a source: the set as published, before any examples are held out.

    Attributes:
      train: training examples.
      test: test examples; None if some of train are to be held out for the test.
      class_names: name of each class.
      validation: the set's own validation split, or None.
      origin: files of `train`, `test` and `validation`, or the version.
    """

    train: AnySplit
    test: AnySplit | None
    class_names: tuple[str, ...]
    validation: AnySplit | None = None
    origin: Origin = NO_ORIGIN


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image classification set, ready for training.

    Attributes:
      name: name passed to `load_dataset`.
      train: training examples.
      validation: examples for all choices (checkpoint, thresholds); None if none are held out.
      test: examples for final reports.
      class_names: name of each class.
      mean: mean of each channel, in units in which white is 1.
      std: standard deviation of each channel, in the same units.
      origin: files of each split, or the version.
    """

    name: str
    train: AnySplit
    validation: AnySplit | None
    test: AnySplit
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: Origin = NO_ORIGIN

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        return self.train.image_shape


def check_raw_dataset(name: str, raw: Any) -> RawDataset:
    """Returns `raw` with labels as int32, after checking the result of a source.

    Args:
      name: name of the set, for messages.
      raw: `RawDataset`, or a plain tuple of its fields with plain pairs as splits.

    Raises:
      UserError: wrong fields, dtypes, shapes, lengths or labels.
    """
    try:
        train, test, class_names, *rest = raw
        absent: tuple[Any, Any] = (None, NO_ORIGIN)
        validation, origin = (*rest, *absent[len(rest) :])
        splits = {"train": train, "test": test, "validation": validation}
        named = {key: Split(*split) for key, split in splits.items() if split is not None}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data set {name!r} must return (train, test, class_names) or (train, test, "
            f"class_names, validation), each split a pair (images, labels): {error}"
        ) from error
    size = np.shape(named["train"].images)[1:]
    checked: dict[str, Any] = {
        key: _check_split(f"{name} {key}", split, size, len(class_names))
        for key, split in named.items()
    }
    checked.setdefault("test", None)
    return RawDataset(class_names=tuple(str(c) for c in class_names), origin=origin, **checked)


def _check_split(where: str, split: Split, size: tuple[int, ...], num_classes: int) -> Split:
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"the images of {where} must be uint8 [n, height, width, 3], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1:] != size:
        raise UserError(
            f"the images of {where} are {list(images.shape[1:])}, those of train {list(size)}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"the labels of {where} must be {len(images)} integers, one for each image, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if not labels.size:
        raise UserError(f"{where} has no examples")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"the labels of {where} run from {labels.min()} to {labels.max()}: "
            f"with {num_classes} classes they must lie in [0, {num_classes})"
        )
    return Split(images, labels.astype(np.int32))
