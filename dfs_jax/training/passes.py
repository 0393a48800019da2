"""The parts of a training step: forward and backward passes, and the optimizer's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from dfs_jax.forks import Fork
from dfs_jax.gradients import Batch, StepParts, Trained
from dfs_jax.gradients.exit_gradients import best_way, exit_gradients
from dfs_jax.gradients.summed import summed_loss
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.training.sharding import batch_sharded
from dfs_jax.training.state_sharding import constrain, scatter
from dfs_jax.types import BatchGradients, PyTree, TrunkAndHeads

# Of `{"params": ..., "batch_stats": ...}`, images, labels and the key for dropout.
Passes = Callable[[dict[str, Any], jax.Array, jax.Array, jax.Array], BatchGradients]


def make_step_parts(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    exits: str | None = None,
    *,
    accumulate_steps: int = 1,
    prepare: Callable[[jax.Array], jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> StepParts:
    """Returns the parts that a gradient rule builds its step from.

    Args:
      model: backbone that is trained.
      fork: fork at each exit.
      loss: loss of the exits.
      optimizer: optimizer of the parameters.
      exits: way through the exits for gradients of single exits, see `exit_gradients`.
      accumulate_steps: micro batches of a step, see `accumulated`.
      prepare: function applied to the images of a micro batch first, such as normalisation.
      mesh: device mesh that gradients are split over; None where they are not.
    """

    def run(passes: Passes, trained: Trained, batch: Batch) -> BatchGradients:
        params = constrain(trained.params, mesh, model, gathered=True)
        variables = {"params": params, "batch_stats": trained.batch_stats}
        passes = accumulated(prepared(passes, prepare), accumulate_steps, mesh)
        return passes(variables, batch.images, batch.labels, batch.dropout_key)

    def gradients(trained: Trained, batch: Batch, loss: Loss) -> BatchGradients:
        return run(summed_passes(model, fork, loss, mesh), trained, batch)

    def exit_gradients(trained: Trained, batch: Batch) -> BatchGradients:
        return run(single_exit_passes(model, fork, loss, exits, mesh), trained, batch)

    def update(trained: Trained, grads: PyTree) -> tuple[Trained, PyTree]:
        grads = constrain(grads, mesh, model)
        updates, opt_state = optimizer.update(grads, trained.opt_state, trained.params)
        params = optax.apply_updates(trained.params, updates)
        return Trained(params, trained.batch_stats, opt_state), updates

    def divide(batch: Batch, count: int) -> list[Batch]:
        images, labels = (deal(x, count, mesh) for x in (batch.images, batch.labels))
        dropout_keys = [jax.random.fold_in(batch.dropout_key, i) for i in range(count)]
        return [Batch(images[i], labels[i], dropout_keys[i], batch.rule_key) for i in range(count)]

    return StepParts(loss, model.num_exits, gradients, exit_gradients, update, divide)


def summed_passes(
    model: MultiExitModel, fork: Fork, loss: Loss, mesh: Mesh | None = None
) -> Passes:
    """Returns passes whose `grads`, shaped as the parameters, are those of the summed losses."""
    differentiate = jax.value_and_grad(summed_loss(model, fork, loss), has_aux=True)

    def passes(variables: dict[str, Any], images: jax.Array, labels: jax.Array, key: jax.Array):
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
