"""Every registered fork: what it shows its two readers, and that the last exit is left alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.forks import FORKS, create_fork
from dfs_jax.forks.plain import PlainFork
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.types import UserError

X = jnp.arange(2 * 3 * 7, dtype=jnp.float32).reshape(2, 3, 7)
# Options that leave the forward pass as it is.
FORK_ROWS = {
    "plain": {},
    "dfs": {"partition_ratio": 0.3, "referencing": "trunk_only"},
}


@pytest.mark.parametrize("name", FORK_ROWS)
def test_both_readers_see_the_whole_feature(name):
    forked = create_fork(name, **FORK_ROWS[name])(X, exit_index=1, num_exits=5)
    np.testing.assert_array_equal(forked.to_head, X)
    np.testing.assert_array_equal(forked.to_trunk, X)


@pytest.mark.parametrize("name", FORK_ROWS)
def test_the_same_under_jit(name):
    fork = create_fork(name, **FORK_ROWS[name])
    jitted = jax.jit(lambda x: fork(x, exit_index=1, num_exits=5)[:2])(X)
    for eager, compiled in zip(fork(X, exit_index=1, num_exits=5)[:2], jitted, strict=True):
        np.testing.assert_array_equal(eager, compiled)


def test_plain_fork_passes_both_gradients_and_the_live_channels():
    def loss(x):
        forked = PlainFork()(x, exit_index=0, num_exits=2)
        return jnp.sum(2 * forked.to_head + 3 * forked.to_trunk)

    np.testing.assert_array_equal(jax.grad(loss)(X), jnp.full_like(X, 5))
    forked = PlainFork()(X, ((0, 2),), exit_index=0, num_exits=2)
    assert forked.head_live == forked.trunk_live == ((0, 2),)


def test_create_fork_passes_options_and_refuses_what_a_fork_lacks():
    fork = create_fork("dfs", partition_ratio=(0.25, 0.75), referencing=None)
    assert fork == FeatureSurgery((0.25, 0.75), "symmetric")
    with pytest.raises(UserError, match="fork 'plain' has no option 'partition_ratio'"):
        create_fork("plain", partition_ratio=0.5)
    with pytest.raises(UserError, match=r"fork 'dfs': partition_ratio must lie in \[0, 1\], got 2"):
        create_fork("dfs", partition_ratio=2)
    with pytest.raises(UserError, match="unknown fork 'spoon'"):
        create_fork("spoon")


def test_every_fork_has_its_row():
    assert FORK_ROWS.keys() == FORKS.table.keys()
