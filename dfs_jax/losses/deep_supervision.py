"""Deep supervision (DSN): every exit learns from the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from dfs_jax.losses import Loss
from dfs_jax.types import ExitOutputs

SCHEDULES = ("constant", "linear")


def exit_cross_entropies(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns each exit's cross-entropy for each example, `[exits, batch]`, in nats.

    Args:
      logits: logits of the exits, `[exits, batch, classes]`.
      labels: integer labels, `[batch]`.
      label_smoothing: fraction of the probability that is spread evenly over all classes.
    """
    if label_smoothing == 0.0:
        return jax.vmap(optax.softmax_cross_entropy_with_integer_labels, (0, None))(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(one_hot, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets[None])


def linear_weights(num_exits: int) -> tuple[float, ...]:
    """Returns weights that grow with depth, `2 (i + 1) / (L + 1)` for exit i (0-based) of L.

    Their mean is 1, like that of constant weights.

    >>> linear_weights(4)
    (0.4, 0.8, 1.2, 1.6)
    """
    return tuple(2 * i / (num_exits + 1) for i in range(1, num_exits + 1))


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises ValueError unless `label_smoothing` lies in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")


@dataclasses.dataclass(frozen=True)
class DeepSupervision(Loss):
    """Weighted cross-entropy at every exit: `w_i * mean_n CE(logits_i, labels)`.

    Args:
      exit_weights: weights w, one number for each exit, shallow first; "constant" (or None) for 1
        everywhere; "linear" for weights that grow with depth, see `linear_weights`.
      label_smoothing: fraction of the probability spread over all classes, in [0, 1).

    Raises:
      ValueError: a label smoothing outside its range, a negative or non-finite weight, an unknown
        schedule, or (when called) a number of weights other than the number of exits.

    Reference: Lee et al., "Deeply-Supervised Nets", AISTATS 2015.

    Example:
      >>> outputs = ExitOutputs(jnp.zeros((3, 5, 2)), ())
      >>> [round(float(loss), 3) for loss in DeepSupervision()(outputs, jnp.zeros(5, int))]
      [0.693, 0.693, 0.693]
    """

    exit_weights: Sequence[float] | str | None = None
    label_smoothing: float = 0.0

    couples_exits: ClassVar[bool] = False

    def __post_init__(self):
        check_label_smoothing(self.label_smoothing)
        weights = self.exit_weights
        if weights is None or weights in SCHEDULES:
            return
        if isinstance(weights, str) or not isinstance(weights, Sequence):
            raise ValueError(
                f"exit_weights must be {' or '.join(SCHEDULES)}, or one number an exit, "
                f"got {weights!r}"
            )
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"exit_weights must be finite and not negative, got {tuple(weights)}")
        object.__setattr__(self, "exit_weights", tuple(weights))

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns the exits' losses, `[exits]`."""
        return self.example_losses(outputs, labels).mean(axis=1)

    def example_losses(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns each exit's loss for each example, `[exits, batch]`."""
        losses = exit_cross_entropies(outputs.logits, labels, self.label_smoothing)
        weights = (
            linear_weights(len(losses)) if self.exit_weights == "linear" else self.exit_weights
        )
        if weights is None or weights == "constant":
            return losses
        if len(weights) != len(losses):
            raise ValueError(f"{len(losses)} exits take {len(losses)} exit_weights, got {weights}")
        return losses * jnp.asarray(weights, losses.dtype)[:, None]
