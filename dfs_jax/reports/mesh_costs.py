"""What a mesh of devices should cost a training step, to hold a compiled module against."""

from __future__ import annotations

from typing import NamedTuple

import jax

from dfs_jax.costs.compiled import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collective
from dfs_jax.costs.step_operations import traced_step_cost
from dfs_jax.training.experiment import Experiment, abstract_state
from dfs_jax.training.sharding import FSDP_AXIS, batch_parts
from dfs_jax.types import PyTree

# An exit's loss, in float32, and how many examples it classified correctly, in int32.
_BYTES_PER_EXIT = 8


class MeshCost(NamedTuple):
    """Of one device, in one step.

    Attributes:
      product_flops: of its convolutions and matrix products.
      reduced_bytes: of arrays that are added up over devices, each of which has a part of the sum.
      gathered_bytes: of arrays that are put together from the devices' parts.
    """

    product_flops: int
    reduced_bytes: int
    gathered_bytes: int


def predicted_cost(experiment: Experiment) -> MeshCost:
    """Returns what the axes `data` and `fsdp` of an experiment's mesh should make of its step.

        product_flops    2 x multiply-adds of one image x images of a step / devices
        reduced_bytes    gradients + batch statistics + 8 an exit
        gathered_bytes   parameters that are split along `fsdp`

    With n devices each takes an nth of the batch through the whole network. The gradient of every
    parameter is added up once, and so are the mean and the variance of every normalisation, the
    exits' losses and correct answers; the scale and the bias of a normalisation get their gradients
    from the sums that its inputs' gradient needs anyway. With one device nothing is exchanged.

    For exits whose gradients are summed, in one pass over the batch, without an axis `tensor`.
    """
    state, devices = abstract_state(experiment), batch_parts(experiment.mesh)
    one_image = traced_step_cost(
        experiment.model, experiment.fork, experiment.loss, experiment.dataset.image_shape
    )
    reduced = _bytes(state.params) + _bytes(state.batch_stats)
    reduced += _BYTES_PER_EXIT * experiment.model.num_exits
    split = [leaf for leaf in jax.tree.leaves(state.params) if FSDP_AXIS in leaf.sharding.spec]
    return MeshCost(
        product_flops=2 * one_image.total * experiment.config.batch_size // devices,
        reduced_bytes=reduced if devices > 1 else 0,
        gathered_bytes=_bytes(split),
    )


def exchanged_bytes(collectives: list[Collective]) -> tuple[int, int]:
    """Returns `reduced_bytes` and `gathered_bytes` of a compiled module's collectives.

    Raises:
      ValueError: one of another kind, which no mesh of this project's calls for.
    """
    kinds = {row.kind for row in collectives}
    if strange := kinds - {ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER}:
        raise ValueError(f"a training step has no use for {', '.join(sorted(strange))}")
    gathered = sum(row.bytes for row in collectives if row.kind == ALL_GATHER)
    return sum(row.bytes for row in collectives) - gathered, gathered


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
