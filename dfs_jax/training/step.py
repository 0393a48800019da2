"""One training step and one evaluation step, as pure functions under jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from dfs_jax.data.augmentation import normalise
from dfs_jax.exits.confidence import ExitPredictions, exit_predictions
from dfs_jax.forks import Fork
from dfs_jax.gradients import Batch, GradientRule, Trained
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.training.dispatch import BATCH, dispatched
from dfs_jax.training.passes import make_step_parts
from dfs_jax.training.sharding import batch_sharded, jit_for_mesh, replicated
from dfs_jax.training.state import NO_BAD_STEP, EpochTotals, TrainState
from dfs_jax.training.state_sharding import constrain
from dfs_jax.types import PyTree

# Of the state and what a dispatch takes: images and labels, or as `dispatch` says.
TrainStep = Callable[..., TrainState]


class StepKeys(NamedTuple):
    """Random keys of one step, for its three purposes."""

    augment: jax.Array
    dropout: jax.Array
    rule: jax.Array


def make_train_step(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    rule: GradientRule,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
    ema_decay: float | None = None,
    exits: str | None = None,
    accumulate_steps: int = 1,
    trunk_rate: float = 1.0,
    state_shardings: PyTree = None,
    takes: str = BATCH,
) -> TrainStep:
    """Returns `step(state, images, labels) -> state`, compiled over the mesh, its state donated.

    Args:
      model: backbone that is trained.
      fork: fork at each exit.
      loss: loss of the exits.
      rule: rule that makes one update of the exits' gradients.
      optimizer: optimizer of the parameters.
      augment: `(images, key) -> images`, both uint8 `[batch, height, width, channels]`.
      mean: mean of each channel, in 0..1, for normalisation.
      std: standard deviation of each channel, in 0..1.
      mesh: device mesh the step runs on.
      ema_decay: weight of the old value in the moving average of the parameters; None keeps none.
      exits: way through the exits for gradients of single exits, see `exit_gradients`.
      accumulate_steps: micro batches of a step, see `accumulated`.
      trunk_rate: learning rate of the trunk, in multiples of the heads'.
      state_shardings: shardings of the state's arrays; None: whole on every device.
      takes: one batch, or what several steps need at once; see `dispatch`.

    Returns:
      A function of the state, uint8 images and integer labels, both split over the mesh's batch
      axes. The host need not wait for its result: sums and the first bad step stay in the state.
    """
    prepare = preparation(model, mean, std)
    how: Any = {"accumulate_steps": accumulate_steps, "prepare": prepare, "mesh": mesh}
    how["trunk_rate"] = trunk_rate
    rule_step = rule.wrap(make_step_parts(model, fork, loss, optimizer, exits, **how))

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        keys = step_keys(state)
        batch = Batch(augment(images, keys.augment), labels, keys.dropout, keys.rule)
        before = Trained(state.params, state.batch_stats, state.opt_state)
        after = rule_step(before, state.rule_state, batch)
        variables = {"params": after.trained.params, "batch_stats": after.trained.batch_stats}
        return state.replace(
            **variables,
            step=state.step + 1,
            opt_state=after.trained.opt_state,
            rule_state=after.state,
            averaged=_average(state.averaged, variables, ema_decay),
            totals=_add_to_totals(state.totals, after.loss, after.logits, labels),
            first_bad_step=_first_bad_step(state, after.loss, after.updates),
        )

    steps, inputs = dispatched(train_step, takes, mesh)
    where = replicated(mesh) if state_shardings is None else state_shardings
    shardings = {"in_shardings": (where, *inputs), "out_shardings": where}
    return jit_for_mesh(steps, mesh, runs=model, **shardings, donate_argnums=0)


def make_eval_step(
    model: MultiExitModel,
    fork: Fork,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
    variable_shardings: PyTree = None,
    takes: str = BATCH,
) -> Callable[[dict[str, Any], jax.Array, jax.Array], ExitPredictions]:
    """Returns `step(variables, images, labels) -> ExitPredictions`, compiled over the mesh.

    Args:
      model: backbone that is evaluated.
      fork: fork at each exit.
      mean: mean of each channel, in 0..1, for normalisation.
      std: standard deviation of each channel, in 0..1.
      mesh: device mesh the step runs on.
      variable_shardings: shardings of the variables; None: whole on every device.
      takes: `BATCH`, or `BATCHES` that are stacked, as their answers are then.
    """
    prepare = preparation(model, mean, std)

    def eval_step(variables: dict[str, Any], images: jax.Array, labels: jax.Array):
        variables = constrain(variables, mesh, model, gathered=True)
        outputs: Any = model.apply(variables, prepare(images), fork, train=False)
        return exit_predictions(outputs.logits, labels)

    def eval_steps(variables: dict[str, Any], images: jax.Array, labels: jax.Array):
        return lax.map(lambda batch: eval_step(variables, *batch), (images, labels))

    function, axis = (eval_step, 0) if takes == BATCH else (eval_steps, 1)
    whole, split = replicated(mesh), batch_sharded(mesh, axis=axis)
    where = whole if variable_shardings is None else variable_shardings
    shardings = {"in_shardings": (where, split, split), "out_shardings": whole}
    return jit_for_mesh(function, mesh, runs=model, **shardings)


def preparation(
    model: MultiExitModel, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from uint8 images to the model's input, in the type it computes in."""
    dtype = model.dtype or float
    return lambda images: normalise(images, mean, std).astype(dtype)


def step_keys(state: TrainState) -> StepKeys:
    """Returns the keys of the next step, folded from the run's key and the step's number."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
    augment_key, dropout_key = jax.random.split(key)
    # Folding in 0 or 1 would give the two keys above again.
    return StepKeys(augment_key, dropout_key, jax.random.fold_in(key, 2))


def _average(averaged: PyTree, trained: PyTree, decay: float | None) -> PyTree:
    if decay is None:
        return None
    return optax.incremental_update(trained, averaged, step_size=1 - decay)


def _add_to_totals(
    totals: EpochTotals, loss: jax.Array, logits: jax.Array, labels: jax.Array
) -> EpochTotals:
    count = labels.shape[0]
    correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, axis=1)
    return EpochTotals(
        loss=totals.loss + count * loss,
        correct=totals.correct + correct,
        examples=totals.examples + count,
    )


def _first_bad_step(state: TrainState, loss: jax.Array, updates: PyTree) -> jax.Array:
    """Returns the first step whose loss or update was not finite, or `NO_BAD_STEP`."""
    leaves = [jnp.isfinite(leaf).all() for leaf in (loss, *jax.tree.leaves(updates))]
    is_fine = jnp.stack(leaves).all()  # a norm would be several times slower on a CPU, and overflow
    is_first = (state.first_bad_step == NO_BAD_STEP) & ~is_fine
    return jnp.where(is_first, state.step, state.first_bad_step)
