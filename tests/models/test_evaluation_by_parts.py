"""Evaluation by parts: the values of the whole, nothing unneeded, equal parts compiled once."""

from __future__ import annotations

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dfs_jax.models import MODELS, create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.models.evaluation_by_parts import evaluate_by_parts


def draws(key, x):
    """A program of every kind of part: calls, literals, constants, loops, an unneeded end."""
    keys = jax.random.split(key, 3)
    table = jnp.asarray(np.arange(5.0, dtype=np.float32))
    total = lax.fori_loop(0, 3, lambda i, c: c + i, x.sum())
    return {
        "normals": [2 * jax.random.normal(k, (7,)) for k in keys],
        "ranges": [jax.random.uniform(keys[0], (7,), minval=low) for low in (0.0, 0.5)],
        "table": jax.nn.relu(table - 2),
        "total": total,
        "zero": 0.0,
        "input": x,
    }


def test_values_are_those_of_the_whole():
    key, x = jax.random.key(3), jnp.arange(6.0).reshape(2, 3)
    by_parts = evaluate_by_parts(draws, key, x)
    chex.assert_trees_all_equal_structs(by_parts, draws(key, x))
    chex.assert_trees_all_close(by_parts, draws(key, x), atol=1e-6)
    low, high = by_parts["ranges"]
    assert low.min() < 0.5 <= high.min()  # one inner program, two literals


def test_within_a_trace_the_function_is_traced():
    shapes = jax.eval_shape(
        lambda key: evaluate_by_parts(draws, key, jnp.ones((2, 3))), jax.random.key(0)
    )
    assert shapes["normals"][0].shape == (7,)
    jitted = jax.jit(lambda x: evaluate_by_parts(lambda y: 2 * y, x))(jnp.ones(3))
    np.testing.assert_array_equal(jitted, [2.0, 2.0, 2.0])


def test_what_no_output_needs_is_not_computed():
    def fails(x):
        raise AssertionError(f"computed on {x}")

    def function(x):
        jax.pure_callback(fails, x, 3 * x)
        return x + 1

    assert evaluate_by_parts(function, jnp.float32(2)) == 3


def test_equal_calls_are_compiled_once(caplog):
    def function(key):
        keys = jax.random.split(key, 5)
        return [jax.random.normal(k, (101,)) for k in keys], jax.random.normal(keys[0], (103,))

    with jax.log_compiles(), caplog.at_level("WARNING"):
        evaluate_by_parts(function, jax.random.key(0))
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    calls = [message for message in compiled if "jit(jaxpr_as_fun)" in message]
    assert len(calls) == 2, compiled  # one for each shape


@pytest.mark.slow
def test_initialisation_depends_on_the_key_alone():
    model = create_model("resnet18", num_classes=7, width=3, stage_sizes=(1, 1))
    first, again, other = (init_variables(model, jax.random.key(k), (8, 8, 3)) for k in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    whole = jax.jit(model.init)({"params": jax.random.key(0)}, jnp.zeros((1, 8, 8, 3)))
    chex.assert_trees_all_close(first, whole, atol=1e-6)
    kernels = [v["params"]["block2"]["residual1"]["conv1"]["kernel"] for v in (first, other)]
    assert np.all(kernels[0] != kernels[1])
    chex.assert_type(jax.tree.leaves(first), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS.table)
def test_initialisation_compiles_in_fifteen_seconds(name):
    model = create_model(name, num_classes=100)
    side = 224 if "imagenet" in name or "vit" in name else 32
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        begin = time.process_time()  # of this process alone, however busy the machine
        jax.block_until_ready(init_variables(model, jax.random.key(0), (side, side, 3)))
        assert time.process_time() - begin < 15
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
