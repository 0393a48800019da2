"""What several test files need: a tiny config and a tiny data set that any program can be given."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from configs import common
from dfs_jax.data.dataset import RawDataset, Split

TINY_CLASSES = 3


def tiny_images() -> RawDataset:
    """Returns a set of 8x8 images that differ in brightness by class: 41 training, 13 test ones."""
    return RawDataset(_tiny_split(41, 1), _tiny_split(13, 2), tuple("abc"))


def tiny_config(**changes: object) -> ConfigDict:
    """Returns a config that trains in seconds; `changes` name fields, `"model.width"` style."""
    config = common.get_config()
    with config.unlocked():
        config.data.name = "tests.helpers:tiny_images"
        config.data.augmentation = "crop"
        config.data.crop_padding = 1
        config.data.validation_examples = 11
        config.model.width = 2
        config.batch_size = 5
        config.eval_batch_size = 7
        config.epochs = 3
        config.optimizer.learning_rate = 0.05
        config.update_from_flattened_dict(changes)
    return config


def _tiny_split(count: int, seed: int) -> Split:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, TINY_CLASSES, count).astype(np.int32)
    noise = draw.integers(0, 64, (count, 8, 8, 3))
    return Split((noise + 90 * labels[:, None, None, None]).astype(np.uint8), labels)
