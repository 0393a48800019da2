"""Identity of the network that a policy was fitted on: thresholds are valid for it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfs_jax.inference.onnx_stages import OnnxStages
from dfs_jax.inference.policy import Policy
from dfs_jax.types import UserError

NETWORK = "network"  # key of the record in a policy's `fitted_on`


def fingerprint(stages: Sequence[Any]) -> str | None:
    """Returns a checksum of a network's weights, the same before and after export.

    None for stages whose weights are not known.
    """
    if isinstance(stages, OnnxStages):
        return stages.fingerprint
    from dfs_jax.inference.weights import weights_fingerprint

    return weights_fingerprint(stages)


def network_record(stages: Sequence[Any], classes: int) -> dict[str, Any]:
    """Returns a policy's record of the network that it was fitted on, as plain data."""
    return {"exits": len(stages), "classes": classes, "weights": fingerprint(stages)}


def check_network(policy: Policy, stages: Sequence[Any]) -> None:
    """Raises UserError if a policy was fitted on another network.

    Policies without a record (a user's own) fit every network with the same number of exits.
    """
    if policy.num_exits != len(stages):
        raise UserError(
            f"the policy is for {policy.num_exits} exits, the network has {len(stages)}"
        )
    record = policy.fitted_on.get(NETWORK)
    expected = record.get("weights") if isinstance(record, Mapping) else None
    if expected is None:
        return
    found = fingerprint(stages)
    if found is not None and found != expected:
        step = policy.fitted_on.get("step")
        of_step = "" if step is None else f", of step {step}"
        raise UserError(
            f"the policy was fitted on a network with other weights (checksum {expected[:8]}"
            f"{of_step}; this one's is {found[:8]}): choose a policy for this network"
        )
