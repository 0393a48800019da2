"""Functions that become one operator of ONNX, and look-alikes that do not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from tests.onnx.test_onnx_operations import assert_close, operators, run

TOKENS = (5, 7)
SCORES = (3, 5)


def normalised(shift=True, scale=True, fast=True, axis=-1):
    layer = nn.LayerNorm(
        epsilon=1e-3,
        use_bias=shift,
        use_scale=scale,
        use_fast_variance=fast,
        reduction_axes=axis,
        feature_axes=axis,
    )
    variables = layer.init(jax.random.key(0), jnp.zeros((1, *TOKENS)))
    draw = np.random.default_rng(3)
    variables = jax.tree.map(lambda x: x + draw.normal(size=x.shape).astype(np.float32), variables)
    return lambda x: layer.apply(variables, 2 + 3 * jnp.tanh(x))


SOFTMAX = {
    "last": lambda x: jax.nn.softmax(x, -1),
    "middle": lambda x: jax.nn.softmax(40 * x, 1),
    "plain": lambda x: jnp.exp(x) / jnp.exp(x).sum(1, keepdims=True),
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax(name):
    found = operators(SOFTMAX[name], SCORES)
    assert found == {"Softmax": 1} | ({"Mul": 1} if name == "middle" else {})
    for got, expected in run(SOFTMAX[name], SCORES, (1, 3)):
        assert_close(got, expected)


NOT_SOFTMAX = {
    "over two dimensions": lambda x: jax.nn.softmax(x, (1, 2)),
    "another sum": lambda x: jnp.exp(x) / jnp.exp(2 * x).sum(1, keepdims=True),
    "a mean": lambda x: jnp.exp(x) / jnp.exp(x).mean(1, keepdims=True),
}


@pytest.mark.parametrize("name", NOT_SOFTMAX)
def test_other_quotients_stay_as_they_are(name):
    function = NOT_SOFTMAX[name]
    assert "Softmax" not in operators(function, SCORES)
    for got, expected in run(function, SCORES, (1, 3)):
        assert_close(got, expected)


def test_a_shift_that_differs_from_term_to_term_stays():
    function = lambda x: jax.nn.softmax(x - x.sum(1, keepdims=True), -1)  # noqa: E731
    found = operators(function, SCORES)
    assert found == {"ReduceSum": 1, "Reshape": 1, "Sub": 1, "Softmax": 1}
    for got, expected in run(function, SCORES, (1, 3)):
        assert_close(got, expected)


LAYER_NORM = [{}, {"shift": False}, {"scale": False}, {"shift": False, "scale": False}]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("options", LAYER_NORM)
def test_layer_norm(options, fast):
    function = normalised(**options, fast=fast)
    found = operators(function, TOKENS)
    assert found == {"Tanh": 1, "Mul": 1, "Add": 1, "LayerNormalization": 1}
    for got, expected in run(function, TOKENS, (1, 3)):
        assert_close(got, expected)


@pytest.mark.parametrize("axis", [1, (1, 2)])
def test_other_normalisations_stay_as_they_are(axis):
    function = normalised(axis=axis)
    assert "LayerNormalization" not in operators(function, TOKENS)
    for got, expected in run(function, TOKENS, (1, 3)):
        assert_close(got, expected)


def centred(x):
    return x - x.mean(-1, keepdims=True)


OTHER_SCALES = {
    "the deviation along another dimension": lambda x: jnp.square(centred(x)).mean(
        1, keepdims=True
    ),
    "the deviation of another row": lambda x: jnp.square(centred(x)).mean(-1)[:, None, :],
    "the deviation of another value": lambda x: jnp.square(centred(2 * x)).mean(-1, keepdims=True),
    "squares about zero": lambda x: jnp.square(x).mean(-1, keepdims=True),
}


@pytest.mark.parametrize("name", OTHER_SCALES)
def test_what_is_scaled_otherwise_stays_as_it_is(name):
    function = lambda x: centred(x) * jax.lax.rsqrt(OTHER_SCALES[name](x) + 0.1)  # noqa: E731
    square = (7, 7)
    assert "LayerNormalization" not in operators(function, square)
    for got, expected in run(function, square, (1, 3)):
        assert_close(got, expected)


def test_gelu():
    """In the order that ONNX Runtime turns into one operator."""
    function = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    assert operators(function, TOKENS) == {"Div": 1, "Erf": 1, "Add": 1, "Mul": 2}
    for got, expected in run(function, TOKENS, (1, 3)):
        assert_close(got, expected)
    shifted = lambda x: 0.5 * x * (1 - jax.lax.erf(-jnp.sqrt(0.5) * (x + 1)))  # noqa: E731
    for got, expected in run(shifted, TOKENS, (2,)):
        assert_close(got, expected)
