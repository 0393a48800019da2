"""One training step and one evaluation step, as pure functions under jit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dfs_jax.combiners import Combiner
from dfs_jax.data.augmentation import normalise
from dfs_jax.forks import Fork
from dfs_jax.inference.confidence import ExitPredictions, exit_predictions
from dfs_jax.losses import Loss
from dfs_jax.meta import Batch, Meta, MetaStep, Trained
from dfs_jax.models.contract import MultiExitModel, split_trunk_and_heads
from dfs_jax.training.meta_step import make_step_parts
from dfs_jax.training.passes import (
    accumulated,
    prepared,
    single_exit_passes,
    summed_passes,
)
from dfs_jax.training.sharding import batch_sharded, jit_for_mesh, replicated
from dfs_jax.training.state import NO_BAD_STEP, EpochTotals, TrainState
from dfs_jax.training.state_sharding import constrain
from dfs_jax.types import PyTree, TrunkAndHeads

TrainStep = Callable[[TrainState, jax.Array, jax.Array], TrainState]


class StepGradients(NamedTuple):
    """What the passes forward and backward of one step give.

    Attributes:
      loss: summed over the exits; the mean over micro batches.
      logits: `[exits, batch, classes]`.
      grads: shaped as the parameters.
      batch_stats: the running statistics after the step.
      combiner_state: the combiner's after the step.
    """

    loss: jax.Array
    logits: jax.Array
    grads: PyTree
    batch_stats: PyTree
    combiner_state: PyTree


GradientFn = Callable[[TrainState, jax.Array, jax.Array, jax.Array], StepGradients]


class StepUpdate(NamedTuple):
    """What a step makes of a batch.

    Attributes:
      loss: summed over the exits; the mean over micro batches.
      logits: `[exits, batch, classes]`.
      trained: parameters, running statistics and the optimizer's state after the step.
      combiner_state: the combiner's or the meta method's after the step.
      updates: what was added to the parameters.
    """

    loss: jax.Array
    logits: jax.Array
    trained: Trained
    combiner_state: PyTree
    updates: PyTree


UpdateFn = Callable[[TrainState, jax.Array, jax.Array, jax.Array], StepUpdate]


def make_train_step(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
    ema_decay: float | None = None,
    combiner: Combiner | None = None,
    meta: Meta | None = None,
    exits: str | None = None,
    accumulate_steps: int = 1,
    state_shardings: PyTree = None,
) -> TrainStep:
    """Returns `step(state, images, labels) -> state`, compiled over the mesh, its state donated.

    Args:
      augment: `(images, key) -> images`, both uint8 `[batch, height, width, channels]`.
      mean: of each channel, in 0..1, for normalisation; `std` likewise.
      ema_decay: weight of the old average; None keeps none.
      combiner: of the exits' gradients; None adds them up.
      meta: method that looks ahead and says how gradients merge, instead of the combiner; or None.
      exits: how single exits' gradients are computed, see `exit_gradients`.
      accumulate_steps: micro batches that the batch passes in, see `accumulated`.
      state_shardings: where the state's arrays lie; None: whole on every device.

    Returns:
      A function of the state, uint8 images and whole-number labels, both split over the mesh's
      batch axes. Nothing it returns needs to be waited for: sums and the first bad step stay in the
      state.
    """
    prepare = _preparation(model, mean, std)
    update = make_update_fn(
        model,
        fork,
        loss,
        optimizer,
        combiner,
        meta,
        exits,
        accumulate_steps=accumulate_steps,
        prepare=prepare,
        mesh=mesh,
    )

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        augment_key, dropout_key = step_keys(state)
        found = update(state, augment(images, augment_key), labels, dropout_key)
        params, batch_stats, opt_state = found.trained
        variables = {"params": params, "batch_stats": batch_stats}
        return state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            combiner_state=found.combiner_state,
            averaged=_average(state.averaged, variables, ema_decay),
            totals=_add_to_totals(state.totals, found.loss, found.logits, labels),
            first_bad_step=_first_bad_step(state, found.loss, found.updates),
        )

    split = batch_sharded(mesh)
    where = replicated(mesh) if state_shardings is None else state_shardings
    return jit_for_mesh(
        train_step,
        mesh,
        in_shardings=(where, split, split),
        out_shardings=where,
        donate_argnums=0,
    )


def make_update_fn(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    combiner: Combiner | None = None,
    meta: Meta | None = None,
    exits: str | None = None,
    *,
    accumulate_steps: int = 1,
    prepare: Callable[[jax.Array], jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> UpdateFn:
    """Returns `update(state, images, labels, dropout_key) -> StepUpdate`; see `make_train_step`."""
    how: Any = {"accumulate_steps": accumulate_steps, "prepare": prepare, "mesh": mesh}
    parts = make_step_parts(model, fork, loss, optimizer, exits, **how)
    if meta is not None:
        return _as_update(meta.wrap(parts))
    gradients = make_gradient_fn(model, fork, loss, combiner, exits, **how)

    def update(state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array):
        found = gradients(state, images, labels, key)
        before = Trained(state.params, found.batch_stats, state.opt_state)
        trained, updates = parts.update(before, found.grads)
        return StepUpdate(found.loss, found.logits, trained, found.combiner_state, updates)

    return update


def _as_update(meta_step: MetaStep) -> UpdateFn:
    def update(state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array):
        trained = Trained(state.params, state.batch_stats, state.opt_state)
        found = meta_step(trained, state.combiner_state, Batch(images, labels, key))
        return StepUpdate(found.loss, found.logits, found.trained, found.state, found.updates)

    return update


def make_gradient_fn(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    combiner: Combiner | None = None,
    exits: str | None = None,
    *,
    accumulate_steps: int = 1,
    prepare: Callable[[jax.Array], jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> GradientFn:
    """Returns `gradients(state, images, labels, dropout_key) -> StepGradients`.

    A plain sum of the exits' gradients is one ordinary backward pass. Other combiners get the
    gradient of each exit for the trunk, averaged over the micro batches; heads keep that of the
    summed losses.

    Args:
      model: the backbone, with its `fork`, `loss`, `combiner` and `exits` as in `make_train_step`.
      accumulate_steps: micro batches that the batch passes in, see `accumulated`.
      prepare: applied to the images of a micro batch first, such as their normalisation.
      mesh: of the devices that gradients are split over; None where they are not.
    """
    if combiner is None or getattr(combiner, "is_plain_sum", False):
        passes, combine = summed_passes(model, fork, loss, mesh), _keep
    else:
        passes = single_exit_passes(model, fork, loss, exits, mesh)
        combine = functools.partial(_combine, combiner)
    run = accumulated(prepared(passes, prepare), accumulate_steps, mesh)

    def gradients(state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array):
        params = constrain(state.params, mesh, model, gathered=True)
        variables = {"params": params, "batch_stats": state.batch_stats}
        found = run(variables, images, labels, key)
        grads, combiner_state = combine(found.grads, state)
        grads = constrain(grads, mesh, model)
        return StepGradients(found.loss, found.logits, grads, found.batch_stats, combiner_state)

    return gradients


def _keep(grads: PyTree, state: TrainState) -> tuple[PyTree, PyTree]:
    return grads, state.combiner_state


def _combine(combiner: Combiner, grads: TrunkAndHeads, state: TrainState) -> tuple[PyTree, PyTree]:
    params, _ = split_trunk_and_heads(state.params)
    trunk, combiner_state = combiner.update(
        grads.trunk, state.combiner_state, params, key=combiner_key(state)
    )
    return {**trunk, **grads.heads}, combiner_state


def make_eval_step(
    model: MultiExitModel,
    fork: Fork,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
    variable_shardings: PyTree = None,
) -> Callable[[dict[str, Any], jax.Array, jax.Array], ExitPredictions]:
    """Returns `step(variables, images, labels)`: every exit's answers, compiled over the mesh.

    Args:
      mean: of each channel, in 0..1, for normalisation; `std` likewise.
      variable_shardings: where the variables lie; None: whole on every device.
    """
    prepare = _preparation(model, mean, std)

    def eval_step(variables: dict[str, Any], images: jax.Array, labels: jax.Array):
        variables = constrain(variables, mesh, model, gathered=True)
        outputs: Any = model.apply(variables, prepare(images), fork, train=False)
        return exit_predictions(outputs.logits, labels)

    whole, split = replicated(mesh), batch_sharded(mesh)
    where = whole if variable_shardings is None else variable_shardings
    return jit_for_mesh(eval_step, mesh, in_shardings=(where, split, split), out_shardings=whole)


def _preparation(
    model: MultiExitModel, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Returns what makes uint8 images the model's input, in the type that it computes in."""
    dtype = getattr(model, "dtype", None) or float
    return lambda images: normalise(images, mean, std).astype(dtype)


def step_keys(state: TrainState) -> tuple[jax.Array, jax.Array]:
    """Returns this step's keys for augmentation and for dropout, folded from the run's key."""
    augment_key, dropout_key = jax.random.split(_step_key(state))
    return augment_key, dropout_key


def combiner_key(state: TrainState) -> jax.Array:
    """Returns this step's key for the combiner; 0 and 1 would give those of `step_keys` again."""
    return jax.random.fold_in(_step_key(state), 2)


def _step_key(state: TrainState) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)


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
    """Records the first step whose loss or update is not finite, without the host's help."""
    leaves = [jnp.isfinite(leaf).all() for leaf in (loss, *jax.tree.leaves(updates))]
    is_fine = jnp.stack(leaves).all()  # a norm would be several times slower on a CPU, and overflow
    is_first = (state.first_bad_step == NO_BAD_STEP) & ~is_fine
    return jnp.where(is_first, state.step, state.first_bad_step)
