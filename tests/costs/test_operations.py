"""Costs of programs: by hand, every kind of inner jaxpr, and what must not count."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from dfs_jax.costs.operations import (
    LITERATURE_FLOPS,
    MULTIPLY_ADDS,
    count_by,
    count_operations,
)
from dfs_jax.tracing.traced import Kind, TracedProgram


def count(function, *shapes):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_operations(jax.make_jaxpr(function)(*inputs))


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("options", "kernel", "expected"),
    [
        ({}, (3, 3, 5, 7), 11 * 13 * 7 * 9 * 5),
        ({"padding": [(1, 1), (1, 1)], "window_strides": (2, 2)}, (3, 3, 5, 7), 6 * 7 * 7 * 9 * 5),
        ({"padding": "VALID"}, (2, 3, 5, 7), 10 * 11 * 7 * 6 * 5),
        ({"feature_group_count": 5}, (3, 3, 1, 5), 11 * 13 * 5 * 9),  # depthwise
        ({"feature_group_count": 5}, (3, 3, 1, 10), 11 * 13 * 10 * 9),
        ({"rhs_dilation": (2, 2)}, (3, 3, 5, 7), 11 * 13 * 7 * 9 * 5),
    ],
)
def test_convolutions_by_hand(options, kernel, expected):
    assert count(lambda x, k: conv(x, k, **options), (1, 11, 13, 5), kernel) == expected


def test_gradients_of_a_convolution_cost_what_it_costs():
    def forward(x, k):
        return conv(x, k, padding=[(1, 1), (1, 1)], window_strides=(2, 2))

    def backward(x, k, y):
        return jax.vjp(forward, x, k)[1](y)

    # Input gradients are convolutions over dilated inputs: the zeros in between do not count.
    shapes = (3, 8, 12, 5), (3, 3, 5, 7)
    once = count(forward, *shapes)
    assert once == 3 * 4 * 6 * 7 * 9 * 5
    assert count(backward, *shapes, (3, 4, 6, 7)) == 3 * once


def test_matrix_products_by_hand():
    assert count(lambda a, b: a @ b, (2, 3), (3, 5)) == 2 * 3 * 5
    batched = count(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (2, 3, 5, 7), (2, 11, 5, 7))
    assert batched == 2 * 3 * 5 * 7 * 11
    assert count(lambda a, b: jnp.outer(a, b) + jnp.sum(a), (3,), (5,)) == 0  # no product by layer


class Layers(nn.Module):
    """One function of a batch of one as a model's part, so that its weights are weights."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def literature(function, *shape):
    """What the rules count beyond multiply-adds."""
    images = jnp.zeros((1, *shape))
    variables = jax.eval_shape(Layers(function).init, jax.random.key(0), images)
    program = jax.make_jaxpr(Layers(function).apply)(variables, images)
    weights = [Kind.WEIGHT] * len(jax.tree.leaves(variables))
    traced = TracedProgram(program, [*weights, Kind.ACTIVATION])
    return count_by(traced, LITERATURE_FLOPS) - count_by(traced, MULTIPLY_ADDS)


def residual_dense(x):
    return x + nn.Dense(7, use_bias=False)(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.relu, 5 * 3 * 7),
        (lambda x: jnp.maximum(0.0, x), 5 * 3 * 7),
        (lambda x: jax.jit(nn.relu)(x) + nn.relu(x[..., :2]).sum(), 5 * 3 * 7 + 5 * 3 * 2),
        (lambda x: jnp.maximum(x, jnp.zeros_like(x)), 5 * 3 * 7),
        (lambda x: jnp.maximum(x, 1.0), 0),
        (nn.gelu, 0),
        (nn.softmax, 0),
        (nn.sigmoid, 0),
        (nn.LayerNorm(), 0),  # its variance is clipped at zero
        (nn.Conv(2, (3, 3), use_bias=True), 0),
        (nn.Dense(2), 5 * 3 * 2),
        (nn.Dense(2, use_bias=False), 0),
        (nn.DenseGeneral((2, 3), axis=-1), 5 * 3 * 2 * 3),
        (residual_dense, 0),
        (lambda x: nn.Dense(2)(nn.Dense(3)(x)), 5 * 3 * (2 + 3)),
        (lambda x: nn.BatchNorm(use_running_average=True)(nn.Dense(2, use_bias=False)(x)), 0),
        (lambda x: nn.max_pool(x, (2, 3), (1, 1)), 4 * 1 * 7 * 6),
        (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), 2 * 1 * 7 * 4),
        (lambda x: nn.avg_pool(x, (2, 2), (2, 2), count_include_pad=False), 2 * 1 * 7 * 4),
        (lambda x: x.mean((1, 2)), 5 * 3 * 7),
        (lambda x: x.max((1, 2)), 5 * 3 * 7),
        (lambda x: x.reshape(1, 15, 7).mean(1), 5 * 3 * 7),
        (lambda x: x.mean(-1), 0),
        (lambda x: nn.Dense(2)(nn.relu(x).mean((1, 2))), 5 * 3 * 7 * 2 + 2),
        (lambda x: jax.image.resize(x, (1, 10, 6, 7), "bilinear"), 0),
    ],
)
def test_what_else_the_literature_counts(function, expected):
    assert literature(function, 5, 3, 7) == expected


def matmul(a):
    return a @ a


@jax.custom_vjp
def custom_gradient(a):
    return a @ a


custom_gradient.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a.T + a.T @ g,))


@jax.custom_jvp
def custom_tangent(a):
    return a @ a


custom_tangent.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (matmul, 1),
        (jax.jit(matmul), 1),
        (jax.jit(lambda a: jax.jit(matmul)(jax.jit(matmul)(a))), 2),
        (jax.checkpoint(matmul), 1),
        (custom_gradient, 1),
        (custom_tangent, 1),
        (jax.jit(jax.checkpoint(custom_gradient)), 1),
        (jax.grad(lambda a: (custom_gradient(a) ** 2).sum()), 3),
        (lambda a: lax.scan(lambda c, _: (custom_gradient(c), None), a, length=7)[0], 7),
        (lambda a: lax.fori_loop(0, 7, lambda _, c: c @ c, a), 7),
        (lambda a: lax.cond(a[0, 0] > 0, lambda b: b @ b @ b, matmul, a), 2),
        (lambda a: lax.switch(2, [lambda b: b, matmul, lambda b: b @ b @ b @ b], a), 3),
        (lambda a: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c - 1, a) @ a, 1),
    ],
)
def test_inner_programs(function, products):
    assert count(function, (3, 3)) == products * 27


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="no fixed length"):
        count(lambda a: lax.while_loop(lambda c: c[0, 0] > 0, matmul, a), (3, 3))


def test_products_with_constants_are_no_layers():
    # Bilinear resizing multiplies by matrices that depend on no input, also under jit.
    assert count(lambda x: jax.image.resize(x, (1, 8, 8, 3), "bilinear"), (1, 4, 4, 3)) == 0
    # Cutting patches is a convolution with a constant kernel.
    patches = lambda x: lax.conv_general_dilated_patches(x, (2, 2), (2, 2), "VALID")  # noqa: E731
    assert count(patches, (1, 3, 4, 4)) == 0
    # What comes after, on real operands, counts; so does a carry that only comes to depend on them.
    resized = lambda x, k: conv(jax.image.resize(x, (1, 8, 8, 3), "bilinear"), k)  # noqa: E731
    assert count(resized, (1, 4, 4, 3), (1, 1, 3, 5)) == 64 * 15
    grown = lambda a: lax.scan(lambda c, _: (c + a, a @ c), jnp.zeros((3, 3)), length=5)  # noqa: E731
    assert count(grown, (3, 3)) == 5 * 27
