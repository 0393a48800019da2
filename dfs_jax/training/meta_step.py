"""A training step's parts, as methods that look one step ahead take them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh

from dfs_jax.forks import Fork
from dfs_jax.losses import Loss
from dfs_jax.meta import Batch, StepParts, Trained
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.training.passes import (
    Passes,
    accumulated,
    deal,
    prepared,
    single_exit_passes,
    summed_passes,
)
from dfs_jax.training.state_sharding import constrain
from dfs_jax.types import BatchGradients, PyTree


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
    """Returns the parts of the step that `make_train_step` makes of the same arguments."""

    def run(passes: Passes, trained: Trained, batch: Batch) -> BatchGradients:
        variables = {
            "params": constrain(trained.params, mesh, model, gathered=True),
            "batch_stats": trained.batch_stats,
        }
        passes = accumulated(prepared(passes, prepare), accumulate_steps, mesh)
        return passes(variables, batch.images, batch.labels, batch.key)

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
        return [Batch(images[i], labels[i], jax.random.fold_in(batch.key, i)) for i in range(count)]

    return StepParts(loss, model.num_exits, gradients, exit_gradients, update, divide)
