"""Meshes: their sizes, how arrays lie on them, and that eight devices give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dfs_jax.training.experiment import build_experiment
from dfs_jax.training.sharding import (
    AXES,
    batch_parts,
    check_batch_size,
    create_mesh,
    mesh_sizes,
    round_up_to_devices,
)
from dfs_jax.training.state_sharding import LEAST_SPLIT, check_split, tree_shardings
from dfs_jax.types import UserError
from tests.support.helpers import TinyNetwork, tiny_config
from tests.support.mesh_cases import CASES, CHECKS, DEVICES

QUICK = ("small_vgg-byot-fsdp-float64", "checkpoints", "evaluation", "initial-state")
SLOW = [name for name in (*CASES, *CHECKS) if name not in QUICK]


def run_on_eight_devices(root, names):
    devices = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}",
        "JAX_COMPILATION_CACHE_DIR": str(root / ".cache" / "tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.mesh_cases", *names],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    # What the compiler says of features that it gathers instead of parameters.
    assert "rematerialization" not in result.stderr
    assert result.stdout.split("\n")[:-1] == [f"ok {name}" for name in names]


def test_eight_devices_give_what_one_gives(request):
    run_on_eight_devices(request.config.rootpath, QUICK)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives_for_every_model(request):
    run_on_eight_devices(request.config.rootpath, SLOW)


@pytest.mark.parametrize(
    ("section", "sizes"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 1, "tensor": None}, (2, 1, 4)),
        ({"data": 4, "fsdp": 2, "tensor": 1}, (4, 2, 1)),
    ],
)
def test_sizes_of_a_mesh(section, sizes):
    assert tuple(mesh_sizes(section, 8).values()) == sizes


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fsdp": 3}, r"the mesh fsdp=3 x tensor=1 does not fit 8 device\(s\)"),
        ({"data": 2, "fsdp": 2}, "the mesh data=2 x fsdp=2 x tensor=1 does not fit 8"),
        ({"data": 16}, "whose product is 8"),
        ({"data": 0}, "mesh.data must be a whole number of at least 1, got 0"),
        ({"tensor": -2}, "mesh.tensor must be a whole number of at least 1, got -2"),
        ({"fsdp": None}, "mesh.data and mesh.fsdp cannot all take the rest of the devices"),
    ],
)
def test_meshes_that_do_not_fit(section, message):
    with pytest.raises(UserError, match=message):
        mesh_sizes(section, 8)


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(AXES))


def specs(tree, mesh, tensor_axes=None, **options):
    found = tree_shardings(tree, mesh, tensor_axes or {}, **options)
    return jax.tree.map(lambda sharding: sharding.spec, found)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_the_largest_axis_that_can_be_divided_is_split():
    tree = {
        "one": array(3, 3, 64, 96),
        "equal": array(3, 3, 64, 64),
        "odd": array(1000, 66),
        "prime": array(1009, 67),
        "small": array(LEAST_SPLIT - 4),
        "scalar": array(),
    }
    assert specs(tree, abstract_mesh(2, 4, 1)) == {
        "one": PartitionSpec(None, None, None, "fsdp"),
        "equal": PartitionSpec(None, None, None, "fsdp"),
        "odd": PartitionSpec("fsdp", None),
        "prime": PartitionSpec(),
        "small": PartitionSpec(),
        "scalar": PartitionSpec(),
    }
    by_exit = specs({"one": array(512, 3, 64, 96)}, abstract_mesh(2, 4, 1), leading=1)
    assert by_exit == {"one": PartitionSpec(None, None, None, "fsdp")}
    assert specs({"x": array(1, 8, LEAST_SPLIT // 8 - 1)}, abstract_mesh(1, 8, 1), leading=1) == {
        "x": PartitionSpec()
    }


def test_layers_are_split_by_name():
    rules = {"mlp/kernel": -1, "out": -2}
    tree = {
        "mlp": {"kernel": array(128, 64), "bias": array(64)},
        "smlp": {"kernel": array(4, 8)},
        "state": [{"out": array(5, 6, 7)}],
    }
    assert specs(tree, abstract_mesh(1, 2, 2), rules) == {
        "mlp": {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec()},
        "smlp": {"kernel": PartitionSpec()},
        "state": [{"out": PartitionSpec(None, "tensor", None)}],
    }


def test_an_axis_that_would_split_nothing_is_refused():
    model, params = TinyNetwork(3), {"block1": {"kernel": array(3, 3, 3, 4)}}
    check_split(params, abstract_mesh(8, 1, 1), model)
    with pytest.raises(UserError, match=r"mesh.fsdp=2 splits nothing: no parameter of TinyNetwork"):
        check_split(params, abstract_mesh(4, 2, 1), model)
    with pytest.raises(
        UserError, match=r"mesh.tensor=2 is for models .* as ViT does, not for Tiny"
    ):
        check_split(params, abstract_mesh(4, 1, 2), model)


def test_batches_and_meshes():
    mesh = abstract_mesh(2, 3, 4)
    assert batch_parts(mesh) == 6
    check_batch_size(12, mesh, accumulate_steps=2)
    assert round_up_to_devices(7, mesh) == 12
    with pytest.raises(UserError, match=r"6 device\(s\) in 2 micro batches: .* multiple of 12"):
        check_batch_size(18, mesh, accumulate_steps=2)


VIT = {"model.name": "vit_tiny", "model.patch_size": 4, "model.width": 6, "model.heads": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 2}, r"the mesh fsdp=2 x tensor=1 does not fit 1 device\(s\)"),
        ({"accumulate_steps": 2}, "batch_size 5 cannot be divided over 1 .* in 2 micro batches"),
        ({"accumulate_steps": 0}, "accumulate_steps must be a whole number of at least 1, got 0"),
        ({"batch_norm_groups": 2}, "batch_norm_groups=2 cannot divide a batch of 5"),
        ({"batch_norm_groups": 0}, "batch_norm_groups must be a whole number of at least 1"),
        ({"compute_dtype": "float16"}, "compute_dtype must be float32 or bfloat16, got 'float16'"),
        (
            {"compute_dtype": "bfloat16", "model.name": "tests.support.helpers:TinyNetwork"},
            "compute_dtype=bfloat16 needs a model with the attribute 'dtype', which TinyNetwork",
        ),
        ({**VIT, "batch_norm_groups": 5}, "batch_norm_groups=5 needs a model with .* ViT lacks"),
    ],
)
def test_options_that_make_no_sense_are_told_before_training(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(tiny_config(**changes))


def test_heads_that_the_devices_cannot_share_are_told():
    experiment = build_experiment(tiny_config(**VIT))
    with (
        jax.sharding.use_abstract_mesh(abstract_mesh(1, 1, 2)),
        pytest.raises(UserError, match="3 heads cannot be split over tensor=2 devices"),
    ):
        jax.eval_shape(experiment.model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_by_default_all_devices_divide_the_batch():
    mesh = create_mesh(tiny_config().mesh)
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
