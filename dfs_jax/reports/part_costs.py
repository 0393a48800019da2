"""Cost of a network's trunk up to each exit, and of each head: counted, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.costs.flops import exit_costs
from dfs_jax.exits.scores import max_softmax
from dfs_jax.inference import onnx_models, quantize
from dfs_jax.inference.programs import Programs, make_programs
from dfs_jax.inference.timing import noise_like, stage_runs
from dfs_jax.inference.trained import StagedRun
from dfs_jax.stopwatch import median_seconds
from dfs_jax.types import UserError

MACS, JAX, ONNX = "macs", "jax", "onnx"
COSTS = (MACS, JAX, ONNX)
_ROUNDS, _ROUNDS_ALONE = 9, 101


class PartCosts(NamedTuple):
    """Costs of one image: multiply-adds, or seconds.

    Attributes:
      trunk: those of the trunk up to each exit; the last includes the last head, which every
        subset has.
      heads: those of each early head, and 0.
    """

    trunk: tuple[float, ...]
    heads: tuple[float, ...]


def part_costs(staged: StagedRun, costs: str = MACS, *, batch: int = 1) -> PartCosts:
    """Returns the costs of a network's parts.

    Args:
      staged: the network.
      costs: "macs" for multiply-adds; "jax" or "onnx" for times in that runtime on this machine.
      batch: number of images in a batch that is timed.

    Raises:
      UserError: other costs, or a batch below 1.
    """
    check_costs(costs, batch)
    return counted(staged) if costs == MACS else measured(staged, costs, batch)


def check_costs(costs: str, batch: int) -> None:
    """Raises a UserError for other costs than those of `COSTS`, or a batch below 1."""
    if costs not in COSTS:
        raise UserError(f"--costs must be one of {', '.join(COSTS)}, got {costs!r}")
    if batch < 1:
        raise UserError(f"--batch must be at least 1, got {batch}")


def counted(staged: StagedRun) -> PartCosts:
    """Counts the multiply-adds of a network's trunk and heads, all that its blocks compute."""
    costs = exit_costs(staged.experiment.model, staged.experiment.dataset.image_shape)
    # Heads on the way to each exit, and from these the heads.
    earlier = [cost.published_macs - cost.macs_without_earlier_heads for cost in costs]
    heads = (*np.diff(earlier).tolist(), 0)
    trunk = [
        cost.macs_without_earlier_heads - head for cost, head in zip(costs, heads, strict=True)
    ]
    return PartCosts(tuple(map(float, trunk)), tuple(map(float, heads)))


def measured(staged: StagedRun, runtime: str, batch: int) -> PartCosts:
    """Measures the time of a network's trunk and heads, in seconds for each image.

    The stages up to exit k take time for all heads up to k, the network up to exit k as one program
    for that head alone; their difference is the time of the heads on the way. A stage's fixed time,
    such as that of its call, is part of its head's.
    """
    parts = [_programs(staged, k, runtime) for k in range(len(staged.stages))]
    images = noise_like(staged.example, batch)
    *stages, _ = stage_runs(parts[-1], images)
    runs = [*stages, *(stage_runs(part, images)[-1] for part in parts)]
    rounds = _ROUNDS_ALONE if batch == 1 else _ROUNDS
    seconds = [taken / batch for taken in median_seconds(runs, rounds)]
    return parts_of(seconds[: len(parts)], seconds[len(parts) :])


def parts_of(stages: Sequence[float], whole: Sequence[float]) -> PartCosts:
    """Returns the costs of parts, from times of stages and of networks up to each exit.

    Args:
      stages: time of each stage, with its head.
      whole: time of the network up to each exit, with that head alone.

    Example: a trunk of 2 and 3 seconds, and heads of 1 and 0.5 seconds.
      >>> parts_of([3.0, 3.5], [3.0, 5.5])
      PartCosts(trunk=(2.0, 5.5), heads=(1.0, 0))
    """
    earlier = np.maximum.accumulate(np.maximum(np.cumsum(stages) - whole, 0))
    heads = (*np.diff(earlier).tolist(), 0)
    trunk = np.maximum.accumulate([t - h for t, h in zip(whole, heads, strict=True)])
    return PartCosts(tuple(trunk.tolist()), heads)


def _programs(staged: StagedRun, k: int, runtime: str) -> Programs:
    stages: Any = staged.stages[: k + 1]
    if runtime == ONNX:
        stages = quantize.opened(*onnx_models.written(stages, staged.example))
    return make_programs(stages, max_softmax, (1.0,) * (k + 1), staged.example)
