"""Values of the weights alone are computed once; both parts together equal the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dfs_jax.tracing.hoisted import hoisted

W = {"a": jnp.arange(6.0).reshape(2, 3) / 7, "b": jnp.ones(3)}
X = jnp.array([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]])


def looped(w, x):
    kernel = jnp.exp(w["a"])
    return lax.map(lambda row: row @ kernel, x) + jnp.arange(3.0)


FUNCTIONS = {
    # name: (function, shapes of what is handed on)
    "transformed": (lambda w, x: x @ jnp.exp(w["a"]), [(2, 3)]),
    "as it is": (lambda w, x: x @ w["a"] + w["b"], [(2, 3), (1, 3)]),
    "in a call": (lambda w, x: jax.jit(lambda a: jnp.tanh(a))(w["a"]).sum() * x, [()]),
    "across calls": (jax.jit(lambda w, x: x @ jax.jit(jnp.sin)(w["a"] * 2)), [(2, 3)]),
    "in a loop": (looped, [(2, 3)]),
    "of constants": (lambda w, x: x @ (w["a"] * jnp.arange(3.0)), [(2, 3)]),
    "none": (lambda w, x: 2 * x, []),
    "an answer": (lambda w, x: (x, w["b"] * 2, 1.0), [(3,)]),
}


def ran(function, name):
    """How often a primitive runs in a function's program."""
    return str(jax.make_jaxpr(function)(X)).count(f" {name} ")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_parts_together_are_the_function(name):
    function, shapes = FUNCTIONS[name]
    values, run = hoisted(function, W, X)
    assert [v.shape for v in values] == shapes
    got, expected = run(values, X), function(W, X)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


@pytest.mark.parametrize(
    ("name", "primitive"), [("transformed", "exp"), ("across calls", "sin"), ("in a loop", "exp")]
)
def test_weights_are_transformed_once(name, primitive):
    function, _ = FUNCTIONS[name]
    values, run = hoisted(function, W, X)
    assert ran(lambda x: function(W, x), primitive) == 1
    assert ran(lambda x: run(values, x), primitive) == 0
