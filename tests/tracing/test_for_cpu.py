"""Programs written for a CPU: which kernels they take, and convolutions in the body of a loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params, primitives

from dfs_jax.tracing.for_cpu import for_cpu

IN_ORDER = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolution(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, kernel, **options)


def channels_last(x, kernel, **options):
    return convolution(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


CASES = {
    "channels_first": (lambda x, k: convolution(x, k), (2, 3, 7, 5), (11, 3, 3, 3)),
    "odd_order": (
        lambda x, k: convolution(x, k, dimension_numbers=("HNWC", "OHIW", "WCNH")),
        (7, 2, 5, 3),
        (11, 3, 3, 1),
    ),
    "strided": (
        lambda x, k: channels_last(x, k, window_strides=(2, 1)),
        (2, 7, 5, 3),
        (3, 3, 3, 4),
    ),
    "grouped": (
        lambda x, k: channels_last(x, k, feature_group_count=3),
        (2, 7, 5, 6),
        (3, 1, 2, 9),
    ),
}


def convolutions(jaxpr, within=False):
    """The axes' order of every convolution that stands in a loop."""
    for equation in jaxpr.eqns:
        if equation.primitive is primitives.conv_general_dilated_p and within:
            yield tuple(equation.params["dimension_numbers"])
        for part in jaxprs_in_params(equation.params):
            yield from convolutions(part, within or equation.primitive.name in ("scan", "while"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_in_a_loop_are_the_same_and_in_order(case):
    convolve, *shapes = case
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    @jax.checkpoint
    def loss(x, kernel):
        return jnp.sum(jnp.sin(jax.jit(convolve)(x, kernel)))

    def looped(x, kernel):
        def step(carry, scale):
            grads = jax.grad(loss, argnums=(0, 1))(scale * x, kernel)
            carry = jax.tree.map(
                jnp.add, carry, lax.cond(scale > 2, lambda g: g, lambda g: g, grads)
            )
            return carry, loss(x, kernel)

        start = jax.tree.map(jnp.zeros_like, (x, kernel))
        return {"found": lax.scan(step, start, jnp.arange(1.0, 4.0))}

    quick = for_cpu(looped, kernels=False)
    expected, found = jax.jit(looped)(x, kernel), jax.jit(quick)(x, kernel)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
    orders = list(convolutions(jax.make_jaxpr(quick)(x, kernel).jaxpr))
    assert len(orders) >= 3
    assert set(orders) == {IN_ORDER}
    assert set(convolutions(jax.make_jaxpr(looped)(x, kernel).jaxpr)) != {IN_ORDER}


def test_what_stands_outside_of_loops_stays_as_it_is():
    x, kernel = jnp.ones((2, 3, 7, 5)), jnp.ones((11, 3, 3, 3))

    def mixed(x, kernel):
        total = lax.fori_loop(0, 3, lambda i, s: s + jnp.sum(convolution(x, kernel)), 0.0)
        return convolution(x, kernel), total

    before, after = (
        jax.make_jaxpr(function)(x, kernel).jaxpr
        for function in (mixed, for_cpu(mixed, kernels=False))
    )
    outside = [
        [e.params["dimension_numbers"] for e in jaxpr.eqns if e.primitive.name.startswith("conv_")]
        for jaxpr in (before, after)
    ]
    assert outside[0] == outside[1]
    assert list(convolutions(after)) == [IN_ORDER]
