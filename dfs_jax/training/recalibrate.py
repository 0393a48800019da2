"""Recomputes BatchNorm's running statistics from training images before an evaluation.

A running average over the last ten or so batches lags behind the weights, and a channel that few
images activate has a variance near zero until one of them occurs. While the learning rate is
high, evaluation can then be far off although training is not. Recalibrated statistics belong to
the current weights:

    mean = mean_k mean_k,   var = mean_k var_k     over batches k of training images

Reference: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (PreciseBN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.data.augmentation import normalise
from dfs_jax.data.dataset import Split
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.training.experiment import Experiment, variable_shardings
from dfs_jax.training.regimes import kept_trunk
from dfs_jax.training.sharding import (
    batch_sharded,
    jit_for_mesh,
    put_batch,
    replicated,
    rows_here,
)
from dfs_jax.training.state import TrainState
from dfs_jax.training.state_sharding import constrain
from dfs_jax.types import PyTree, UserError


class Recalibration:
    """Replaces the running statistics of a network by those of training images.

    The images are the first of a permutation seeded by the run, without augmentation.

    Args:
      experiment: run whose network is recalibrated.
      examples: number of training images, rounded down to whole batches.
      step: number of steps taken: the statistics of a trunk that is frozen then are kept.

    Raises:
      UserError: a streamed data set, or fewer examples than a batch.
    """

    def __init__(self, experiment: Experiment, examples: int, *, step: int = 0):
        config, train = experiment.config, experiment.dataset.train
        if not isinstance(train, Split):
            raise UserError(
                f"recalibrate_examples={examples} needs a data set in memory, "
                f"{config.data.name!r} is streamed: leave it unset"
            )
        count = min(examples, train.num_examples) // config.batch_size
        if not count:
            raise UserError(
                f"recalibrate_examples={examples} must fill a batch of {config.batch_size}: choose "
                f"a multiple of it, or leave it unset"
            )
        order = np.random.default_rng(config.seed).permutation(train.num_examples)
        rows = order[: count * config.batch_size].reshape(count, config.batch_size)
        here = rows_here(config.batch_size, experiment.mesh)
        self._batches = [
            put_batch(train.take(batch[here]).images, experiment.mesh) for batch in rows
        ]
        self._model = experiment.model_at(step)
        self._statistics = _compiled(experiment, self._model)

    def __call__(self, state: TrainState) -> TrainState:
        """Returns the state with new statistics among the variables for evaluation.

        Training is not affected, since its steps use the statistics of their own batches.
        """
        variables = state.eval_variables
        variables = {**variables, "batch_stats": self.statistics(variables)}
        if state.averaged is not None:
            return state.replace(averaged=variables)
        return state.replace(batch_stats=variables["batch_stats"])

    def statistics(self, variables: dict[str, Any]) -> PyTree:
        """Returns new `batch_stats` for `{"params": ..., "batch_stats": ...}`."""
        found = [self._statistics(variables, images) for images in self._batches]
        means = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)
        return kept_trunk(variables["batch_stats"], means) if self._model.frozen_trunk else means


def batch_statistics(update: Callable[[PyTree], PyTree], running: PyTree) -> PyTree:
    """Returns the statistics of a batch, given the update of their running average.

    Args:
      update: `running -> m * running + (1 - m) * batch`, with m below 1, constant for each leaf.
      running: running statistics, for their shapes.

    Example:
      >>> batch_statistics(lambda x: 0.9 * x + 0.1 * 5.0, jnp.zeros(())).round(4)
      Array(5., dtype=float32)
    """
    from_zero = update(jax.tree.map(jnp.zeros_like, running))
    from_one = update(jax.tree.map(jnp.ones_like, running))
    return jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), from_zero, from_one)


def _compiled(
    experiment: Experiment, model: MultiExitModel
) -> Callable[[dict[str, Any], jax.Array], PyTree]:
    e = experiment

    def statistics(variables: dict[str, Any], images: jax.Array) -> PyTree:
        params = constrain(variables, e.mesh, model, gathered=True)["params"]
        pixels = normalise(images, e.dataset.mean, e.dataset.std)

        def update(running: PyTree) -> PyTree:
            _, updated = model.apply(
                {"params": params, "batch_stats": running},
                pixels,
                e.fork,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return updated.get("batch_stats", {})

        return batch_statistics(update, variables["batch_stats"])

    where = variable_shardings(e) or replicated(e.mesh)
    out = where["batch_stats"] if isinstance(where, dict) else where
    shardings = {"in_shardings": (where, batch_sharded(e.mesh)), "out_shardings": out}
    return jit_for_mesh(statistics, e.mesh, runs=model, **shardings)
