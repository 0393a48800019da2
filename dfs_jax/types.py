"""Shapes and errors that every room shares."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax

PyTree: TypeAlias = Any
# An `ml_collections.ConfigDict` or a section of one: its fields are known at run time alone.
Config: TypeAlias = Any


class UserError(ValueError):
    """A mistake in what the user asked for, told in one sentence with the value and what to do.

    The command-line programs print the sentence alone; any other exception keeps its traceback.
    """


def check_whole(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raises UserError unless `value`, called `name`, is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


class HeadOutput(NamedTuple):
    """What one classifier returns.

    Attributes:
      logits: `[batch, classes]`.
      feature: `[batch, width]`, what feature distillation compares: the adapted feature at an early
        exit that has an adaptation layer, the pooled feature elsewhere.
    """

    logits: jax.Array
    feature: jax.Array


class ExitOutputs(NamedTuple):
    """What a multi-exit network returns, shallow exit first.

    Attributes:
      logits: `[exits, batch, classes]`.
      features: one `[batch, width_i]` an exit (see `HeadOutput.feature`).
    """

    logits: jax.Array
    features: tuple[jax.Array, ...]


class BatchGradients(NamedTuple):
    """What the passes forward and backward of one batch give.

    Attributes:
      loss: summed over the exits.
      logits: `[exits, batch, classes]`.
      grads: a pytree; whose, depends on the passes.
      batch_stats: the running statistics afterwards.
    """

    loss: jax.Array
    logits: jax.Array
    grads: PyTree
    batch_stats: PyTree


class TrunkAndHeads(NamedTuple):
    """Gradients of the trunk, by exit as in `exit_gradients`, and of the heads."""

    trunk: PyTree
    heads: PyTree
