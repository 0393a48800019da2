"""Networks of plain JAX, Flax NNX and Equinox: surgery, training and stages are the same calls.

All three have 3 exits: 3x3 convolutions of 7 channels, each followed by surgery at 2 of 7 channels
and a head on the mean over positions.
"""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

from dfs_jax.inference.stages import check_stages
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.tracing import exit_logits, skip_dead_gradients, stages_of, with_exit_logits
from tests.support.networks import macs

BATCH, SIDE, INPUTS, WIDTH, CLASSES, EXITS, SHARED = 3, 5, 2, 7, 11, 3, 2
EXAMPLE = jax.ShapeDtypeStruct((SIDE, SIDE, INPUTS), jnp.float32)
surgery = functools.partial(FeatureSurgery(SHARED / WIDTH), num_exits=EXITS)


def plain_network(params, x):
    def convolution(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    for i, (kernel, head) in enumerate(params):
        forked = surgery(jnp.tanh(convolution(x, kernel)), exit_index=i)
        exit_logits(i, forked.to_head.mean((1, 2)) @ head)
        x = forked.to_trunk


def plain():
    keys = iter(jax.random.split(jax.random.key(0), 2 * EXITS))
    shapes = [((3, 3, INPUTS if i == 0 else WIDTH, WIDTH), (WIDTH, CLASSES)) for i in range(EXITS)]
    params = [tuple(jax.random.normal(next(keys), shape) / 5 for shape in two) for two in shapes]
    return plain_network, params


class NNXNetwork(nnx.Module):
    """With normalisation by running statistics, in evaluation mode."""

    def __init__(self, rngs):
        inputs = (INPUTS, WIDTH, WIDTH)
        self.convolutions = nnx.List(nnx.Conv(n, WIDTH, (3, 3), rngs=rngs) for n in inputs)
        self.heads = nnx.List(nnx.Linear(WIDTH, CLASSES, rngs=rngs) for _ in inputs)

    def __call__(self, x):
        for i, (convolution, head) in enumerate(zip(self.convolutions, self.heads, strict=True)):
            forked = surgery(nnx.tanh(convolution(x)), exit_index=i)
            exit_logits(i, head(forked.to_head.mean((1, 2))))
            x = forked.to_trunk


def nnx_network():
    graph, state = nnx.split(NNXNetwork(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


class EquinoxNetwork(eqx.Module):
    """A function of one example, channels first, which `vmap` maps over the batch."""

    convolutions: list
    heads: list

    def __init__(self, key):
        keys = iter(jax.random.split(key, 2 * EXITS))
        inputs = (INPUTS, WIDTH, WIDTH)
        self.convolutions = [eqx.nn.Conv2d(n, WIDTH, 3, padding=1, key=next(keys)) for n in inputs]
        self.heads = [eqx.nn.Linear(WIDTH, CLASSES, key=next(keys)) for _ in inputs]

    def __call__(self, x):
        x = jnp.moveaxis(x, -1, 0)
        for i, (convolution, head) in enumerate(zip(self.convolutions, self.heads, strict=True)):
            feature = jnp.moveaxis(jnp.tanh(convolution(x)), 0, -1)
            forked = surgery(feature, exit_index=i)
            exit_logits(i, head(forked.to_head.mean((0, 1))))
            x = jnp.moveaxis(forked.to_trunk, -1, 0)


def equinox_network():
    arrays, rest = eqx.partition(EquinoxNetwork(jax.random.key(0)), eqx.is_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays


X = jax.random.normal(jax.random.key(1), (BATCH, *EXAMPLE.shape))
each_library = pytest.mark.parametrize("make", [plain, nnx_network, equinox_network])


def loss_of(network):
    return lambda params, x: jnp.sum(jnp.sin(with_exit_logits(network)(params, x)[1]))


@each_library
def test_marked_logits_are_those_of_every_exit(make):
    network, params = make()
    _, logits = jax.jit(with_exit_logits(network))(params, X)
    assert logits.shape == (EXITS, BATCH, CLASSES)
    alone = with_exit_logits(network)(params, X[1:2])[1]
    np.testing.assert_allclose(logits[:, 1:2], alone, rtol=1e-5, atol=1e-6)


@each_library
def test_stages_are_the_network_and_carry_the_feature_alone(make):
    network, params = make()
    _, expected = with_exit_logits(network)(params, X)
    stages = stages_of(network, params, EXAMPLE)
    assert check_stages(stages, EXAMPLE) == CLASSES
    carry = X
    for i, stage in enumerate(stages):
        carry, logits = jax.jit(stage)(carry)
        np.testing.assert_allclose(logits, expected[i], rtol=1e-5, atol=1e-6)
        carried = sum(x[0].size for x in carry)
        assert carried == (SIDE * SIDE * WIDTH if i < EXITS - 1 else 0)
        assert all(x.shape[0] == BATCH for x in carry)
    assert sum(len(stage.args[0]) for stage in stages) == len(jax.tree.leaves(params))


@each_library
def test_gradients_are_the_naive_ones_and_cost_what_theory_says(make):
    """A layer of m multiply-adds takes m forward, m for its weights, and m for its live inputs.

    Blocks 2 and 3 read 2 live channels of 7, heads 1 and 2 the 5 others, head 3 all.
    """
    network, params = make()
    loss = loss_of(network)
    cheaper, naive = jax.grad(skip_dead_gradients(loss)), jax.grad(loss)
    for a, e in zip(
        *(jax.tree.leaves(jax.jit(f)(params, X)) for f in (cheaper, naive)), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6 * float(jnp.abs(e).max()))
    first, block = (BATCH * SIDE * SIDE * 9 * inputs * WIDTH for inputs in (INPUTS, WIDTH))
    head = BATCH * WIDTH * CLASSES
    assert macs(naive, params, X) == 2 * first + 2 * 3 * block + 3 * 3 * head
    saved = 2 * block * (WIDTH - SHARED) // WIDTH + 2 * head * SHARED // WIDTH
    assert macs(cheaper, params, X) == macs(naive, params, X) - saved


@each_library
def test_any_batch(make):
    network, params = make()
    (batch,) = export.symbolic_shape("batch")
    first, *_ = stages_of(network, params, EXAMPLE)
    shape = jax.ShapeDtypeStruct((batch, *EXAMPLE.shape), jnp.float32)
    program = export.export(jax.jit(first))(shape)
    _, expected = with_exit_logits(network)(params, X)
    np.testing.assert_allclose(program.call(X)[1], expected[0], rtol=1e-5, atol=1e-6)
