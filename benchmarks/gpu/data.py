"""The packed set as a data set for runs."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.accuracy.runner import Datasets
from benchmarks.gpu.packed import unpack
from dfs_jax.data import Dataset
from dfs_jax.data.dataset import RawDataset
from dfs_jax.data.sources import dataset_from_raw
from dfs_jax.types import Config

REHEARSED = (300, 100)  # training and test images
VALIDATION_REHEARSED = 100  # of the training images


class PackedDatasets(Datasets):
    """Data sets from a directory of `benchmarks.gpu.pack`, each unpacked once.

    Args:
      directory: directory of the packed files.
      rehearses: whether to keep only the first examples.
    """

    def __init__(self, directory: Path, *, rehearses: bool = False):
        super().__init__()
        self._directory, self._rehearses = directory, rehearses
        self._raw = functools.cache(self._unpack)

    def load(self, config: Config) -> Dataset:
        """Returns the set of a config, split and normalised as the config says."""
        section = config.data
        return dataset_from_raw(
            section.name,
            self._raw(section.name),
            validation_examples=section.validation_examples,
            split_seed=section.split_seed,
            statistics=section.statistics,
        )

    def _unpack(self, name: str) -> RawDataset:
        raw = unpack(name, self._directory)
        if not self._rehearses:
            return raw
        return first_examples(raw, *REHEARSED)


def first_examples(raw: RawDataset, train: int, test: int) -> RawDataset:
    """Returns a set in memory with only the first examples of each split."""
    parts = {
        name: getattr(raw, name).take(slice(count))
        for name, count in (("train", train), ("test", test))
    }
    return raw._replace(**parts)
