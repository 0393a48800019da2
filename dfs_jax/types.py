"""Types and errors that all packages share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    # Exported networks also run where jax is not installed.
    import jax

PyTree: TypeAlias = Any
# An `ml_collections.ConfigDict` or a section of one; its fields are known only at run time.
Config: TypeAlias = Any


class UserError(ValueError):
    """A user's mistake, described in one sentence with the value and the remedy.

    Command-line programs print only the sentence; other exceptions keep their traceback.
    """


def check_whole(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raises UserError unless `value`, called `name`, is an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


class ArrayShape(NamedTuple):
    """Shape and type of an array, as of `jax.ShapeDtypeStruct`, without jax.

    Attributes:
      shape: shape, often of one example, without the batch.
      dtype: type, as numpy names it.
    """

    shape: tuple[int, ...]
    dtype: Any


# An `ArrayShape`, or what has the same attributes, such as a `jax.ShapeDtypeStruct`.
Example: TypeAlias = Any


class HeadOutput(NamedTuple):
    """Outputs of one classifier.

    Attributes:
      logits: logits, `[batch, classes]`.
      feature: feature for distillation, `[batch, width]`: the adapted feature at an early exit that
        has an adaptation layer, otherwise the pooled feature.
    """

    logits: jax.Array
    feature: jax.Array


class ExitOutputs(NamedTuple):
    """Outputs of a multi-exit network, shallow exit first.

    Attributes:
      logits: logits, `[exits, batch, classes]`.
      features: feature of each exit, `[batch, width_i]` (see `HeadOutput.feature`).
    """

    logits: jax.Array
    features: tuple[jax.Array, ...]


class BatchGradients(NamedTuple):
    """Results of the forward and backward passes of one batch.

    Attributes:
      loss: loss, summed over the exits.
      logits: logits, `[exits, batch, classes]`.
      grads: pytree of gradients, whose structure depends on the passes.
      batch_stats: updated running statistics.
    """

    loss: jax.Array
    logits: jax.Array
    grads: PyTree
    batch_stats: PyTree


class TrunkAndHeads(NamedTuple):
    """Gradients of the trunk, by exit as in `exit_gradients`, and of the heads."""

    trunk: PyTree
    heads: PyTree
