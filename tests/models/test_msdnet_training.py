"""MSDNet trains: the configs and their methods, real images, one step at full size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from configs import cifar10_msdnet, cifar100_msdnet, imagenet_msdnet
from dfs_jax.forks import create_fork
from dfs_jax.gradients.summed import Sum
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.sharding import create_mesh, put_batch, replicated
from dfs_jax.training.state import NO_BAD_STEP, create_state
from dfs_jax.training.step import make_train_step

REPOSITORY = Path(__file__).resolve().parents[2]
FULL_SIZE = {"msdnet_cifar100": (100, 32), "msdnet_imagenet": (1000, 224)}


@pytest.mark.parametrize("module", [cifar100_msdnet, cifar10_msdnet, imagenet_msdnet])
@pytest.mark.parametrize(
    ("method", "fork", "referencing", "loss"),
    [
        ("dfs", "dfs", "trunk_only", "deep_supervision"),
        ("dsn", "plain", None, "deep_supervision"),
        ("byot", "plain", None, "byot"),
    ],
)
def test_methods_of_the_configs(module, method, fork, referencing, loss):
    config = module.get_config(method)
    assert (config.fork.name, config.fork.referencing) == (fork, referencing)
    assert config.loss.name == loss


@pytest.mark.slow
def test_growth_4_learns_real_images_in_two_epochs(tmp_path, shared_dir):
    """As a user runs it: what the tests compile quickly would train slowly."""
    command = [
        "train.py",
        f"--workdir={tmp_path}",
        "--config=configs/cifar10_msdnet.py",
        "--config.model.growth=4",
        "--config.data.name=tests.models.test_resnet_training:part_of_cifar10",
        f"--config.data.data_dir={shared_dir / 'tfds'}",
        "--config.data.validation_examples=1000",  # 5,000 are left
        "--config.batch_size=50",
        "--config.epochs=2",
        "--config.eval_every_epochs=2",
        "--config.schedule.decay_epochs=(1,)",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, *command], check=True, cwd=REPOSITORY, env=environment)
    line = [line for line in read_metrics(tmp_path) if line["split"] == "validation"][-1]
    accuracies = [line[f"exit{i}/accuracy"] for i in range(1, 8)]
    assert accuracies[-1] > 0.25, accuracies
    assert min(accuracies) > 0.15, accuracies


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_model_runs_a_step(name):
    classes, size = FULL_SIZE[name]
    model = create_model(name, num_classes=classes)
    optimizer, mesh = optax.sgd(0.1), create_mesh()
    variables = init_variables(model, jax.random.key(0), (size, size, 3))
    before = jax.tree.map(np.array, variables["params"])
    state = create_state(
        variables, optimizer, jax.random.key(1), num_exits=model.num_exits, keep_average=False
    )
    step = make_train_step(
        model,
        create_fork("dfs", referencing="trunk_only"),
        create_loss("deep_supervision"),
        Sum(),
        optimizer,
        lambda images, key: images,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        mesh=mesh,
    )
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    batch = put_batch((images, np.array([3, 5])), mesh)
    state = step(jax.device_put(state, replicated(mesh)), *batch)
    assert state.first_bad_step == NO_BAD_STEP
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    assert all(any(jax.tree.leaves(part)) for part in moved.values())
