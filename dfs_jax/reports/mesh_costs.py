"""Predicted costs of a training step on a device mesh, to check compiled modules against."""

from __future__ import annotations

from typing import NamedTuple

import jax

from dfs_jax.costs.compiled import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collective
from dfs_jax.costs.step_operations import traced_step_cost
from dfs_jax.training.experiment import Experiment, abstract_state
from dfs_jax.training.sharding import FSDP_AXIS, batch_parts
from dfs_jax.types import PyTree

# Loss of an exit, in float32, and its number of correct examples, in int32.
_BYTES_PER_EXIT = 8


class MeshCost(NamedTuple):
    """Cost of one step on one device.

    Attributes:
      product_flops: FLOPs of convolutions and matrix products.
      reduced_bytes: size of arrays that are summed over devices.
      gathered_bytes: size of arrays that are gathered from parts on the devices.
    """

    product_flops: int
    reduced_bytes: int
    gathered_bytes: int


def predicted_cost(experiment: Experiment) -> MeshCost:
    """Returns the predicted cost of a step on the axes `data` and `fsdp` of an experiment's mesh.

        product_flops    2 x multiply-adds of one image x images of a step / devices
        reduced_bytes    gradients + batch statistics + 8 per exit
        gathered_bytes   parameters that are split along `fsdp`

    Each of n devices processes an nth of the batch through the whole network. The gradient of every
    parameter is summed once over devices, and so are mean and variance of every normalisation, and
    the exits' losses and correct answers. The gradients of a normalisation's scale and bias follow
    from sums that its input gradient needs anyway. One device does not communicate.

    This holds for summed exit gradients in one pass over the batch, without an axis `tensor`.
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
      ValueError: a collective of another kind, which no mesh of this project needs.
    """
    kinds = {row.kind for row in collectives}
    if strange := kinds - {ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER}:
        raise ValueError(f"a training step has no use for {', '.join(sorted(strange))}")
    gathered = sum(row.bytes for row in collectives if row.kind == ALL_GATHER)
    return sum(row.bytes for row in collectives) - gathered, gathered


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
