"""Feeds training images from the host or from device memory to the dispatches of a run."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dfs_jax.data.dataset import Split
from dfs_jax.data.pipeline import train_batches
from dfs_jax.training.dispatch import BATCH, BATCHES, INDICES
from dfs_jax.training.experiment import Experiment
from dfs_jax.training.processes import by_writer
from dfs_jax.training.sharding import put_batch, put_replicated, rows_here
from dfs_jax.types import UserError

# Fraction of a device's memory that images may take by default.
SHARE = 1 / 8
_ASSUMED_MEMORY = 8 * 2**30  # bytes, for a device that does not report its memory


class Feed(Protocol):
    """Inputs of successive dispatches, in the order of the sampler.

    Attributes:
      takes: kind of input that the step is compiled for, see `dispatch`.
    """

    takes: str

    def next(self, steps: int) -> tuple[jax.Array, ...]:
        """Returns the inputs of the next `steps` steps besides the state."""
        ...


class HostFeed:
    """Copies every batch to the devices; the batches of a dispatch are stacked.

    Args:
      experiment: run whose training split is read, from memory or from disk.
      start: first step, 0-based.
      is_stacked: whether a dispatch can have several steps.
    """

    def __init__(self, experiment: Experiment, start: int, *, is_stacked: bool):
        self.takes = BATCHES if is_stacked else BATCH
        self._mesh = experiment.mesh
        self._batches = train_batches(
            experiment.dataset.train,
            experiment.sampler,
            start,
            stop_step=experiment.total_steps,
            rows=rows_here(experiment.config.batch_size, experiment.mesh),
        )

    def next(self, steps: int) -> tuple[jax.Array, ...]:
        if self.takes == BATCH:
            return put_batch(next(self._batches), self._mesh)
        batches = itertools.islice(self._batches, steps)
        stacked = tuple(np.stack(parts) for parts in zip(*batches, strict=True))
        return put_batch(stacked, self._mesh, axis=1)


class DeviceFeed:
    """Holds the training split on every device; dispatches receive indices of examples.

    Args:
      experiment: run whose training split is in memory.
      start: first step, 0-based.
    """

    takes = INDICES

    def __init__(self, experiment: Experiment, start: int):
        self._mesh, self._sampler, self._step = experiment.mesh, experiment.sampler, start
        self._rows = rows_here(experiment.config.batch_size, experiment.mesh)
        split: Any = experiment.dataset.train
        self._data = put_replicated(tuple(split), experiment.mesh)

    def next(self, steps: int) -> tuple[jax.Array, ...]:
        first, self._step = self._step, self._step + steps
        chosen = [self._sampler.indices(step)[self._rows] for step in range(first, self._step)]
        return (*self._data, put_batch(np.stack(chosen).astype(np.int32), self._mesh, axis=1))


class _Place(NamedTuple):
    """A device and its memory in bytes; None if it does not report it."""

    platform: str
    memory: int | None


def create_feed(experiment: Experiment, start: int) -> Feed:
    """Returns the feed of a run from step `start` on, from device memory if the images fit."""
    if lies_on_device(experiment):
        return DeviceFeed(experiment, start)
    return HostFeed(experiment, start, is_stacked=steps_per_dispatch(experiment.config) > 1)


def steps_per_dispatch(config: Any) -> int:
    """Returns the largest number of steps in a dispatch."""
    steps = config.get("steps_per_dispatch")
    return 1 if steps is None else steps


def lies_on_device(experiment: Experiment) -> bool:
    """Returns whether training and validation images are held in device memory.

    This is `data.on_device` if it is set. By default, images are held if the devices are not CPUs,
    the set is in memory, and its images take at most an eighth of each device's memory.

    Raises:
      UserError: `data.on_device` with a streamed set, or one larger than the devices' memory.
    """
    # The same answer for all processes, whose devices may differ in free memory.
    return by_writer(_lies_on_device, experiment)


def _lies_on_device(experiment: Experiment) -> bool:
    asked: bool | None = experiment.config.data.get("on_device")
    size, place = _image_bytes(experiment), _place(experiment)
    if asked and size is None:
        raise UserError(
            "data.on_device=True is for sets that are read into memory, and this one is streamed: "
            "leave it unset"
        )
    if asked and place.memory is not None and size is not None and size > place.memory:
        raise UserError(
            f"data.on_device=True: the images take {size / 2**30:.1f} GiB of the "
            f"{place.memory / 2**30:.1f} GiB that a device has: leave it unset"
        )
    if asked is not None or size is None:
        return bool(asked)
    return place.platform != "cpu" and size <= SHARE * (place.memory or _ASSUMED_MEMORY)


def _image_bytes(experiment: Experiment) -> int | None:
    """Returns the size of training and validation images in bytes; None if they are streamed."""
    splits = (experiment.dataset.train, experiment.dataset.validation)
    sizes = [split.images.nbytes for split in splits if isinstance(split, Split)]
    return sum(sizes) if len(sizes) == sum(split is not None for split in splits) else None


def _place(experiment: Experiment) -> _Place:
    device = experiment.mesh.local_devices[0]
    stats = device.memory_stats() or {}
    return _Place(device.platform, stats.get("bytes_limit"))
