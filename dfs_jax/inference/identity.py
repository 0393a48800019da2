"""Identity of the network that a policy was fitted on: thresholds are valid for it alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dfs_jax.inference.policy import Policy
from dfs_jax.inference.stages import Stage
from dfs_jax.types import UserError

NETWORK = "network"  # key of the record in a policy's `fitted_on`


def named_weights(stage: Stage) -> dict[str, np.ndarray]:
    """Returns a stage's weights under names such as `params/block1/conv/kernel`.

    Args:
      stage: a `jax.tree_util.Partial` whose weights are leaves; other callables have no weights.
    """
    leaves = jax.tree_util.tree_flatten_with_path(stage)[0]
    return {
        weight_name(path): np.asarray(leaf, order="C")
        for path, leaf in leaves
        if hasattr(leaf, "dtype")
    }


def weight_name(path: Sequence[Any]) -> str:
    """Returns a leaf's name: the dictionary keys on its path, joined by slashes."""
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return "/".join(map(str, keys))


def weights_fingerprint(stages: Sequence[Stage]) -> str | None:
    """Returns a checksum of a network's weights, the same before and after export.

    None for stages whose weights are not leaves.
    """
    weights = {name: array for stage in stages for name, array in named_weights(stage).items()}
    if not weights:
        return None
    checksum = hashlib.sha256()
    for name, array in sorted(weights.items()):
        checksum.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        checksum.update(array.tobytes())
    return checksum.hexdigest()


def network_record(stages: Sequence[Stage], classes: int) -> dict[str, Any]:
    """Returns a policy's record of the network that it was fitted on, as plain data."""
    return {"exits": len(stages), "classes": classes, "weights": weights_fingerprint(stages)}


def check_network(policy: Policy, stages: Sequence[Stage]) -> None:
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
    found = weights_fingerprint(stages)
    if found is not None and found != expected:
        step = policy.fitted_on.get("step")
        of_step = "" if step is None else f", of step {step}"
        raise UserError(
            f"the policy was fitted on a network with other weights (checksum {expected[:8]}"
            f"{of_step}; this one's is {found[:8]}): choose a policy for this network"
        )
