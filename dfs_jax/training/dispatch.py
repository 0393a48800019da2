"""Runs several training steps as one program, so that the host dispatches once for all of them.

Inputs of a dispatch besides the state:

    BATCH      images, labels            one batch, for one step
    BATCHES    images, labels            a batch for each step, stacked along a leading axis
    INDICES    images, labels, indices   a whole set on the devices, and each step's examples
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from dfs_jax.training.sharding import batch_sharded, replicated

BATCH, BATCHES, INDICES = "batch", "batches", "indices"


def steps_at_once(step: int, at_most: int, due: Iterable[int]) -> int:
    """Returns the number of steps in the dispatch after `step` steps.

    It is one of two numbers, since each needs a compiled program: the largest possible, or 1 if
    something is due before that many steps have been taken.

    Args:
      step: number of steps taken.
      at_most: largest number of steps in a dispatch; a more frequent `due` lowers it for the run.
      due: intervals, in steps, of whatever is due between dispatches; 0 for never.

    Example:
      >>> [steps_at_once(step, 4, due=(6, 0)) for step in (0, 4, 5, 6)]
      [4, 1, 1, 4]
    """
    due = [every for every in due if every]
    steps = min(at_most, *due)
    return steps if all(every - step % every >= steps for every in due) else 1


def dispatched(
    train_step: Callable[..., Any], takes: str, mesh: Mesh
) -> tuple[Callable[..., Any], tuple[NamedSharding, ...]]:
    """Returns the function that a dispatch runs, and the shardings of its inputs after the state.

    A dispatch of n steps is one loop on the device; every n needs a compiled program.

    Args:
      train_step: `(state, images, labels) -> state`, not compiled.
      takes: `BATCH`, `BATCHES` or `INDICES`, see above.
      mesh: device mesh that batches are divided over; a whole set is replicated on every device.
    """
    batch, batches, whole = batch_sharded(mesh), batch_sharded(mesh, axis=1), replicated(mesh)
    if takes == BATCH:
        return train_step, (batch, batch)

    def over_batches(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        return _for_each(lambda state, x: train_step(state, *x), state, (images, labels))

    def over_indices(state: Any, images: jax.Array, labels: jax.Array, indices: jax.Array) -> Any:
        def take(data: jax.Array, rows: jax.Array) -> jax.Array:
            taken = data.at[rows].get(mode="promise_in_bounds")
            return lax.with_sharding_constraint(taken, batch)

        def step(state: Any, rows: jax.Array) -> Any:
            return train_step(state, take(images, rows), take(labels, rows))

        return _for_each(step, state, indices)

    if takes == BATCHES:
        return over_batches, (batches, batches)
    return over_indices, (whole, whole, batches)


def _for_each(step: Callable[[Any, Any], Any], state: Any, inputs: Any) -> Any:
    return lax.scan(lambda state, x: (step(state, x), None), state, inputs)[0]
