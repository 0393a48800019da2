"""Trains new heads on a frozen trunk, all at once."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dfs_jax.data.pipeline import TrainSampler, train_batches
from dfs_jax.gradients.summed import Sum
from dfs_jax.losses.deep_supervision import DeepSupervision
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.training.experiment import Experiment
from dfs_jax.training.optimizer import adamw
from dfs_jax.training.sharding import put_batch, put_replicated
from dfs_jax.training.state import create_state
from dfs_jax.training.step import make_train_step
from dfs_jax.types import UserError


def train_heads(
    experiment: Experiment,
    variables: dict[str, Any],
    *,
    epochs: int,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the variables with new heads, trained on the features of the frozen trunk.

    The loss is the sum of the exits' cross-entropies, of which each trains its own head alone. The
    trunk runs in evaluation mode and has no backward pass. Batches are those of the run, augmented
    in the same way; the optimizer is AdamW, its learning rate falls along a cosine.

    Args:
      experiment: run that the trunk comes from.
      variables: `{"params": ..., "batch_stats": ...}` of the whole network.
      epochs: number of passes over the training split.
      learning_rate: first learning rate.
      seed: random seed of the heads' initial values, the batches and the augmentation.

    Raises:
      UserError: fewer than 1 epoch.
    """
    if epochs < 1:
        raise UserError(f"heads are trained for at least 1 epoch, got {epochs}")
    e, key = experiment, jax.random.key(seed)
    fresh = init_variables(e.model, key, e.dataset.image_shape)
    start = {
        name: {**split_trunk_and_heads(variables[name])[0], **split_trunk_and_heads(tree)[1]}
        for name, tree in fresh.items()
    }
    sampler = TrainSampler(e.dataset.train.num_examples, e.config.batch_size, seed)
    steps = epochs * sampler.steps_per_epoch
    optimizer = adamw(optax.cosine_decay_schedule(learning_rate, steps))
    step = make_train_step(
        e.model.clone(frozen_trunk=True),
        e.fork,
        DeepSupervision(),
        Sum(),
        optimizer,
        e.augment,
        mean=e.dataset.mean,
        std=e.dataset.std,
        mesh=e.mesh,
    )
    # Copied, since a step donates its state.
    start = jax.tree.map(jax.numpy.copy, jax.device_get(start))
    state = create_state(start, optimizer, key, num_exits=e.model.num_exits, keep_average=False)
    state = put_replicated(state, e.mesh)
    for batch in train_batches(e.dataset.train, sampler, stop_step=steps):
        state = step(state, *put_batch(batch, e.mesh))
    return {"params": state.params, "batch_stats": state.batch_stats}
