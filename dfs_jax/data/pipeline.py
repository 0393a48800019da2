"""Batches from splits: a stateless training sampler, and evaluation in order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from dfs_jax.data.dataset import AnySplit, Split
from dfs_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class TrainSampler:
    """Maps a training step to its examples; a function of the step alone, so resuming is exact.

    Epoch e follows a permutation seeded by (seed, e). The last `num_examples % batch_size` examples
    of the permutation are omitted, different ones in every epoch.

    Args:
      num_examples: number of training examples.
      batch_size: number of examples in a batch.
      seed: random seed of the permutations.

    Raises:
      UserError: a batch of fewer than one or of more than all examples.

    Example:
      >>> sampler = TrainSampler(num_examples=7, batch_size=3, seed=0)
      >>> sampler.steps_per_epoch, sampler.epoch_of(5), sampler.indices(5).shape
      (2, 2, (3,))
    """

    num_examples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.batch_size <= self.num_examples:
            raise UserError(
                f"batch_size {self.batch_size} must lie between 1 and the number of training "
                f"examples, {self.num_examples}"
            )
        if self.seed < 0:
            raise UserError(f"the sampler's seed must not be negative, got {self.seed}")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_examples // self.batch_size

    def epoch_of(self, step: int) -> int:
        """Returns the epoch (0-based) that step `step` (0-based) belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """Returns the indices of the examples of one step, `[batch_size]`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_examples, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


# Two, for programs that alternate between the last step of an epoch and the first of the next.
@functools.lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    entropy = np.random.SeedSequence((seed, epoch))
    order = np.random.Generator(np.random.Philox(entropy)).permutation(num_examples)
    order.setflags(write=False)
    return order


def train_batches(
    split: AnySplit,
    sampler: TrainSampler,
    start_step: int = 0,
    *,
    stop_step: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `(images, labels)` for `start_step`, `start_step + 1`, ... up to `stop_step`.

    Args:
      split: training examples.
      sampler: sampler for the same number of examples.
      start_step: first step, 0-based.
      stop_step: step to stop before; None for no end.
      rows: rows of every batch to read, `[rows]`, if other processes read the others; None for
        all.

    Yields:
      uint8 `[rows, height, width, 3]` and int32 `[rows]`.
    """
    if sampler.num_examples != split.num_examples:
        raise ValueError(
            f"the sampler is for {sampler.num_examples} examples, the split has "
            f"{split.num_examples}"
        )
    rows = np.arange(sampler.batch_size) if rows is None else rows
    if not isinstance(split, Split):
        yield from split.train_batches(sampler, start_step, stop_step, rows)
        return
    for step in itertools.count(start_step) if stop_step is None else range(start_step, stop_step):
        images, labels = split.take(sampler.indices(step)[rows])
        yield images, labels


def eval_batches(
    split: AnySplit, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields `(images, labels, mask)` in order, every example once, all batches of one shape.

    Args:
      split: examples to evaluate.
      batch_size: number of examples in a batch; the last batch is padded with zeros. The mask is
        False for padding and for streamed images that cannot be read.
      rows: rows of every batch to read, `[rows]`, as in `train_batches`; None for all.

    Yields:
      uint8 `[rows, height, width, 3]`, int32 `[rows]`, bool `[rows]`.

    Example:
      >>> split = Split(np.zeros((5, 2, 2, 3), np.uint8), np.arange(5, dtype=np.int32))
      >>> [mask.sum().item() for _, _, mask in eval_batches(split, 3)]
      [3, 2]
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    rows = np.arange(batch_size) if rows is None else rows
    if not isinstance(split, Split):
        yield from split.eval_batches(batch_size, rows)
        return
    for start in range(0, split.num_examples, batch_size):
        mask = start + rows < split.num_examples
        images, labels = split.take(start + rows[mask])
        missing = len(rows) - len(labels)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
            labels = np.concatenate([labels, np.zeros(missing, np.int32)])
        yield images, labels, mask
