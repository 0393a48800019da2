"""Data sets in memory or on disk, batches of them, and augmentation on the device."""

# ruff: noqa: E402
from dfs_jax.extras import require

require("PIL")

from dfs_jax.data.augmentation import AUGMENTATIONS, create_augmentation, normalise
from dfs_jax.data.dataset import Dataset, RawDataset, Split
from dfs_jax.data.pipeline import TrainSampler, eval_batches, train_batches
from dfs_jax.data.sources import DATASETS, load_dataset
from dfs_jax.data.statistics import NAMED_STATISTICS, channel_statistics
from dfs_jax.data.streaming import StreamedSplit, Streaming

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
