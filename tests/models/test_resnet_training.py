"""ResNet trains: the published config and its methods, real images, one step at full size."""

from __future__ import annotations

import numpy as np
import pytest

from configs import cifar100_resnet18
from dfs_jax.data.dataset import RawDataset
from dfs_jax.data.sources import load_dataset
from dfs_jax.training.experiment import build_experiment, initial_state, training_step
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.sharding import put_batch
from dfs_jax.training.state import NO_BAD_STEP

FAMILY = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@pytest.mark.parametrize("method", ["dfs", "byot", "dsn"])
def test_methods_of_the_config(method):
    config = cifar100_resnet18.get_config(method)
    assert (config.fork.name == "dfs") == (method == "dfs")
    assert (config.loss.name == "byot") == (method != "dsn")


def config_on(data, **changes):
    """The published config on another data set."""
    config = cifar100_resnet18.get_config()
    config.data.name = data
    config.data.augmentation = "crop,flip"
    config.update_from_flattened_dict(changes)
    return config


def part_of_cifar10(data_dir):
    """The first 6,000 training and 1,000 test images of CIFAR-10."""
    whole = load_dataset("cifar10", data_dir=data_dir, validation_examples=0)
    parts = [s.take(np.arange(n)) for s, n in ((whole.train, 6000), (whole.test, 1000))]
    return RawDataset(*parts, whole.class_names)


@pytest.mark.slow
def test_learns_real_images_in_two_epochs(shared_dir, tmp_path):
    config = config_on(
        "tests.models.test_resnet_training:part_of_cifar10",
        **{
            "data.data_dir": str(shared_dir / "tfds"),
            "data.validation_examples": 1000,  # 5,000 are left
            "model.width": 16,
            "batch_size": 50,
            "eval_every_epochs": 2,
            "epochs": 2,
            "schedule.decay_epochs": (1,),
        },
    )
    train(config, tmp_path)
    line = read_metrics(tmp_path)[-1]
    assert line["split"] == "validation"
    assert line["exit4/accuracy"] > 0.25  # chance: 0.1
    assert all(line[f"exit{i}/accuracy"] > 0.15 for i in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_a_full_size_model_runs_a_step(name):
    config = config_on("tests.support.helpers:tiny_images", **{"model.name": name, "batch_size": 2})
    experiment = build_experiment(config)
    split = experiment.dataset.train
    batch = put_batch((split.images[:2], split.labels[:2]), experiment.mesh)
    before = initial_state(experiment)
    first = np.asarray(before.params["block1"]["stem"]["conv"]["kernel"])
    state = training_step(experiment)(before, *batch)
    assert int(state.step) == 1
    assert int(state.first_bad_step) == NO_BAD_STEP
    moved = np.asarray(state.params["block1"]["stem"]["conv"]["kernel"])
    assert np.isfinite(moved).all()
    assert not np.array_equal(moved, first)
