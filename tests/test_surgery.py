"""FeatureSurgery against masks derived by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax import surgery
from dfs_jax.surgery import FeatureSurgery, partition_channels

SHAPE, CHANNELS = (2, 3, 7), 7
RNG = np.random.default_rng(0)
X, TO_HEAD, TO_TRUNK = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(3))
# beta -> how many of 7 channels are shared: 0, 2.1, 3.5 (to even: 4), 7.
SHARED = {0: 0, 0.3: 2, 0.5: 4, 1: 7}


def views_and_gradient(surgeon, exit_index=0, num_exits=3):
    """The forked feature and the gradient of <to_head, TO_HEAD> + <to_trunk, TO_TRUNK>."""

    def loss(x):
        forked = surgeon(x, exit_index=exit_index, num_exits=num_exits)
        return jnp.sum(forked.to_head * TO_HEAD) + jnp.sum(forked.to_trunk * TO_TRUNK), forked

    gradient, forked = jax.grad(loss, has_aux=True)(X)
    return forked, np.asarray(gradient)


@pytest.mark.parametrize("beta", SHARED)
def test_symmetric_sends_each_channel_the_gradient_of_its_owner(beta):
    k = SHARED[beta]
    forked, gradient = views_and_gradient(FeatureSurgery(beta, "symmetric"))
    np.testing.assert_array_equal(forked.to_head, X)
    np.testing.assert_array_equal(forked.to_trunk, X)
    np.testing.assert_array_equal(gradient[..., :k], TO_TRUNK[..., :k])
    np.testing.assert_array_equal(gradient[..., k:], TO_HEAD[..., k:])


@pytest.mark.parametrize("beta", SHARED)
def test_trunk_only_lets_the_exit_train_every_channel(beta):
    k = SHARED[beta]
    forked, gradient = views_and_gradient(FeatureSurgery(beta, "trunk_only"))
    np.testing.assert_array_equal(forked.to_head, X)
    np.testing.assert_array_equal(forked.to_trunk, X)
    np.testing.assert_array_equal(gradient[..., :k], TO_HEAD[..., :k] + TO_TRUNK[..., :k])
    np.testing.assert_array_equal(gradient[..., k:], TO_HEAD[..., k:])


@pytest.mark.parametrize("beta", SHARED)
def test_none_shows_each_reader_its_own_channels_alone(beta):
    k = SHARED[beta]
    forked, gradient = views_and_gradient(FeatureSurgery(beta, "none"))
    np.testing.assert_array_equal(forked.to_head[..., :k], 0)
    np.testing.assert_array_equal(forked.to_head[..., k:], X[..., k:])
    np.testing.assert_array_equal(forked.to_trunk[..., :k], X[..., :k])
    np.testing.assert_array_equal(forked.to_trunk[..., k:], 0)
    np.testing.assert_array_equal(gradient[..., :k], TO_TRUNK[..., :k])
    np.testing.assert_array_equal(gradient[..., k:], TO_HEAD[..., k:])


@pytest.mark.parametrize("referencing", surgery.REFERENCINGS)
def test_last_exit_is_never_partitioned(referencing):
    surgeon = FeatureSurgery((0.3, 0.5), referencing)
    forked, gradient = views_and_gradient(surgeon, exit_index=2)
    np.testing.assert_array_equal(forked.to_head, X)
    np.testing.assert_array_equal(forked.to_trunk, X)
    np.testing.assert_array_equal(gradient, TO_HEAD + TO_TRUNK)


def test_one_ratio_an_exit():
    surgeon = FeatureSurgery([0.3, 1.0])
    assert surgeon.partition_ratio == (0.3, 1.0)
    assert [surgeon.ratio_at(i, num_exits=3) for i in range(2)] == [0.3, 1.0]
    for i, k in enumerate((2, CHANNELS)):
        trained = jax.grad(lambda x, i=i: surgeon(x, exit_index=i, num_exits=3).to_trunk.sum())(X)
        assert np.asarray(trained).any(axis=(0, 1)).sum() == k
    assert FeatureSurgery((0.3,)).ratio_at(4, num_exits=6) == 0.3


def test_shared_channels_round_halves_to_even():
    assert [partition_channels(c, 0.5) for c in (3, 5, 7, 64)] == [2, 2, 4, 32]


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), True, "half", (0.5, 2.0)])
def test_ratio_outside_its_range_is_refused_with_the_value(beta):
    wrong = beta[1] if isinstance(beta, tuple) else beta
    with pytest.raises(ValueError, match=r"partition_ratio must lie in \[0, 1\]") as caught:
        FeatureSurgery(beta)
    assert repr(wrong) in str(caught.value)


def test_unknown_referencing_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="symmetric, trunk_only, none, got 'both'"):
        FeatureSurgery(0.5, "both")


def test_another_number_of_ratios_than_early_exits_is_refused():
    with pytest.raises(ValueError, match=r"4 exits take 1 or 3 partition ratios .* got 2"):
        FeatureSurgery((0.3, 0.5))(X, exit_index=0, num_exits=4)


@pytest.mark.parametrize("exit_index", [-1, 3])
def test_exit_index_out_of_range_is_refused(exit_index):
    with pytest.raises(ValueError, match=rf"\[0, 3\), got {exit_index}"):
        FeatureSurgery()(X, exit_index=exit_index, num_exits=3)
