"""Data sets in memory or on disk, batches of them, and augmentation on the device.

The names below are imported on first use: decoding an image takes neither jax nor a data set.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dfs_jax.extras import require

require("PIL")

if TYPE_CHECKING:
    from dfs_jax.data.augmentation import AUGMENTATIONS, create_augmentation, normalise
    from dfs_jax.data.dataset import Dataset, RawDataset, Split
    from dfs_jax.data.pipeline import TrainSampler, eval_batches, train_batches
    from dfs_jax.data.sources import DATASETS, load_dataset
    from dfs_jax.data.statistics import NAMED_STATISTICS, channel_statistics
    from dfs_jax.data.streaming import StreamedSplit, Streaming

_HOMES = {
    "AUGMENTATIONS": "augmentation",
    "DATASETS": "sources",
    "NAMED_STATISTICS": "statistics",
    "Dataset": "dataset",
    "RawDataset": "dataset",
    "Split": "dataset",
    "StreamedSplit": "streaming",
    "Streaming": "streaming",
    "TrainSampler": "pipeline",
    "channel_statistics": "statistics",
    "create_augmentation": "augmentation",
    "eval_batches": "pipeline",
    "load_dataset": "sources",
    "normalise": "augmentation",
    "train_batches": "pipeline",
}

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "NAMED_STATISTICS",
    "Dataset",
    "RawDataset",
    "Split",
    "StreamedSplit",
    "Streaming",
    "TrainSampler",
    "channel_statistics",
    "create_augmentation",
    "eval_batches",
    "load_dataset",
    "normalise",
    "train_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
