"""Trains new heads on a frozen trunk, all at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dfs_jax.data.pipeline import TrainSampler, train_batches
from dfs_jax.models.contract import MultiExitModel, init_variables, split_trunk_and_heads
from dfs_jax.training.experiment import Experiment
from dfs_jax.training.optimizer import adamw
from dfs_jax.training.step import preparation
from dfs_jax.types import PyTree, UserError


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
      UserError: a model whose blocks and heads cannot run by themselves, or no epoch.
    """
    e = experiment
    if not e.model.runs_in_blocks:
        raise UserError(
            f"heads are trained on frozen features for models that run in blocks, which "
            f"{e.config.model.name} does not: choose a run of another model"
        )
    if epochs < 1:
        raise UserError(f"heads are trained for at least 1 epoch, got {epochs}")
    key = jax.random.key(seed)
    fresh = init_variables(e.model, key, e.dataset.image_shape)
    trunk, heads = {}, {}
    for name in ("params", "batch_stats"):
        trunk[name] = jax.device_get(split_trunk_and_heads(variables[name])[0])
        heads[name] = split_trunk_and_heads(fresh[name])[1]
    sampler = TrainSampler(e.dataset.train.num_examples, e.config.batch_size, seed)
    steps = epochs * sampler.steps_per_epoch
    optimizer = adamw(optax.cosine_decay_schedule(learning_rate, steps))
    prepare = preparation(e.model, e.dataset.mean, e.dataset.std)
    apply: Any = e.model.apply

    @jax.jit
    def step(heads: PyTree, opt_state: PyTree, trunk: PyTree, images, labels, key):
        augment_key, dropout_key = jax.random.split(key)
        pixels = prepare(e.augment(images, augment_key))

        def loss(params: PyTree):
            whole = {
                "params": {**trunk["params"], **params},
                "batch_stats": {**trunk["batch_stats"], **heads["batch_stats"]},
            }
            logits, updated = apply(
                whole,
                pixels,
                e.fork,
                method=_heads_on_frozen_features,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            _, statistics = split_trunk_and_heads(updated.get("batch_stats", {}))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None])
            return losses.mean(axis=1).sum(), statistics

        gradients, statistics = jax.grad(loss, has_aux=True)(heads["params"])
        updates, opt_state = optimizer.update(gradients, opt_state, heads["params"])
        params = optax.apply_updates(heads["params"], updates)
        return {"params": params, "batch_stats": statistics}, opt_state

    opt_state = optimizer.init(heads["params"])
    for number, (images, labels) in enumerate(
        train_batches(e.dataset.train, sampler, stop_step=steps)
    ):
        its_key = jax.random.fold_in(key, number)
        heads, opt_state = step(heads, opt_state, trunk, images, np.asarray(labels), its_key)
    return {name: {**trunk[name], **heads[name]} for name in trunk}


def _heads_on_frozen_features(model: MultiExitModel, images: jax.Array, fork: Any) -> jax.Array:
    """Runs every head in training mode on features of the trunk in evaluation mode."""
    carry, logits = images, []
    for i in range(model.num_exits):
        carry = lax.stop_gradient(model.run_block(fork, i, carry))
        logits.append(model.run_head(fork, i, carry, train=True).logits)
    return jnp.stack(logits)
