"""The parts of a training step: forward and backward passes, and the optimizer's update."""

from __future__ import annotations

import functools
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
from dfs_jax.gradients.rule import Passes
from dfs_jax.gradients.summed import summed_loss
from dfs_jax.losses import Loss, LossFunction
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.training.regimes import kept_trunk, scaled_trunk
from dfs_jax.training.sharding import batch_sharded
from dfs_jax.training.state_sharding import constrain, scatter
from dfs_jax.types import PyTree, TrunkAndHeads


def make_step_parts(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    exits: str | None = None,
    *,
    accumulate_steps: int = 1,
    prepare: Callable[[jax.Array], jax.Array] = lambda images: images,
    mesh: Mesh | None = None,
    trunk_rate: float = 1.0,
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
      trunk_rate: learning rate of the trunk, in multiples of the heads'.
    """

    def update(trained: Trained, grads: PyTree) -> tuple[Trained, PyTree]:
        grads = constrain(grads, mesh, model)
        updates, opt_state = optimizer.update(grads, trained.opt_state, trained.params)
        updates = scaled_trunk(updates, trunk_rate)
        params = optax.apply_updates(trained.params, updates)
        if model.frozen_trunk:
            params = kept_trunk(trained.params, params)
            opt_state = kept_trunk(trained.opt_state, opt_state)
        return Trained(params, trained.batch_stats, opt_state), updates

    def divide(batch: Batch, count: int) -> list[Batch]:
        images, labels = (deal(x, count, mesh) for x in (batch.images, batch.labels))
        dropout_keys = [jax.random.fold_in(batch.dropout_key, i) for i in range(count)]
        return [Batch(images[i], labels[i], dropout_keys[i], batch.rule_key) for i in range(count)]

    summed = summed_passes(model, fork, prepare, mesh)
    single = single_exit_passes(model, fork, exits, prepare, mesh)
    if accumulate_steps > 1:
        place = functools.partial(constrain, mesh=mesh, model=model)
        summed = accumulated(summed, accumulate_steps, mesh, place)
        single = accumulated(single, accumulate_steps, mesh)
    return StepParts(loss, model.num_exits, summed, single, update, divide)


def summed_passes(
    model: MultiExitModel,
    fork: Fork,
    prepare: Callable[[jax.Array], jax.Array] = lambda images: images,
    mesh: Mesh | None = None,
) -> Passes:
    """Returns passes whose `grads`, shaped as the parameters, are those of the summed losses."""

    def gather(params: PyTree) -> PyTree:
        """Constrains the parameters, and so their gradients, which are summed over the devices."""
        return constrain(params, mesh, model, gathered=True)

    return jax.value_and_grad(summed_loss(model, fork, prepare, gather), has_aux=True)


def single_exit_passes(
    model: MultiExitModel,
    fork: Fork,
    exits: str | None,
    prepare: Callable[[jax.Array], jax.Array] = lambda images: images,
    mesh: Mesh | None = None,
) -> Passes:
    """Returns passes whose `grads` are `TrunkAndHeads`; `exits` as in `exit_gradients`."""
    if exits is None and mesh is not None:  # whose devices this process may not be running on
        exits = best_way(mesh.devices.flat[0].platform)

    def passes(params: PyTree, batch_stats: PyTree, batch: Batch, loss: LossFunction):
        params = constrain(params, mesh, model, gathered=True)
        found = exit_gradients(
            model,
            fork,
            loss,
            {"params": params, "batch_stats": batch_stats},
            prepare(batch.images),
            batch.labels,
            key=batch.dropout_key,
            exits=exits,
        )
        grads = TrunkAndHeads(
            scatter(found.trunk, mesh, model, leading=1), scatter(found.heads, mesh, model)
        )
        return (jnp.sum(found.losses), (found.logits, found.batch_stats)), grads

    return passes


def accumulated(
    passes: Passes,
    steps: int,
    mesh: Mesh | None = None,
    place: Callable[[PyTree], PyTree] = lambda grads: grads,
) -> Passes:
    """Returns passes that take a batch in `steps` equal micro batches, one after another.

    Memory is that of a micro batch. Losses and gradients are the means of theirs. Batch statistics
    are each micro batch's own, and the running ones are updated by one after the other. So what
    couples the examples of a batch (BatchNorm, and the feature distance of BYOT, a norm over all of
    them) couples those of a micro batch; all else is as for the batch at once.

    Args:
      passes: passes of one micro batch.
      steps: number of micro batches; micro batch k holds examples k, k + steps, k + 2 steps, ... so
        that the data of each device stay on it.
      mesh: device mesh over which the batch is divided; None where it is not.
      place: function applied to the gradients of a micro batch, such as a sharding constraint.
    """

    def run(params: PyTree, batch_stats: PyTree, batch: Batch, loss: LossFunction):
        def micro_passes(stats: PyTree, number: Any, images: jax.Array, labels: jax.Array):
            key = jax.random.fold_in(batch.dropout_key, number)
            micro = Batch(images, labels, key, batch.rule_key)
            (total, (logits, stats)), grads = passes(params, stats, micro, loss)
            return (total, place(grads)), logits, stats

        def step(carry: tuple[PyTree, PyTree], micro: tuple[jax.Array, ...]):
            stats, sums = carry
            found, logits, stats = micro_passes(stats, *micro)
            return (stats, jax.tree.map(jnp.add, sums, found)), logits

        dealt = deal(batch.images, steps, mesh), deal(batch.labels, steps, mesh)
        shapes, _, _ = jax.eval_shape(micro_passes, batch_stats, 0, *(x[0] for x in dealt))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (stats, sums), logits = lax.scan(step, (batch_stats, zeros), (jnp.arange(steps), *dealt))
        total, grads = jax.tree.map(lambda leaf: leaf / steps, sums)
        return (total, (_in_order(logits), stats)), grads

    return run


def deal(batch: jax.Array, count: int, mesh: Mesh | None = None) -> jax.Array:
    """Returns `count` equal parts of a batch, `[count, batch / count, ...]`.

    Part k holds examples k, k + count, k + 2 count, ... so that each device's data stay on it.

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
