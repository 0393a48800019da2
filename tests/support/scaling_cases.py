"""Cases for forced devices: `python -m tests.support.scaling_cases DEVICES NAME...`.

Every case compiles one training step for a mesh and for one device alone, and holds what the
modules say against what the mesh predicts. See `test_mesh_costs`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax

from dfs_jax.costs.compiled import ALL_REDUCE, collectives, operations
from dfs_jax.costs.hlo import Module
from dfs_jax.reports.dry_run import compile_step, forced_devices
from dfs_jax.reports.mesh_costs import exchanged_bytes, predicted_cost
from dfs_jax.training import state_sharding
from dfs_jax.training.experiment import Experiment, abstract_state, build_experiment
from dfs_jax.training.input_config import described_dataset_from_config
from dfs_jax.training.sharding import create_mesh
from tests.support.helpers import tiny_config
from tests.support.mesh_cases import MODELS, NAMES, VITS

# Images of one device.
SHARE = 2
# What is exchanged besides, in bytes and in collectives: flags (is an update finite, does any image
# of the batch get an operation) and BYOT's distances of features, which are norms over the batch.
SPARE_BYTES, SPARE_COUNT = 160, 12
# Shares of products that some processors' compilers do otherwise than they are defined: depthwise
# convolutions' weight gradients, and maps of 2x2 pixels, whose kernel and image change places.
SPARE_FLOPS = {"resnet18": 0.02, "msdnet": 0.002}


class Case(NamedTuple):
    """A model, devices along `fsdp`, a loss, and what is done to the images."""

    model: str
    fsdp: int
    loss: str = "deep_supervision"
    augmentation: str = "crop,flip"

    def experiment(self, devices: list[Any]) -> Experiment:
        options = {f"model.{name}": value for name, value in MODELS[self.model].items()}
        switches = {} if self.model in VITS else {"model.cpu_kernels": False}
        config = tiny_config(
            **{
                "model.name": NAMES.get(self.model, self.model),
                "loss.name": self.loss,
                "data.name": "cifar100",
                "data.image_size": 16,
                "data.validation_examples": None,
                "data.augmentation": self.augmentation,
                "batch_size": SHARE * len(devices),
                "mesh.fsdp": self.fsdp if len(devices) > 1 else 1,
                **options,
                **switches,
            }
        )
        dataset = described_dataset_from_config(config.data)
        return build_experiment(config, dataset, mesh=create_mesh(config.mesh, devices))


CASES = {
    "small_vgg": Case("small_vgg", 1, augmentation="crop,flip,autoaugment,cutout"),
    "small_vgg-fsdp": Case("small_vgg", 4),
    "vgg7": Case("vgg7", 1, loss="byot", augmentation="crop,flip,autoaugment,cutout"),
    "vgg7-fsdp": Case("vgg7", 8),
    "resnet18": Case("resnet18", 1),
    "resnet18-fsdp": Case("resnet18", 2, loss="byot"),
    "msdnet": Case("msdnet", 1),
    "msdnet-fsdp": Case("msdnet", 8),
    "vit": Case("vit_tiny", 1),
}


def run_case(case: Case, devices: list[Any]) -> None:
    many, one = case.experiment(devices), case.experiment(devices[:1])
    flops, rows = costs(many)
    predicted, (reduced, gathered) = predicted_cost(many), exchanged_bytes(rows)
    assert gathered == predicted.gathered_bytes, (predicted, rows)
    assert 0 <= reduced - predicted.reduced_bytes <= SPARE_BYTES, (predicted, rows)
    assert (gathered > 0) == (case.fsdp > 1 and len(devices) > 1)
    # All gradients at once; a normalisation's sums when they are needed: mean, variance, gradient.
    norms = len(jax.tree.leaves(abstract_state(many).batch_stats)) // 2
    sums = sum(row.count for row in rows if row.kind == ALL_REDUCE)
    assert sums <= 3 * norms + 1 + SPARE_COUNT, (norms, rows)

    flops_alone, nothing = costs(one)
    assert not nothing
    assert flops == flops_alone, (flops, flops_alone)
    if "autoaugment" not in case.augmentation:  # which multiplies matrices, too
        spare = SPARE_FLOPS.get(case.model, 0) * predicted.product_flops
        assert abs(flops - predicted.product_flops) <= spare, (flops, predicted)


def costs(experiment: Experiment) -> tuple[int, list]:
    """Returns the FLOPs of products and the collectives of one device."""
    compiled = compile_step(experiment)
    module = Module(compiled.as_text())
    return operations(compiled, module).product_flops, collectives(module, experiment.mesh.size)


def main(count: int, names: list[str]) -> None:
    state_sharding.LEAST_SPLIT = 64  # of narrow networks too something is split
    devices = forced_devices(count)
    for name in names:
        run_case(CASES[name], devices)
        sys.stdout.write(f"ok {name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
