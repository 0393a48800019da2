"""A run's policy and the checkpoint that it was fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import logging

from dfs_jax.inference import policy as policies
from dfs_jax.inference.identity import NETWORK, check_network, network_record
from dfs_jax.inference.policy import Policy, read_policy
from dfs_jax.inference.trained import StagedRun, load_staged
from dfs_jax.paths import input_file
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.types import UserError

NO_POLICY = "none"
# Fields of a policy's record that must equal those of the run.
_SHARED = ("model", "fork", "data", "class_names", "mean", "std")


def load_with_policy(
    workdir: Path,
    *,
    policy: str | Path | None = None,
    checkpoint: str | None = None,
    data_dir: str | None = None,
) -> tuple[StagedRun, Policy | None]:
    """Returns a checkpoint of a run and the policy that was fitted on it.

    Args:
      workdir: directory of the run.
      policy: policy file; None for `policy.json` in `workdir` if there is one, "none" for no
        policy.
      checkpoint: "best", "latest" or a step number; None for the one that the policy was fitted
        on, or the best without a policy.
      data_dir: directory of the data, if it has moved.

    Raises:
      UserError: no run, no such checkpoint, or a policy of another network, step or data.
    """
    path = _policy_path(workdir, policy)
    chosen = None if path is None else read_policy(path)
    step = None if chosen is None else chosen.fitted_on.get("step")
    which = checkpoint or ("best" if step is None else _fitted_checkpoint(workdir, path, step))
    staged = load_staged(workdir, checkpoint=which, data_dir=data_dir)
    if chosen is not None:
        check_belongs(chosen, staged, path)
    return staged, chosen


def check_belongs(policy: Policy, staged: StagedRun, path: Path | None) -> None:
    """Raises UserError if a policy was fitted on another checkpoint; warns if it has no record.

    Args:
      policy: policy of a run.
      staged: checkpoint to use it with.
      path: policy file, for messages.
    """
    fitted_on, again = policy.fitted_on, "choose a policy for this run again"
    step = fitted_on.get("step")
    if step is not None and step != staged.step:
        raise UserError(
            f"{path} was fitted on the checkpoint of step {step}, this is step {staged.step}: "
            f"leave --checkpoint out to take step {step}, or choose again with "
            f"--checkpoint={staged.step}"
        )
    about = {**staged.about(), **fitting_record(staged, str(fitted_on.get("split")))}
    for name in _SHARED:
        if name in fitted_on and fitted_on[name] != about[name]:
            raise UserError(
                f"{path} was fitted for {name} {_short(fitted_on[name])}, this run has "
                f"{_short(about[name])}: {again}"
            )
    before, now = fitted_on.get("calibration"), about["calibration"]
    if None not in (before, now) and before != now:
        raise UserError(
            f"{path} was fitted on other {fitted_on.get('split')} data than the run holds out now: "
            f"{again}"
        )
    try:
        check_network(policy, staged.stages)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if NETWORK not in fitted_on:
        logging.warning(
            "%s does not say which network it was fitted on, it is taken as it is", path
        )


def fitting_record(staged: StagedRun, split: str) -> dict[str, Any]:
    """Returns a policy's record of the checkpoint and data it is valid for, as plain data.

    Args:
      staged: checkpoint that the policy is fitted on.
      split: name of the split that it is fitted on.
    """
    dataset = staged.experiment.dataset
    known = None if staged.data is None else staged.data.splits.get(split)
    return {
        NETWORK: network_record(staged.stages, dataset.num_classes),
        "class_names": list(dataset.class_names),
        "calibration": None if known is None else known._asdict(),
    }


def _policy_path(workdir: Path, policy: str | Path | None) -> Path | None:
    if policy is None:
        own = workdir / policies.FILE
        return own if own.exists() else None
    return None if str(policy) == NO_POLICY else input_file(policy, "--policy")


def _fitted_checkpoint(workdir: Path, path: Path | None, step: Any) -> str:
    """Returns the step that a policy was fitted on, as the name of a checkpoint.

    Raises:
      UserError: the run no longer has this checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    best = checkpoints.best_step()
    if step not in checkpoints.steps():
        raise UserError(
            f"{path} was fitted on the checkpoint of step {step}, which is not in {workdir} (its "
            f"best is step {best}): choose a policy for that again, or add --policy={NO_POLICY}"
        )
    if step != best:
        logging.warning(
            "taking the checkpoint of step %d, which %s was fitted on; the best is step %d",
            step,
            path,
            best,
        )
    return str(step)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        shown = ", ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in value[:10])
        return f"({shown}{', ...' if len(value) > 10 else ''})"
    return repr(value)
