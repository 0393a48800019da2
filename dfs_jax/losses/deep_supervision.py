"""Deep supervision (DSN): every exit is asked for the label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from dfs_jax.types import ExitOutputs


def exit_cross_entropies(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns each exit's cross-entropy for each example, `[exits, batch]`, in nats.

    Args:
      logits: `[exits, batch, classes]`.
      labels: `[batch]`, whole numbers.
      label_smoothing: the share of probability spread evenly over all classes.
    """
    if label_smoothing == 0.0:
        return jax.vmap(optax.softmax_cross_entropy_with_integer_labels, (0, None))(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(one_hot, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets[None])


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises ValueError unless `label_smoothing` lies in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")


@dataclasses.dataclass(frozen=True)
class DeepSupervision:
    """Weighted cross-entropy at every exit: `w_i * mean_n CE(logits_i, labels)`.

    Args:
      exit_weights: w, one number an exit, shallow first; None for 1 everywhere.
      label_smoothing: in [0, 1).

    Raises:
      ValueError: a label smoothing outside its range, a negative or non-finite weight, or (when
        called) another count of weights than exits.

    Reference: Lee et al., "Deeply-Supervised Nets", AISTATS 2015.

    Example:
      >>> outputs = ExitOutputs(jnp.zeros((3, 5, 2)), ())
      >>> [round(float(loss), 3) for loss in DeepSupervision()(outputs, jnp.zeros(5, int))]
      [0.693, 0.693, 0.693]
    """

    exit_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_label_smoothing(self.label_smoothing)
        if self.exit_weights is not None:
            weights = tuple(self.exit_weights)
            if not all(0 <= weight < float("inf") for weight in weights):
                raise ValueError(f"exit_weights must be finite and not negative, got {weights}")
            object.__setattr__(self, "exit_weights", weights)

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns the exits' losses, `[exits]`."""
        losses = exit_cross_entropies(outputs.logits, labels, self.label_smoothing).mean(axis=1)
        if self.exit_weights is None:
            return losses
        if len(self.exit_weights) != len(losses):
            raise ValueError(
                f"{len(losses)} exits take {len(losses)} exit_weights, got {self.exit_weights}"
            )
        return losses * jnp.asarray(self.exit_weights, losses.dtype)
