"""Gradients of single exits against the Jacobian of the whole network."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfs_jax.forks import create_fork
from dfs_jax.gradients.exit_gradients import exit_gradients
from dfs_jax.layers import BatchNorm
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import MultiExitModel, init_variables, split_trunk_and_heads
from dfs_jax.types import HeadOutput, UserError
from tests.support.helpers import TINY_CLASSES, TinyNetwork
from tests.support.networks import SMALL_MSDNET

BATCH, CLASSES, IMAGE_SHAPE = 3, 5, (8, 8, 3)
LABELS = jnp.asarray([2, 0, 4])
KEY = jax.random.key(11)
MSDNET = {**SMALL_MSDNET, "head_dropout": 0.5}
VIT = {"width": 6, "heads": 2, "patch_size": 4, "first_exit_layer": 1, "dropout": 0.2}
MODELS = {
    "chain": {},
    "vgg7": {"width": 3, "stage_sizes": (1, 1, 1)},
    "resnet18": {"width": 3, "stage_sizes": (1, 1, 1)},
    "msdnet": MSDNET,
    "vit_tiny": {**VIT, "depth": 3},
}
FORKS = {"plain": {}, "dfs": {"partition_ratio": 0.4}, "gradient_equilibrium": {}}
COUPLED = "tests.gradients.test_exit_gradients:CoupledLoss"
LOSSES = {
    "deep_supervision": {"exit_weights": "linear"},
    "byot": {},
    "distillation": {"teacher": "deeper"},
    COUPLED: {},
}
WAYS = ("vmap", "unroll", "scan")
# What is put to the test each time; the others take minutes to compile.
QUICK = (("chain", "dfs", "deep_supervision"), ("chain", "gradient_equilibrium", COUPLED))
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in itertools.product(MODELS, FORKS, LOSSES)
    if case[1] == "dfs" or case[2] == "deep_supervision" or case in QUICK
]


class Unit(nn.Module):
    """A linear layer, BatchNorm and dropout, quick to compile where the rate is 0."""

    width: int
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        x = BatchNorm()(nn.tanh(nn.Dense(self.width)(x)), train=train)
        return nn.Dropout(self.rate, deterministic=not train)(x)


class Chain(MultiExitModel):
    """Three such units, each with a classifier after another one."""

    num_exits: int = 3

    def setup(self):
        for i in (1, 2, 3):
            setattr(self, f"block{i}", Unit(4 + i, 0.2 if i == 2 else 0.0))
            setattr(self, f"head{i}", Unit(self.num_classes))

    def block(self, i, carry, *, train):
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i, x, *, train):
        pooled = getattr(self, f"head{i + 1}")(x, train=train).mean((1, 2))
        return HeadOutput(3 * pooled, pooled)


class CoupledLoss:
    """A loss whose exits also pull at each other's outputs: no teacher is detached."""

    def __call__(self, outputs, labels):
        entropies = create_loss("deep_supervision")(outputs, labels)
        away = jax.nn.softmax(outputs.logits) - jax.nn.softmax(outputs.logits).mean(0)
        pull = sum((feature**2).mean() for feature in outputs.features)
        return entropies + (away**2).mean((1, 2)) + 0.1 * pull * jnp.arange(1, len(entropies) + 1)


@functools.cache
def network(name, adapts):
    name, options = (
        "tests.gradients.test_exit_gradients:Chain" if name == "chain" else name,
        MODELS[name],
    )
    model = create_model(name, num_classes=CLASSES, adapt_features=adapts, **options)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), IMAGE_SHAPE))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(-0.5, 1, x.shape), shapes)
    return model, variables, rng.normal(size=(BATCH, *IMAGE_SHAPE))


def jacobian(model, fork, loss, variables, images):
    """Every exit's gradient by a backward pass of the whole network, and what else a step needs."""

    def losses(params):
        outputs, updated = model.apply(
            {**variables, "params": params},
            images,
            fork,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": KEY},
        )
        values = loss(outputs, LABELS)
        return values, (values, outputs.logits, updated.get("batch_stats", {}))

    return jax.jacrev(losses, has_aux=True)(variables["params"])


def last_rows(reference, ours):
    """Those of the reference's exits that ours has; the exits before them must not be reached."""
    skipped = reference.shape[0] - ours.shape[0]
    np.testing.assert_array_equal(reference[:skipped], 0)
    return reference[skipped:]


def assert_equal(ours, reference):
    grads, (losses, logits, batch_stats) = reference
    trunk, heads = split_trunk_and_heads(grads)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-11)
    close((ours.losses, ours.logits, ours.batch_stats), (losses, logits, batch_stats))
    close(ours.trunk, jax.tree.map(last_rows, trunk, ours.trunk))
    close(ours.heads, jax.tree.map(lambda leaf: leaf.sum(0), heads))


def row_counts(gradients):
    """How many exits' gradients each block has."""
    return [{len(leaf) for leaf in jax.tree.leaves(block)} for block in gradients.trunk.values()]


@pytest.mark.parametrize(("name", "fork", "loss"), CASES)
def test_gradients_are_those_of_the_whole_network(name, fork, loss):
    with jax.enable_x64(True):
        fork, loss = create_fork(fork, **FORKS[fork]), create_loss(loss, **LOSSES[loss])
        model, variables, images = network(name, getattr(loss, "adapts_features", False))

        @jax.jit
        def run(variables, images):
            single = functools.partial(exit_gradients, model, fork, loss, variables, images)
            ours = [single(LABELS, key=KEY, exits=way) for way in WAYS]
            return ours, jacobian(model, fork, loss, variables, images)

        ours, reference = run(variables, images)
        for gradients in ours:
            assert_equal(gradients, reference)
            # Nothing is computed for exits that a block cannot serve.
            expected = [{3}] * 3 if getattr(loss, "couples_exits", True) else [{3}, {2}, {1}]
            assert row_counts(gradients) == expected


@pytest.mark.slow
def test_float32_goes_through_the_cpus_kernels_with_equal_results():
    model = create_model("vgg7", num_classes=CLASSES, width=16, stage_sizes=(1, 1, 1))
    variables = init_variables(model, jax.random.key(0), IMAGE_SHAPE)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, *IMAGE_SHAPE)), jnp.float32)
    fork, loss = create_fork("dfs"), create_loss("deep_supervision")

    @jax.jit
    def run(variables, images):
        single = functools.partial(exit_gradients, model, fork, loss, variables, images)
        return [single(LABELS, key=KEY, exits=way) for way in WAYS]

    first, *others = run(variables, images)
    for other in others:
        chex.assert_trees_all_close(other, first, rtol=1e-4, atol=1e-5)


def tiny_params():
    model = TinyNetwork(TINY_CLASSES)
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (4, 4, 3)))["params"]


def tiny_gradients(params, **options):
    model = TinyNetwork(TINY_CLASSES)
    fork, loss = create_fork("plain"), create_loss("deep_supervision")
    variables = {"params": params, "batch_stats": {}}
    images = jnp.ones((2, 4, 4, 3))
    return exit_gradients(
        model, fork, loss, variables, images, jnp.zeros(2, int), key=KEY, **options
    )


def test_a_backbone_of_a_users_own():
    gradients = jax.eval_shape(tiny_gradients, tiny_params())
    assert gradients.trunk.keys() == {"block1", "block2"}
    assert gradients.heads.keys() == {"head1", "head2"}
    assert gradients.batch_stats == {}
    assert row_counts(gradients) == [{2}, {1}]


def test_mistakes_are_told():
    params = tiny_params()
    with pytest.raises(UserError, match="exits must be one of vmap, unroll, scan, got 'map'"):
        tiny_gradients(params, exits="map")
    with pytest.raises(UserError, match=r"under block1\.\. and head1\.\., this one also has stem"):
        tiny_gradients({**params, "stem": {}})
