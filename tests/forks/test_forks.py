"""Every registered fork: what it shows its two readers, and that the last exit is left alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.forks import FORKS, create_fork
from dfs_jax.forks.gradient_equilibrium import GradientEquilibrium, scale_gradient
from dfs_jax.forks.plain import PlainFork
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.types import UserError

EXITS = 5
X = jnp.arange(2 * 3 * 7, dtype=jnp.float32).reshape(2, 3, 7)
# Options that leave the forward pass as it is.
FORK_ROWS = {
    "plain": {},
    "dfs": {"partition_ratio": 0.3, "referencing": "trunk_only"},
    "gradient_equilibrium": {},
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


def test_plain_fork_passes_both_gradients():
    def loss(x):
        forked = PlainFork()(x, exit_index=0, num_exits=2)
        return jnp.sum(2 * forked.to_head + 3 * forked.to_trunk)

    np.testing.assert_array_equal(jax.grad(loss)(X), jnp.full_like(X, 5))


@pytest.mark.parametrize("name", FORK_ROWS)
def test_the_last_exit_is_left_alone(name):
    fork = create_fork(name, **FORK_ROWS[name])

    def last(x):
        return fork(x, exit_index=EXITS - 1, num_exits=EXITS)

    gradient = jax.grad(lambda x: (2 * last(x).to_head).sum())(X)
    np.testing.assert_array_equal(gradient, jnp.full_like(X, 2))


def chain(x, fork):
    """Blocks that change nothing, and exits that each have a gradient of their own."""
    losses = []
    for i in range(EXITS):
        forked = fork(x, exit_index=i, num_exits=EXITS)
        losses.append(10.0**i * forked.to_head.sum())
        x = forked.to_trunk
    return jnp.stack(losses)


def test_equilibrium_makes_every_exit_count_alike():
    """Each block's gradient is the mean of the exits beyond it: the factors multiply to 1/L."""
    jacobian = jax.jacrev(lambda x: chain(x, GradientEquilibrium()))(X)
    for i in range(EXITS):
        np.testing.assert_allclose(jacobian[i], 10.0**i / EXITS, rtol=1e-6)


@pytest.mark.parametrize("i", range(EXITS - 1))
def test_equilibriums_factors_are_the_papers(i):
    def loss(x):
        forked = GradientEquilibrium()(x, exit_index=i, num_exits=EXITS)
        return jnp.stack([forked.to_head.sum(), forked.to_trunk.sum()])

    to_head, to_trunk = jax.jacrev(loss)(X)
    np.testing.assert_allclose(to_head, 1 / (EXITS - i), rtol=1e-6)
    np.testing.assert_allclose(to_trunk, (EXITS - i - 1) / (EXITS - i), rtol=1e-6)


def test_a_scaled_gradient_is_a_multiple_and_a_constant_but_for_rounding():
    """Forward mode, reverse mode and second derivatives of a cube against the naive graph."""
    x = jnp.asarray([1.5, -2.5, 0.1])

    def derivatives(scale):
        def cube(x):
            return (scale(x) ** 3).sum()

        return [cube(x), jax.grad(cube)(x), jax.hessian(cube)(x), jax.jvp(cube, (x,), (x,))[1]]

    ours = derivatives(lambda x: scale_gradient(x, 0.25))
    naive = derivatives(lambda x: 0.25 * x + jax.lax.stop_gradient(0.75 * x))
    for a, b in zip(ours, naive, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    low = x.astype(jnp.bfloat16)
    assert scale_gradient(low, 0.25).dtype == jnp.bfloat16
    assert jax.grad(lambda x: scale_gradient(x, 0.25).sum())(low).dtype == jnp.bfloat16


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
