"""BatchNorm's statistics taken anew before an evaluation: by hand, in a run, and refused."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import digits_vgg7
from dfs_jax.data.streaming import StreamedSplit, Streaming
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.recalibrate import Recalibration, batch_statistics
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

MOST_LOST = 0.1  # of accuracy, from the best evaluation before


def test_the_statistics_of_a_batch_itself_whatever_the_momentum():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (7, 5)), jnp.float32)
    for momentum in (0.0, 0.5, 0.99):
        norm = nn.BatchNorm(use_running_average=False, momentum=momentum)
        variables = norm.init(jax.random.key(0), x)

        def update(running, norm=norm, variables=variables):
            state = {"params": variables["params"], "batch_stats": running}
            return norm.apply(state, x, mutable=["batch_stats"])[1]["batch_stats"]

        found = batch_statistics(update, variables["batch_stats"])
        np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found["var"], x.var(0), rtol=1e-4)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_it_is_the_mean_over_batches_of_what_is_evaluated(ema):
    experiment = build_experiment(tiny_config(**{"optimizer.ema_decay": ema}))
    state = initial_state(experiment)
    recalibration = Recalibration(experiment, 13)
    found = recalibration(state)
    chex.assert_trees_all_equal(found.eval_variables["params"], state.eval_variables["params"])
    if ema is not None:
        chex.assert_trees_all_equal(found.batch_stats, state.batch_stats)

    def moved(images):
        """The first block's output before its norm is the images' convolution and ReLU."""
        pixels = (images / 255 - np.array(experiment.dataset.mean)) / experiment.dataset.std
        conv = state.eval_variables["params"]["block1"]["conv"]
        y = jax.lax.conv_general_dilated(
            jnp.asarray(pixels, jnp.float32),
            conv["kernel"],
            (1, 1),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = jnp.maximum(y + conv["bias"], 0)
        return y.mean((0, 1, 2)), y.var((0, 1, 2), ddof=1)

    train_split = experiment.dataset.train
    order = np.random.default_rng(0).permutation(train_split.num_examples)
    batches = [train_split.images[order[i : i + 5]] for i in (0, 5)]  # 13 make two batches of 5
    expected = [np.mean(pair, axis=0) for pair in zip(*map(moved, batches), strict=True)]
    norm = found.eval_variables["batch_stats"]["block1"]["norm"]
    np.testing.assert_allclose(norm["mean"], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm["var"], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_it_learns_the_same_parameters(tmp_path):
    config = tiny_config(epochs=2, **{"model.name": "tests.support.helpers:ThreeStageVGG"})
    train(config, tmp_path / "as_before")
    config.recalibrate_examples = 20
    train(config, tmp_path / "recalibrated")

    def losses(name, split):
        return [line["loss"] for line in read_metrics(tmp_path / name) if line["split"] == split]

    assert losses("as_before", "train") == losses("recalibrated", "train")
    assert losses("as_before", "validation") != losses("recalibrated", "validation")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (4, r"recalibrate_examples=4 must fill a batch of 5"),
        (0, r"recalibrate_examples must be a whole number of at least 1, got 0"),
    ],
)
def test_too_few_examples_are_refused(asked, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tiny_config(recalibrate_examples=asked), tmp_path)


def test_a_streamed_set_is_refused():
    experiment = build_experiment(tiny_config())
    streamed = StreamedSplit([], Streaming(8), np.arange(30))
    dataset = dataclasses.replace(experiment.dataset, train=streamed)
    with pytest.raises(UserError, match="needs a data set in memory"):
        Recalibration(experiment._replace(dataset=dataset), 20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demos_evaluations_never_fall_far(seed, tmp_path):
    """From the sixth on, exits 3 to 6."""
    config = digits_vgg7.get_config()
    config.seed = seed
    train(config, tmp_path)
    lines = [line for line in read_metrics(tmp_path) if line["split"] == "validation"]
    assert len(lines) == 18
    for i in (3, 4, 5, 6):
        curve = [line[f"exit{i}/accuracy"] for line in lines]
        falls = [max(curve[:k]) - curve[k] for k in range(5, len(curve))]
        assert max(falls) <= MOST_LOST, (i, curve)
