"""A tiny run, as the programs for inference find it."""

import pytest

from dfs_jax.inference.trained import load_staged
from dfs_jax.training.loop import train
from tests.support.helpers import tiny_config


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Directory of a run of one epoch."""
    path = tmp_path_factory.mktemp("run")
    train(tiny_config(**{"epochs": 1, "model.name": "tests.support.helpers:TinyNetwork"}), path)
    return path


@pytest.fixture(scope="module")
def staged(tiny_run):
    """Best checkpoint of the run."""
    return load_staged(tiny_run)
