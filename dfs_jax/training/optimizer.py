"""Optimizers and learning-rate schedules on top of optax, with PyTorch's conventions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from dfs_jax.registry import Registry
from dfs_jax.types import UserError

SCHEDULES = Registry(
    "schedule",
    {
        "constant": "dfs_jax.training.optimizer:constant",
        "multistep": "dfs_jax.training.optimizer:multistep",
        "cosine": "dfs_jax.training.optimizer:cosine",
    },
)


def sgd(
    learning_rate: optax.Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns SGD as in PyTorch: weight decay is added to the gradient of every parameter.

        g += weight_decay * w;  m = momentum * m + g;  w -= learning_rate * m

    Args:
      learning_rate: schedule of the learning rate.
      momentum: weight of the old momentum.
      nesterov: whether to use Nesterov momentum.
      weight_decay: coefficient of the weight decay.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov),
    )


def adamw(
    learning_rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns AdamW, with decoupled weight decay: `w -= learning_rate * weight_decay * w`.

    Args:
      learning_rate: schedule of the learning rate.
      b1: decay of the mean of the gradients.
      b2: decay of the mean of their squares.
      weight_decay: coefficient of the weight decay.
    """
    return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)


def constant(learning_rate: float, total_epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns a schedule with a constant learning rate."""
    del total_epochs, steps_per_epoch
    return optax.constant_schedule(learning_rate)


def multistep(
    learning_rate: float,
    total_epochs: int,
    steps_per_epoch: int,
    *,
    decay_epochs: Sequence[int],
    decay_factor: float = 0.1,
) -> optax.Schedule:
    """Returns a schedule that multiplies the rate by `decay_factor` at each of `decay_epochs`.

    Args:
      learning_rate: learning rate before the first decay.
      total_epochs: epochs of the run.
      steps_per_epoch: steps of an epoch.
      decay_epochs: epochs after which the rate is multiplied, in rising order.
      decay_factor: factor of each decay.

    >>> schedule = multistep(1.0, 5, 7, decay_epochs=(2,))
    >>> float(schedule(13)), round(float(schedule(14)), 6)
    (1.0, 0.1)
    """
    late = [epoch for epoch in decay_epochs if epoch >= total_epochs]
    if late:
        raise ValueError(f"decay_epochs {late} lie at or beyond the last of {total_epochs} epochs")
    boundaries = {int(epoch * steps_per_epoch): decay_factor for epoch in decay_epochs}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def cosine(learning_rate: float, total_epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns a schedule that decays as half a cosine from `learning_rate` to 0."""
    return optax.cosine_decay_schedule(learning_rate, total_epochs * steps_per_epoch)


def with_warmup(schedule: optax.Schedule, warmup_steps: int) -> optax.Schedule:
    """Returns the schedule with its first n = `warmup_steps` steps scaled by 1/n, 2/n, ..., 1."""
    if not warmup_steps:
        return schedule
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / warmup_steps)


def create_schedule(
    config: Mapping[str, Any], learning_rate: float, total_epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """Returns the schedule of a config's section `schedule`, a function from step to rate."""
    options = dict(config)
    warmup_epochs = options.pop("warmup_epochs") or 0
    if not 0 <= warmup_epochs < total_epochs:
        raise UserError(
            f"schedule.warmup_epochs must lie in [0, {total_epochs} epochs), got {warmup_epochs}"
        )
    schedule = SCHEDULES.create(
        options.pop("name"), learning_rate, total_epochs, steps_per_epoch, **options
    )
    return with_warmup(schedule, round(warmup_epochs * steps_per_epoch))


def create_optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer of a config's section `optimizer`, after clipping by global norm."""
    options = {key: value for key, value in config.items() if key not in _NOT_THE_OPTIMIZERS}
    optimizer = OPTIMIZERS.create(options.pop("name"), schedule, **options)
    clip = config["gradient_clip"]
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Raises UserError for a value out of range, such as a NaN learning rate."""
    for field in ("learning_rate", "gradient_clip"):
        value = config[field]
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"optimizer.{field} must be a finite number above 0, got {value!r}")
    decay = config["ema_decay"]
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"optimizer.ema_decay must lie between 0 and 1, got {decay!r}")
    weight_decay = config["weight_decay"]
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise UserError(f"optimizer.weight_decay must be finite and >= 0, got {weight_decay!r}")


_NOT_THE_OPTIMIZERS = ("learning_rate", "gradient_clip", "ema_decay")


OPTIMIZERS = Registry(
    "optimizer",
    {"sgd": sgd, "adamw": adamw},
)
