"""Self-distillation: exits learn from deeper exits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dfs_jax.losses import Loss
from dfs_jax.losses.deep_supervision import check_label_smoothing, exit_cross_entropies
from dfs_jax.types import ExitOutputs

TEACHERS = ("last", "deeper")


def safe_norm(x: jax.Array) -> jax.Array:
    """Returns the L2 norm of all elements, whose gradient is defined as zero at zero."""
    square = jnp.sum(x * x)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


@dataclasses.dataclass(frozen=True)
class BYOT(Loss):
    """Be Your Own Teacher: early exits learn from the label and from the detached last exit.

        last exit   CE
        exit i      (1 - g) CE + g KD + l FD
        KD          mean_n -sum_c softmax(z_last / T) log softmax(z_i / T), without a factor T^2
        FD          || adapted_i - pooled_last ||_2 over the whole batch at once, not squared

    Args:
      kd_weight: weight g of the distillation term, in [0, 1].
      temperature: temperature T of the softmaxes in KD, above 0.
      feature_weight: weight l of the feature distance, at least 0; 0 omits FD and the adaptation
        layers.
      label_smoothing: label smoothing of the cross-entropies, in [0, 1).

    Raises:
      ValueError: an argument outside its range.

    Reference: Zhang et al., "Be Your Own Teacher", ICCV 2019. The missing T^2 and the norm that is
    not squared follow its published code and that of Gong et al., ECCV 2024.

    Example:
      >>> outputs = ExitOutputs(jnp.zeros((2, 5, 3)), (jnp.zeros((5, 7)), jnp.zeros((5, 7))))
      >>> BYOT()(outputs, jnp.zeros(5, int)).shape
      (2,)
    """

    kd_weight: float = 0.3
    temperature: float = 3.0
    feature_weight: float = 0.03
    label_smoothing: float = 0.0

    couples_exits: ClassVar[bool] = False

    def __post_init__(self):
        check_label_smoothing(self.label_smoothing)
        _check_kd(self.kd_weight, self.temperature)
        if not 0 <= self.feature_weight < float("inf"):
            raise ValueError(f"feature_weight must be at least 0, got {self.feature_weight!r}")

    @property
    def adapts_features(self) -> bool:
        """Whether early heads need an adaptation layer."""
        return self.feature_weight > 0

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns the exits' losses, `[exits]`."""
        losses = self._label_losses(outputs.logits, labels).mean(axis=1)
        return losses + self._feature_losses(outputs.features, losses.dtype)

    def example_losses(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns each exit's loss for each example, `[exits, batch]`.

        FD is one number for the whole batch, which is added in full to each example.
        """
        losses = self._label_losses(outputs.logits, labels)
        return losses + self._feature_losses(outputs.features, losses.dtype)[:, None]

    def _label_losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        entropies = exit_cross_entropies(logits, labels, self.label_smoothing)
        teacher = jax.nn.softmax(jax.lax.stop_gradient(logits[-1]) / self.temperature)
        kd = _soft_cross_entropies(logits[:-1], teacher, self.temperature)
        early = (1 - self.kd_weight) * entropies[:-1] + self.kd_weight * kd
        return jnp.concatenate([early, entropies[-1:]])

    def _feature_losses(self, features: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
        if not self.feature_weight:
            return jnp.zeros(len(features), dtype)
        return self.feature_weight * jnp.append(self._fd(features), 0).astype(dtype)

    def _fd(self, features: tuple[jax.Array, ...]) -> jax.Array:
        teacher = jax.lax.stop_gradient(features[-1])
        return jnp.stack([safe_norm(adapted - teacher) for adapted in features[:-1]])


@dataclasses.dataclass(frozen=True)
class MultiExitDistillation(Loss):
    """Distillation-based training: exits learn from the labels and from detached deeper exits.

        last exit   scale (1 - g) CE
        exit i      scale ((1 - g) CE + g T^2 KD)
        KD          mean_n -sum_c q log softmax(z_i / T)
        q           softmax(z_j / T) of the teacher j, or its mean over all teachers

    The published training raises T while the teacher is confident. Here T is constant, which is the
    other variant in the published code.

    Args:
      kd_weight: weight g of the distillation term, in [0, 1].
      temperature: temperature T of the softmaxes in KD, above 0.
      teacher: exits that exit i learns from: "last", the last exit, or "deeper", every deeper exit.
      scale: factor of all losses, above 0. With g = 0.5, a scale of 2 weights the labels as deep
        supervision does; the published configuration uses 10 / L for L exits.
      label_smoothing: label smoothing of the cross-entropies, in [0, 1).

    Raises:
      ValueError: an argument outside its range, or an unknown teacher.

    Reference: Phuong and Lampert, "Distillation-Based Training for Multi-Exit Architectures", ICCV
    2019; defaults as in its published code.

    Example: for uniform predictions over 3 classes, CE and KD are both log 3.
      >>> outputs = ExitOutputs(jnp.zeros((2, 5, 3)), ())
      >>> losses = MultiExitDistillation()(outputs, jnp.zeros(5, int))
      >>> [round(float(loss / jnp.log(3))) for loss in losses]
      [17, 1]
    """

    kd_weight: float = 0.5
    temperature: float = 4.0
    teacher: str = "last"
    scale: float = 2.0
    label_smoothing: float = 0.0

    couples_exits: ClassVar[bool] = False

    def __post_init__(self):
        check_label_smoothing(self.label_smoothing)
        _check_kd(self.kd_weight, self.temperature)
        if self.teacher not in TEACHERS:
            raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {self.teacher!r}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be finite and above 0, got {self.scale!r}")

    def __call__(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns the exits' losses, `[exits]`."""
        return self.example_losses(outputs, labels).mean(axis=1)

    def example_losses(self, outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        """Returns each exit's loss for each example, `[exits, batch]`."""
        entropies = exit_cross_entropies(outputs.logits, labels, self.label_smoothing)
        soft = jax.nn.softmax(jax.lax.stop_gradient(outputs.logits) / self.temperature)
        kd = _soft_cross_entropies(outputs.logits[:-1], self._teachers(soft), self.temperature)
        weight = self.kd_weight * self.temperature**2
        no_kd = jnp.zeros_like(entropies[-1:])
        return self.scale * (
            (1 - self.kd_weight) * entropies + weight * jnp.concatenate([kd, no_kd])
        )

    def _teachers(self, soft: jax.Array) -> jax.Array:
        """Returns the target probabilities of each early exit, from the exits' probabilities."""
        if self.teacher == "last":
            return soft[-1]
        sums = jnp.cumsum(soft[:0:-1], axis=0)[::-1]
        counts = jnp.arange(len(soft) - 1, 0, -1, dtype=soft.dtype)
        return sums / counts[:, None, None]


def _soft_cross_entropies(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Returns each exit's cross-entropy with the teacher's probabilities, `[exits, batch]`."""
    student = jax.nn.log_softmax(logits / temperature)
    return -jnp.sum(teacher * student, axis=-1)


def _check_kd(kd_weight: float, temperature: float) -> None:
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must lie in [0, 1], got {kd_weight!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
