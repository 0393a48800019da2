"""The whole network of a run in PyTorch, as the inference benchmark runs it."""

import sys

import jax
import numpy as np
import pytest

from benchmarks.inference.runtimes import check_runtimes
from dfs_jax.inference.stages import run_stages
from dfs_jax.inference.trained import staged_run
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config


def test_a_runtime_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"^the runtime torch needs .*-benchmarks\.txt$"):
        check_runtimes(["jax", "torch"])


def test_probabilities_are_those_of_the_last_exit():
    pytest.importorskip("torch")
    from benchmarks.inference.torch_network import TorchNetwork

    experiment = build_experiment(tiny_config())
    staged = staged_run(experiment, initial_state(experiment).eval_variables, step=0)
    images = experiment.dataset.train.images[:5]
    network = TorchNetwork(staged)
    expected = jax.nn.softmax(run_stages(staged.stages, images)[-1])
    np.testing.assert_allclose(network.run(images), expected, rtol=1e-4, atol=1e-6)
    assert network.answer(images).shape == (5,)
    times = network.times(2, rounds=3)
    assert (times.batch, times.stages) == (2, ())
    assert 0 < times.whole < 60
