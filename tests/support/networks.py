"""Small networks that several tests build."""

from __future__ import annotations

import jax

from dfs_jax.costs.operations import count_operations

SMALL_MSDNET = {
    "num_exits": 3,
    "base": 1,
    "step": 1,
    "step_mode": "even",
    "initial_channels": 3,
    "growth": 4,
    "scale_factors": (1, 2),
    "bottleneck_factors": (1, 2),
    "stem": "cifar",
    "head_channels": 5,
    "head_dropout": 0.0,
}
SMALL_VIT = {"width": 6, "heads": 2, "depth": 4, "patch_size": 1, "first_exit_layer": 2}


def macs(function, *args):
    return count_operations(jax.make_jaxpr(function)(*args))
