"""Dry run: compiles a config's training step without its data, and reports its costs.

    python train.py --config=FILE.py --dry_run [--devices=8 | --topology=v5e:4x4] [--output=FILE]

for the available devices, for a number of simulated CPU devices, or for a TPU slice that you do not
have.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dfs_jax import program
from dfs_jax.costs.compiled import collectives, memory, operations
from dfs_jax.costs.hlo import Module
from dfs_jax.costs.step_operations import traced_step_cost
from dfs_jax.files import write_whole
from dfs_jax.reports.dry_run_report import DryRun, report, table_for_terminal
from dfs_jax.training.config import check_config
from dfs_jax.training.experiment import (
    Experiment,
    abstract_state,
    accumulate_steps,
    build_experiment,
    training_step,
)
from dfs_jax.training.input_config import described_dataset_from_config
from dfs_jax.training.sharding import batch_sharded, check_batch_size, create_mesh
from dfs_jax.types import Config, UserError, check_whole

# Keeps libtpu from asking a cloud's servers for the type of this machine.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def run_dry(
    config: Config,
    *,
    devices: int | None = None,
    topology: str | None = None,
    output: Path | None = None,
) -> None:
    """Prints the costs of a training step, and writes them to `output`, a JSON file.

    Must be called before jax is used: see `forced_devices`.

    Args:
      config: configuration of a run.
      devices: number of simulated CPU devices to compile for.
      topology: TPU slice to compile for; without either, the available devices.
      output: file to write.

    Raises:
      UserError: devices and topology together, or an error of the functions below.
    """
    if devices is not None and topology is not None:
        raise UserError(f"devices={devices} and topology={topology} exclude each other: give one")
    if topology is not None:
        there = topology_devices(topology)
    else:
        there = jax.devices() if devices is None else forced_devices(devices)
    found = dry_run(config, there)
    program.say(table_for_terminal(found))
    if output is not None:
        content = json.dumps(report(found), indent=2, allow_nan=False) + "\n"
        program.say(f"wrote {write_whole(output, content)}")


def dry_run(config: Config, devices: Sequence[Any]) -> DryRun:
    """Compiles the training step of a config for some devices, and returns its costs.

    Args:
      config: configuration of a run; a well-known data set need not be present.
      devices: devices of the mesh, which may be those of a topology.

    Raises:
      UserError: as in `build_experiment`, or the step does not fit into the devices' memory.
    """
    check_config(config)
    mesh = create_mesh(config.get("mesh"), devices)
    check_batch_size(config.batch_size, mesh, accumulate_steps(config))
    dataset = described_dataset_from_config(config.data)
    experiment = build_experiment(config, dataset, mesh=mesh)
    compiled = compile_step(experiment)
    module = Module(compiled.as_text())
    return DryRun(
        model=config.model.name,
        fork=config.fork.name,
        loss=config.loss.name,
        rule=config.gradients.name,
        device_kind=devices[0].device_kind,
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        devices_per_chip=_devices_per_chip(devices),
        batch_size=config.batch_size,
        bf16=config.get("compute_dtype") == "bfloat16",
        memory=memory(compiled),
        operations=operations(compiled, module),
        counted_flops=_counted_flops(experiment),
        collectives=collectives(module, mesh.size),
    )


def compile_step(experiment: Experiment) -> Any:
    """Returns the training step of an experiment, compiled for its mesh but not run.

    Raises:
      UserError: the step needs more memory than the devices have.
    """
    batch, where = experiment.config.batch_size, batch_sharded(experiment.mesh)
    shape = (batch, *experiment.dataset.image_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=where)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=where)
    step: Any = training_step(experiment)
    try:
        return step.lower(abstract_state(experiment), images, labels).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the step does not fit into the devices' memory ({reason}): take a larger mesh.fsdp, "
            f"accumulate_steps, remat=True or more devices"
        ) from error


def forced_devices(count: int) -> list[Any]:
    """Returns a number of simulated devices on this computer's processor.

    jax must not have started, since it determines the number of devices then.

    Raises:
      UserError: the number is not positive, or jax has started with another number.
    """
    check_whole("devices", count)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # jax has started: its number of devices is checked below
    found = jax.devices("cpu")
    if len(found) != count:
        raise UserError(
            f"devices={count} cannot be forced, jax has started with {len(found)}: "
            f"ask in a program of its own"
        )
    return list(found)


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a TPU slice, for which programs can be compiled but not run.

    Args:
      name: generation and shape, such as "v5e:4x4" or "v5p:2x2x1".

    Raises:
      UserError: the package `libtpu` is missing, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology={name} needs the TPU's compiler, the package libtpu: run "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"topology={name} is not a slice of a TPU that libtpu knows, such as v5e:4x4: {error}"
        ) from error


def _devices_per_chip(devices: Sequence[Any]) -> int:
    """Returns the number of devices per chip: two if its cores are separate devices (TPU v4)."""
    places = {tuple(device.coords) for device in devices if hasattr(device, "coords")}
    return len(devices) // len(places) if places else 1


def _counted_flops(experiment: Experiment) -> float | None:
    e = experiment
    if not e.rule.is_plain_sum:
        return None
    cost = traced_step_cost(e.model, e.fork, e.loss, e.dataset.image_shape)
    return 2 * cost.total * e.config.batch_size / e.mesh.size
