"""The whole network of a run, or a part of it, in other runtimes than jax."""

import sys

import jax
import numpy as np
import pytest

from benchmarks.inference.runtimes import ONNX, check_runtimes, files_of, in_runtime, part_of
from dfs_jax.inference import quantize
from dfs_jax.inference.stages import run_stages
from dfs_jax.inference.trained import staged_run
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config


def test_a_runtime_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"^the runtime torch needs .*-benchmarks\.txt$"):
        check_runtimes(["jax", "torch"])


@pytest.fixture(scope="module")
def staged():
    """An untrained run."""
    experiment = build_experiment(tiny_config())
    return staged_run(experiment, initial_state(experiment).eval_variables, step=0)


def test_probabilities_are_those_of_the_last_exit(staged):
    pytest.importorskip("torch")
    from benchmarks.inference.torch_network import TorchNetwork

    images = staged.images("train", 5)
    network = TorchNetwork(staged)
    expected = jax.nn.softmax(run_stages(staged.stages, images)[-1])
    np.testing.assert_allclose(network.run(images), expected, rtol=1e-4, atol=1e-6)
    assert network.answer(images).shape == (5,)
    times = network.times(2, rounds=3)
    assert (times.batch, times.stages) == (2, ())
    assert 0 < times.whole < 60


def test_a_part_in_onnx_has_its_last_head_alone(staged, monkeypatch):
    pytest.importorskip("onnxruntime")
    opened = quantize.opened
    monkeypatch.setattr(quantize, "opened", lambda *files, share_threads: opened(*files))
    whole = in_runtime(staged, ONNX, files_of(staged, [ONNX]))
    assert part_of(staged, whole, ONNX, 2) is whole.stages
    part, images = part_of(staged, whole, ONNX, 1), staged.images("train", 5)
    assert len(part) == 2
    expected = run_stages(staged.stages, images)[1]
    np.testing.assert_allclose(part.last_logits(images), expected, rtol=1e-4, atol=1e-5)
    assert part.whole is not None
