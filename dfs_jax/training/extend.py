"""Checks whether a run can change its number of epochs as if it had always had the new one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.training.checkpoint import latest_saved_step
from dfs_jax.training.optimizer import create_schedule
from dfs_jax.training.run_data import read_run_data
from dfs_jax.types import Config, UserError

# Fields that may differ if every learning rate so far is unchanged.
FIELDS = ("epochs", "schedule.")


def check_extension(workdir: Path, known: Config, config: Config) -> None:
    """Raises UserError unless both configs give every step taken so far the same learning rate.

    Args:
      workdir: directory of a run with checkpoints.
      known: config of the run.
      config: the same config except for epochs and the later steps of its section `schedule`.
    """
    data, steps = read_run_data(workdir), latest_saved_step(workdir)
    change = f"epochs cannot change from {known.epochs} to {config.epochs}"
    if data is None:
        raise UserError(
            f"{change}: the run in {workdir}, of an earlier version, did not record its data; "
            f"start it once with the old epochs, which records them"
        )
    steps_per_epoch = data.splits["train"].examples // known.batch_size
    if config.epochs * steps_per_epoch < steps:
        raise UserError(
            f"{change}: the run in {workdir} has taken {steps} steps of {steps_per_epoch} an "
            f"epoch; name another --workdir"
        )
    before, after = (_rates(some, steps_per_epoch, steps) for some in (known, config))
    different = np.flatnonzero(before != after)
    if len(different):
        i = different[0]
        raise UserError(
            f"{change}: by the {config.schedule.name} schedule of {config.epochs} epochs step "
            f"{i + 1} has the learning rate {after[i]:.6g}, and the run in {workdir} took it at "
            f"{before[i]:.6g}; name another --workdir to train anew, with "
            f"--config.init_from={workdir}/weights.safetensors for a trunk that starts from this "
            f"run's best weights"
        )


def _rates(config: Config, steps_per_epoch: int, steps: int) -> np.ndarray:
    """Returns the learning rate of every step taken, `[steps]`."""
    rate = config.optimizer.learning_rate
    schedule = create_schedule(config.schedule, rate, config.epochs, steps_per_epoch)
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(steps)))
