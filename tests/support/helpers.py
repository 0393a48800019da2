"""What several test files need: a tiny config and a tiny data set that any program can be given."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from configs import common
from dfs_jax.data.dataset import RawDataset, Split
from dfs_jax.gradients.combiner import Combiner
from dfs_jax.gradients.pcgrad import PCGrad
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.models.vgg import VGG
from dfs_jax.surgery import ExitFork
from dfs_jax.types import HeadOutput

TINY_CLASSES = 3
# Three convolutions and exits compile in half of the time that VGG7's six take.
ThreeStageVGG = functools.partial(VGG, stage_sizes=(1, 1, 1), stage_multipliers=(1, 2, 4))


def tiny_images() -> RawDataset:
    """Returns a set of 8x8 images that differ in brightness by class: 41 training, 13 test ones."""
    return RawDataset(_tiny_split(41, 1), _tiny_split(13, 2), tuple("abc"))


def tiny_config(**changes: object) -> ConfigDict:
    """Returns a config that trains in seconds; `changes` name fields, `"model.width"` style."""
    config = common.get_config()
    with config.unlocked():
        config.data.name = "tests.support.helpers:tiny_images"
        config.data.augmentation = "crop"
        config.data.crop_padding = 1
        config.data.validation_examples = 11
        config.model.name = "tests.support.helpers:ThreeStageVGG"
        config.model.width = 2
        config.batch_size = 5
        config.eval_batch_size = 7
        config.epochs = 3
        config.optimizer.learning_rate = 0.05
        config.update_from_flattened_dict(changes)
    return config


class TinyNetwork(MultiExitModel):
    """A backbone of a user's own: two convolutions, two exits."""

    width: int = 3
    num_exits: int = 2

    def setup(self):
        for i in (1, 2):
            setattr(self, f"block{i}", nn.Conv(self.width, (3, 3)))
            setattr(self, f"head{i}", nn.Dense(self.num_classes))

    def block(self, i, carry, *, train):
        return nn.relu(getattr(self, f"block{i + 1}")(carry))

    def head(self, i, x, *, train):
        pooled = x.mean((1, 2))
        return HeadOutput(getattr(self, f"head{i + 1}")(pooled), pooled)


@dataclasses.dataclass
class HalfFork:
    """A fork of a user's own: scales what goes to the next block."""

    factor: float

    def __call__(self, x, *, exit_index, num_exits):
        return ExitFork(x, x * self.factor)


class BrierLoss:
    """A loss of a user's own: squared distance of the probabilities from the label."""

    def __call__(self, outputs, labels):
        one_hot = jax.nn.one_hot(labels, TINY_CLASSES)
        return ((jax.nn.softmax(outputs.logits) - one_hot) ** 2).sum(-1).mean(-1)


class Remembering(Combiner):
    """A combiner of a user's own: PCGrad's gradient, and half of that of the step before."""

    def init_trunk(self, params):
        return {"last": jax.tree.map(jax.numpy.zeros_like, params), "steps": jax.numpy.int32(0)}

    def update(self, per_exit_grads, state, params, *, key):
        grads, _ = PCGrad().update(per_exit_grads, (), params, key=key)
        grads = jax.tree.map(lambda new, last: new + last / 2, grads, state["last"])
        return grads, {"last": grads, "steps": state["steps"] + 1}


def _tiny_split(count: int, seed: int) -> Split:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, TINY_CLASSES, count).astype(np.int32)
    noise = draw.integers(0, 64, (count, 8, 8, 3))
    return Split((noise + 90 * labels[:, None, None, None]).astype(np.uint8), labels)


def made_up_record(cell, exits=6):
    """Returns what the accuracy benchmark keeps of a run, from random numbers of the cell's own."""
    draw = np.random.default_rng(sum(map(ord, cell.name)))
    macs = [10**6 * (i + 1) for i in range(exits)]
    places = {"trunk": 0.2, "block1": 0.3}
    return {
        "exits": [round(float(draw.uniform(0.3, 0.4) + 0.05 * i), 5) for i in range(exits)],
        "ensemble": 0.7,
        "budget": [[m, 0.1 + m / 1e7] for m in macs[::-1]],
        "macs": macs,
        "training_macs": 3 * macs[-1],
        "step_ms": 100.0,
        "batch_size": 100,
        "conflict": [
            {"step": step, "pairs": places, "cosines": [0.5, None, 0.1]} for step in (9, 18)
        ],
        "seconds": 90.0,
        "versions": {"jax": "1", "dfs_jax": "2"},
        "hardware": {"devices": 1, "kind": "cpu", "processor": "a chip", "cores": 1},
    }
