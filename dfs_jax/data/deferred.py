"""Splits that are read on first use; their number of examples and image shape are known before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dfs_jax.data.dataset import AnySplit, Split
from dfs_jax.data.pipeline import eval_batches, train_batches
from dfs_jax.types import UserError


class DeferredSplit:
    """A recorded split with the interface of `Split`, read on first use.

    Args:
      num_examples: number of examples when the split was recorded.
      image_shape: `(height, width, channels)`.
      read: function that returns the examples.

    Example:
      >>> empty = Split(np.zeros((2, 5, 7, 3), np.uint8), np.zeros(2, np.int32))
      >>> split = DeferredSplit(2, (5, 7, 3), lambda: empty)
      >>> split.take(np.array([1])).labels.tolist()
      [0]
    """

    def __init__(
        self, num_examples: int, image_shape: tuple[int, int, int], read: Callable[[], AnySplit]
    ):
        self.num_examples, self.image_shape, self._read = num_examples, image_shape, read

    @functools.cached_property
    def split(self) -> AnySplit:
        """The examples, read on first use."""
        return self._read()

    @property
    def images(self) -> np.ndarray:
        """Images of a split in memory, see `Split`."""
        return self._in_memory.images

    @property
    def labels(self) -> np.ndarray:
        """Labels of a split in memory, see `Split`."""
        return self._in_memory.labels

    @property
    def _in_memory(self) -> Split:
        if not isinstance(self.split, Split):
            raise UserError(
                "the split is streamed and has no arrays: read it with take(indices), or by batches"
            )
        return self.split

    def part(self, indices: np.ndarray) -> AnySplit:
        """Returns the examples at `indices`, in that order."""
        return self.split.part(indices)

    def take(self, indices: np.ndarray) -> Split:
        """Returns the examples at `indices`, in memory."""
        return self.split.take(indices)

    def train_batches(
        self, sampler: Any, start_step: int, stop_step: int | None, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the same as `dfs_jax.data.pipeline.train_batches` for the examples."""
        return train_batches(self.split, sampler, start_step, stop_step=stop_step, rows=rows)

    def eval_batches(
        self, batch_size: int, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the same as `dfs_jax.data.pipeline.eval_batches` for the examples."""
        return eval_batches(self.split, batch_size, rows)
