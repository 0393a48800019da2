"""Stages: what they must be, what they record, and what one pass of a model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.inference.stages import (
    check_stages,
    last_logits,
    model_stages,
    recorded_logits,
    run_stages,
)
from dfs_jax.inference.timing import LEAST_GAIN, StageTimes
from dfs_jax.models.contract import init_variables, run_exits
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.types import UserError
from tests.support.helpers import HalfFork, TinyNetwork
from tests.support.stage_examples import CLASSES, EXAMPLE, STAGES, images

EXAMPLE_IMAGE = jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)


@pytest.mark.parametrize("fork", [FeatureSurgery(0.5, "none"), HalfFork(0.25)])
def test_a_models_stages_are_its_exits(fork):
    model = TinyNetwork(num_classes=CLASSES)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
    expected = model.apply(variables, x, method=lambda m, x: run_exits(m, x, fork)).logits
    stages = model_stages(model, variables, fork, EXAMPLE_IMAGE)
    np.testing.assert_allclose(run_stages(stages, x), expected, atol=1e-6)
    np.testing.assert_allclose(last_logits(stages, x), expected[-1], atol=1e-6)


def test_recorded_logits_are_those_of_one_pass_without_the_padding():
    batch = images(23)
    expected = run_stages(STAGES, jnp.asarray(batch))
    padded = np.concatenate([batch, images(5, 1)])
    mask = np.arange(28) < 23
    got = recorded_logits(STAGES, zip(np.split(padded, 4), np.split(mask, 4), strict=True))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


BAD_STAGES = {
    "at least 1 stage": [],
    r"stage 1 must return logits \[batch, classes\], got \[3\]": [lambda x: (x, x[:, 0, 0, 0])],
    r"stage 1 must return logits \[batch, classes\], got \[2, 3\]": [lambda x: (x, x[0, :, 0])],
    r"stage 2 must return logits \[batch, 3\], got \[3, 2\]": [
        lambda x: (x, x[:, 0, 0]),
        lambda x: (x, x[:, 0, 0, :2]),
    ],
    r"stage 1 must return a carry with the batch first, got \[2, 3\]": [
        lambda x: (x[0, :, 0], x[:, 0, 0]),
        lambda x: (x, x[:, :3]),
    ],
}


@pytest.mark.parametrize("message", BAD_STAGES)
def test_what_is_no_stage(message):
    with pytest.raises(UserError, match=message):
        check_stages(BAD_STAGES[message], EXAMPLE)


def test_times_by_hand():
    times = StageTimes(256, (1.0, 2.0, 4.0), 5.0)
    assert times.up_to_exit() == (1.0, 3.0, 7.0)
    assert times.staged((0.5, 0.25, 0.25)) == 1 + 0.5 * 2 + 0.25 * 4
    assert times.ideal_speedup((0.5, 0.25, 0.25)) == 5 / 3
    assert times.stopping_pays((0.5, 0.25, 0.25))
    assert not times.stopping_pays((0.0, 0.0, 1.0))
    just = 5.0 / LEAST_GAIN
    assert StageTimes(1, (just - 1e-9, 0, 0), 5.0).stopping_pays((1.0, 0.0, 0.0))
    assert not StageTimes(1, (just + 1e-9, 0, 0), 5.0).stopping_pays((1.0, 0.0, 0.0))


@pytest.mark.parametrize(("fork", "compiled"), [(FeatureSurgery(0.5), 1), (HalfFork(0.5), 2)])
def test_programs_of_equal_networks_are_shared(fork, compiled):
    """Forks that cannot be hashed, such as `HalfFork`, are compared by identity."""
    model = TinyNetwork(num_classes=CLASSES)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    run = jax.jit(lambda stages, x: run_stages(stages, x))
    x = jnp.ones((2, 8, 8, 3))
    for _ in range(2):
        run(model_stages(model, variables, fork, EXAMPLE_IMAGE), x)
    assert run._cache_size() == compiled
