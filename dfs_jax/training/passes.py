"""The passes forward and backward of a step: of a batch at once, or in micro batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from dfs_jax.combiners.exit_gradients import best_way, exit_gradients
from dfs_jax.forks import Fork
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.training.sharding import batch_sharded
from dfs_jax.training.state_sharding import scatter
from dfs_jax.types import BatchGradients, PyTree, TrunkAndHeads

# Of `{"params": ..., "batch_stats": ...}`, images, labels and the key for dropout.
Passes = Callable[[dict[str, Any], jax.Array, jax.Array, jax.Array], BatchGradients]


def summed_passes(
    model: MultiExitModel, fork: Fork, loss: Loss, mesh: Mesh | None = None
) -> Passes:
    """Returns passes whose `grads`, shaped as the parameters, are those of the summed losses."""

    def loss_fn(params: PyTree, variables: dict[str, Any], images, labels, key):
        outputs, updated = model.apply(
            {**variables, "params": params},
            images,
            fork,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        total = jnp.sum(loss(outputs, labels))
        return total, (outputs.logits, updated.get("batch_stats", {}))

    def passes(variables: dict[str, Any], images: jax.Array, labels: jax.Array, key: jax.Array):
        differentiate = jax.value_and_grad(loss_fn, has_aux=True)
        (total, (logits, stats)), grads = differentiate(
            variables["params"], variables, images, labels, key
        )
        return BatchGradients(total, logits, scatter(grads, mesh, model), stats)

    return passes


def single_exit_passes(
    model: MultiExitModel, fork: Fork, loss: Loss, exits: str | None, mesh: Mesh | None = None
) -> Passes:
    """Returns passes whose `grads` are `TrunkAndHeads`; `exits` as in `exit_gradients`."""
    if exits is None and mesh is not None:  # whose devices this process may not be running on
        exits = best_way(mesh.devices.flat[0].platform)

    def passes(variables: dict[str, Any], images: jax.Array, labels: jax.Array, key: jax.Array):
        found = exit_gradients(model, fork, loss, variables, images, labels, key=key, exits=exits)
        grads = TrunkAndHeads(
            scatter(found.trunk, mesh, model, leading=1), scatter(found.heads, mesh, model)
        )
        return BatchGradients(jnp.sum(found.losses), found.logits, grads, found.batch_stats)

    return passes


def prepared(passes: Passes, prepare: Callable[[jax.Array], jax.Array] | None) -> Passes:
    """Returns the passes of images that `prepare` is applied to first."""
    if prepare is None:
        return passes
    return lambda variables, images, labels, key: passes(variables, prepare(images), labels, key)


def accumulated(passes: Passes, steps: int, mesh: Mesh | None = None) -> Passes:
    """Returns passes that take a batch in `steps` equal micro batches, one after another.

    Memory is that of a micro batch. Losses and gradients are the means of theirs. Batch statistics
    are each micro batch's own, and the running ones are updated by one after the other. So what
    couples the examples of a batch (BatchNorm, and the feature distance of BYOT, a norm over all of
    them) couples those of a micro batch; all else is as for the batch at once.

    Args:
      passes: of one micro batch.
      steps: how many; micro batch k holds examples k, k + steps, k + 2 steps, ... so that each
        device goes on with its own.
      mesh: over which the batch is divided; None where it is not.
    """
    if steps == 1:
        return passes

    def run(variables: dict[str, Any], images: jax.Array, labels: jax.Array, key: jax.Array):
        def step(carry: tuple[PyTree, PyTree], micro: tuple[jax.Array, ...]):
            stats, sums = carry
            number, some_images, some_labels = micro
            found = passes(
                {**variables, "batch_stats": stats},
                some_images,
                some_labels,
                jax.random.fold_in(key, number),
            )
            sums = jax.tree.map(jnp.add, sums, (found.loss, found.grads))
            return (found.batch_stats, sums), found.logits

        dealt = deal(images, steps, mesh), deal(labels, steps, mesh)
        shapes = jax.eval_shape(passes, variables, *(x[0] for x in dealt), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes.loss, shapes.grads))
        (stats, sums), logits = lax.scan(
            step, (variables["batch_stats"], zeros), (jnp.arange(steps), *dealt)
        )
        loss, grads = jax.tree.map(lambda leaf: leaf / steps, sums)
        return BatchGradients(loss, _in_order(logits), grads, stats)

    return run


def deal(batch: jax.Array, count: int, mesh: Mesh | None = None) -> jax.Array:
    """Returns `count` equal parts of a batch, `[count, batch / count, ...]`.

    Part k holds examples k, k + count, k + 2 count, ... so that each device goes on with its own.

    >>> deal(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    parts = batch.reshape(-1, count, *batch.shape[1:]).swapaxes(0, 1)
    if mesh is None:
        return parts
    return lax.with_sharding_constraint(parts, batch_sharded(mesh, axis=1))


def _in_order(logits: jax.Array) -> jax.Array:
    """Returns `[exits, batch, classes]` from the micro batches' `[steps, exits, ...]`."""
    _, exits, _, classes = logits.shape
    return logits.transpose(1, 2, 0, 3).reshape(exits, -1, classes)
