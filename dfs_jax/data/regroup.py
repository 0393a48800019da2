"""Restores the class order and the splits that a run recorded for a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfs_jax.data.dataset import AnySplit, Dataset, ImageFile, Split
from dfs_jax.data.streaming import Records, StreamedSplit
from dfs_jax.types import UserError


def relabelled(split: AnySplit, labels: Sequence[int]) -> AnySplit:
    """Returns the same examples with label `labels[i]` in place of i.

    Args:
      split: examples, in memory or streamed.
      labels: new label of each class, `[classes]`.

    Example:
      >>> two = Split(np.zeros((2, 5, 7, 3), np.uint8), np.array([0, 1], np.int32))
      >>> relabelled(two, (1, 0)).labels.tolist()
      [1, 0]
    """
    new = np.asarray(labels, np.int32)
    if np.array_equal(new, np.arange(len(new))):
        return split
    if isinstance(split, Split):
        return Split(split.images, new[split.labels])
    if isinstance(split, StreamedSplit):
        records = RelabelledRecords(split.records, new.tolist())
        return StreamedSplit(records, split.streaming, split.indices)
    raise TypeError(f"cannot change the labels of a {type(split).__name__}")


@dataclasses.dataclass(frozen=True)
class RelabelledRecords:
    """Records with label `labels[i]` in place of i."""

    records: Records
    labels: Sequence[int]

    @property
    def name(self) -> str:
        return self.records.name

    def __len__(self) -> int:
        return len(self.records)

    def describe(self, position: int) -> str:
        """Returns the name of a record for messages."""
        return self.records.describe(position)

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns the encoded image and the new label at each position."""
        return [(encoded, self.labels[label]) for encoded, label in self.records.read(positions)]


def regrouped(dataset: Dataset, part_of: Callable[[str, ImageFile], str]) -> Dataset:
    """Returns the data set with every file in the split that `part_of` names for it.

    Splits that lose or gain a file are sorted by path; the others are unchanged.

    Args:
      dataset: data set that is stored as files.
      part_of: function from `(split, file)` to `"train"`, `"validation"` or `"test"`.

    Raises:
      UserError: a file moves between splits that are streamed from different directories.
    """
    now = {
        (part, i): part_of(part, file)
        for part, some in dataset.origin.files.items()
        for i, file in enumerate(some)
    }
    changed = {part for (old, _), new in now.items() if old != new for part in (old, new)}
    if not changed:
        return dataset
    splits: dict[str, Any] = {}
    files = dict(dataset.origin.files)
    for part in sorted(changed):
        places = [place for place, new in now.items() if new == part]
        places.sort(key=lambda place: dataset.origin.files[place[0]][place[1]])
        splits[part] = _gathered(dataset, places)
        files[part] = tuple(dataset.origin.files[old][i] for old, i in places)
    files = {part: some for part, some in files.items() if some}
    return dataclasses.replace(dataset, **splits, origin=dataset.origin._replace(files=files))


def _gathered(dataset: Dataset, places: Sequence[tuple[str, int]]) -> AnySplit | None:
    """Returns the examples at `(split, position)`, in this order; None for no examples."""
    if not places:
        return None
    parts = sorted({part for part, _ in places})
    splits = {part: getattr(dataset, part) for part in parts}
    if all(isinstance(split, Split) for split in splits.values()):
        rows = {part: np.array([i for p, i in places if p == part]) for part in parts}
        images = np.concatenate([splits[p].images[rows[p]] for p in parts])
        labels = np.concatenate([splits[p].labels[rows[p]] for p in parts])
        # From the order of the splits to the requested order.
        order = np.argsort(np.argsort([parts.index(p) for p, _ in places], kind="stable"))
        return Split(images[order], labels[order])
    first = splits[parts[0]]
    if isinstance(first, StreamedSplit) and all(
        isinstance(split, StreamedSplit) and split.records is first.records
        for split in splits.values()
    ):
        indices = np.array([splits[part].indices[i] for part, i in places])
        return StreamedSplit(first.records, first.streaming, indices)
    raise UserError(
        f"data set {dataset.name!r} is streamed, and images that the run held out lie in another "
        f"directory now: put them back where they were"
    )
