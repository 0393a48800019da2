"""BatchNorm by hand, the padding of convolutions, and upsampling."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.layers import BatchNorm, Conv1x1, Conv3x3, conv_init, upsample_bilinear
from dfs_jax.types import UserError

RNG = np.random.default_rng(0)


def batch_norm_variables(channels, seed=1):
    draw = np.random.default_rng(seed).uniform(0.5, 1.5, (4, channels)).astype(np.float32)
    return {
        "params": {"scale": draw[0], "bias": draw[1]},
        "batch_stats": {"mean": draw[2], "var": draw[3]},
    }


def test_running_variance_is_unbiased():
    # mean 3, deviations -2 -1 0 3: the sum of squares is 14, over 4 biased, over 3 unbiased.
    x = jnp.asarray([1.0, 2.0, 3.0, 6.0]).reshape(2, 2, 1)
    variables = {
        "params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        "batch_stats": {"mean": jnp.asarray([10.0]), "var": jnp.asarray([2.0])},
    }
    norm = BatchNorm(momentum=0.75, epsilon=0.5)
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), np.array([-2, -1, 0, 3]) / 2, rtol=1e-6)  # sqrt(3.5 + .5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.75 * 10 + 0.25 * 3], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [1.5 + 0.25 * 14 / 3], rtol=1e-6)


def test_training_mode_matches_the_formula_and_pytorchs_convention():
    x = RNG.normal(2, 3, (2, 3, 5, 7)).astype(np.float32)
    variables = batch_norm_variables(7)
    y, updated = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    params, stats = variables["params"], variables["batch_stats"]
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-6)
    new = updated["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * stats["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * stats["var"] + 0.1 * var * 30 / 29, rtol=1e-5)


def test_gradients_through_the_statistics_are_whole_to_the_second_order():
    """Against the moments of jax.numpy, whose gradients take every way."""

    def plain(params, x):
        mean, var = x.mean((0, 1)), x.var((0, 1))
        return (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]

    def ours(params, x):
        variables = {**batch_norm_variables(2), "params": params}
        return BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(norm, params, x):
        def loss(params, x):
            return jnp.sum(jnp.sin(norm(params, x)))

        return jax.grad(loss, (0, 1))(params, x), jax.hessian(loss, 1)(params, x)

    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(2, 3, (5, 3, 2)))
        params = jax.tree.map(jnp.float64, batch_norm_variables(2)["params"])
        results = [gradients(norm, params, x) for norm in (plain, ours)]
    chex.assert_trees_all_close(*results, rtol=1e-9, atol=1e-12)


def test_evaluation_uses_running_statistics_and_leaves_them_alone():
    x = RNG.normal(size=(2, 3, 5, 7)).astype(np.float32)
    variables = batch_norm_variables(7)
    y, updated = BatchNorm().apply(variables, x, train=False, mutable=["batch_stats"])
    params, stats = variables["params"], variables["batch_stats"]
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_array_equal(updated["batch_stats"]["var"], stats["var"])


ONE_VALUE = [
    ((1, 7), 1, "a batch of 1 with maps of 1 has 1"),
    ((1, 1, 1, 3), 1, "a batch of 1 with maps of 1x1 has 1"),
    ((5, 1, 1, 3), 5, "a batch of 5 in 5 batch_norm_groups with maps of 1x1 has 1"),
]


@pytest.mark.parametrize(("shape", "groups", "message"), ONE_VALUE)
def test_statistics_of_one_value_a_channel_are_refused_in_training_alone(shape, groups, message):
    norm, x = BatchNorm(groups=groups), jnp.ones(shape)
    variables = norm.init(jax.random.key(0), x, train=False)
    with pytest.raises(UserError, match=message):
        norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert jnp.isfinite(norm.apply(variables, x, train=False)).all()
    two = jnp.concatenate([x, 2 * x] * groups)
    y, _ = norm.apply(variables, two, train=True, mutable=["batch_stats"])
    assert jnp.isfinite(y).all()


def test_initialising_leaves_fresh_statistics():
    variables = BatchNorm().init(jax.random.key(0), jnp.full((2, 3), 5.0), train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_strided_3x3_pads_one_on_each_side():
    x = RNG.normal(size=(1, 4, 6, 2)).astype(np.float32)
    conv = Conv3x3(3, strides=2, use_bias=False)
    variables = conv.init(jax.random.key(0), x)
    y = conv.apply(variables, x)
    kernel = np.asarray(variables["params"]["kernel"])
    corner = np.einsum("hwi,hwio->o", x[0, :2, :2], kernel[1:, 1:])  # the first row is padding
    assert y.shape == (1, 2, 3, 3)
    np.testing.assert_allclose(y[0, 0, 0], corner, atol=1e-5)
    assert Conv1x1(3).bind(Conv1x1(3).init(jax.random.key(0), x))(x).shape == (1, 4, 6, 3)


@pytest.mark.parametrize("shape", [(3, 3, 41, 43), (1, 1, 64, 64), (3, 3, 1, 509)])
def test_kernels_are_drawn_normally_with_variance_two_over_fan_in(shape):
    kernel = np.asarray(conv_init(jax.random.key(0), shape))
    assert kernel.shape == shape
    assert kernel.dtype == np.float32
    standard = kernel / np.sqrt(2 / np.prod(shape[:-1]))
    error = 5 / np.sqrt(kernel.size)
    np.testing.assert_allclose(standard.mean(), 0, atol=error)
    np.testing.assert_allclose((standard**2).mean(), 1, atol=2 * error)
    np.testing.assert_allclose((np.abs(standard) < 1).mean(), 0.6827, atol=error)
    assert len(np.unique(kernel)) > 0.99 * kernel.size
    assert conv_init(jax.random.key(0), (1, 1, 1, 1)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("sides", [(6, 10), (5, 7), (6, 9), (3, 5)])
def test_upsampling_is_bilinear_resizing(sides):
    """Doubled in both directions, in none, in one, and left as it is."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)

    def results(resize):
        y, pullback = jax.vjp(resize, x)
        return y, pullback(jnp.cos(y))

    ours = results(lambda x: upsample_bilinear(x, *sides))
    plain = results(lambda x: jax.image.resize(x, (2, *sides, 4), "bilinear"))
    chex.assert_trees_all_close(ours, plain, atol=1e-6)
