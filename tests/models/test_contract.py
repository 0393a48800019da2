"""What every registered backbone promises, whatever it is made of."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models import MODELS, create_model
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.surgery import partition_channels
from tests.support.networks import SMALL_MSDNET, SMALL_VIT

BATCH, CLASSES, IMAGE_SHAPE = 3, 7, (11, 13, 3)
LABELS = jnp.asarray([2, 6, 2])
BETA = 0.3
SMALL_BASIC_RESNET = {"width": 5, "stage_sizes": (1, 1, 1)}
SMALL_BOTTLENECK_RESNET = {"width": 3, "stage_sizes": (2, 1, 1)}
# Options of a small model of each kind.
MODEL_ROWS = {
    "efficientnet_lite0": {"width": 4, "head_width": 5, "exits": (2, 5)},
    "msdnet": SMALL_MSDNET,
    "msdnet_cifar100": SMALL_MSDNET,
    "msdnet_cifar_anytime": SMALL_MSDNET,
    "msdnet_cifar_budgeted": SMALL_MSDNET,
    "msdnet_imagenet": SMALL_MSDNET,
    "resnet18": SMALL_BASIC_RESNET,
    "resnet34": SMALL_BASIC_RESNET,
    "resnet50": SMALL_BOTTLENECK_RESNET,
    "resnet101": SMALL_BOTTLENECK_RESNET,
    "resnet152": SMALL_BOTTLENECK_RESNET,
    "vgg16": {"width": 5, "stage_sizes": (2, 2, 2), "stage_multipliers": (1, 2, 4)},
    "vgg7": {"width": 5},
    "vit_base": SMALL_VIT,
    "vit_small": SMALL_VIT,
    "vit_tiny": SMALL_VIT,
}
# Presets of one class, given the same options, are one model, which is tested once.
DISTINCT = {
    create_model(name, num_classes=CLASSES, **options): name
    for name, options in reversed(MODEL_ROWS.items())
}


class Network(NamedTuple):
    model: object
    variables: dict
    images: jax.Array


# A bottleneck ResNet compiles longest, and is put against the network written again elsewhere.
SLOW = ("resnet50", "efficientnet_lite0")
NETWORKS = [
    pytest.param(model, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for model, name in DISTINCT.items()
]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    model = request.param
    variables = init_variables(model, jax.random.key(0), IMAGE_SHAPE)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + jnp.asarray(rng.uniform(0, 0.2, x.shape), x.dtype), variables
    )
    images = jnp.asarray(rng.normal(size=(BATCH, *IMAGE_SHAPE)), jnp.float32)
    return Network(model, variables, images)


@pytest.fixture(scope="module")
def whole(network):
    """The outputs of one call, and the features at the forks."""
    fork = create_fork("dfs", partition_ratio=BETA, referencing="none")
    run = jax.jit(lambda v, x: network.model.apply(v, x, fork))
    return run(network.variables, network.images)


def staged(network, fork):
    """Runs each stage as a program of its own, as staged inference does."""
    model, carry, outputs = network.model, network.images, []
    for i in range(model.num_exits):

        def stage(variables, carry, i=i):
            carry = model.apply(variables, fork, i, carry, method="run_block")
            return carry, model.apply(variables, fork, i, carry, method="run_head")

        carry, head = jax.jit(stage)(network.variables, carry)
        outputs.append(head)
    return outputs


def test_staged_run_equals_the_whole(network, whole):
    fork = create_fork("dfs", partition_ratio=BETA, referencing="none")
    outputs = staged(network, fork)
    for i, output in enumerate(outputs):
        assert_equal_but_for_rounding(output.logits, whole.logits[i])
        assert_equal_but_for_rounding(output.feature, whole.features[i])


def assert_equal_but_for_rounding(found, expected):
    """Programs may sum in another order; a sum that cancels errs by what its terms do."""
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * largest)


def test_outputs_have_an_exit_axis_first(network, whole):
    chex.assert_shape(whole.logits, (network.model.num_exits, BATCH, CLASSES))
    assert len(whole.features) == network.model.num_exits
    assert all(feature.shape[0] == BATCH for feature in whole.features)


def test_without_a_fork_the_network_is_plain(network, whole):
    run = jax.jit(lambda v, x: network.model.apply(v, x))
    plain = run(network.variables, network.images)
    seen = jax.jit(lambda v, x: network.model.apply(v, x, create_fork("dfs")))
    referenced = seen(network.variables, network.images)
    assert_equal_but_for_rounding(plain.logits, referenced.logits)  # same forward pass
    assert not np.allclose(plain.logits, whole.logits)  # without referencing it is another


def test_trunk_and_heads_split_by_name(network):
    for tree in network.variables.values():
        trunk, heads = split_trunk_and_heads(tree)
        assert trunk.keys() | heads.keys() == tree.keys()
        assert not trunk.keys() & heads.keys()
    trunk, heads = split_trunk_and_heads(network.variables["params"])
    exits = range(1, network.model.num_exits + 1)
    assert set(trunk) == {f"block{i}" for i in exits}
    assert set(heads) == {f"head{i}" for i in exits}


class Nudged:
    """A fork that adds a delta to each feature first, so that its gradient can be asked for."""

    def __init__(self, fork, deltas):
        self.fork, self.deltas = fork, deltas

    def __call__(self, x, *, exit_index, num_exits):
        x = x + self.deltas[exit_index]
        return self.fork(x, exit_index=exit_index, num_exits=num_exits)


def per_exit_gradients(network, fork):
    """Gradients of each exit's loss, [exits, ...], of the features at the forks and of params."""
    model, loss = network.model, create_loss("deep_supervision")
    shapes = feature_shapes(network)

    def losses(params, deltas, images):
        variables = {**network.variables, "params": params}
        outputs, _ = model.apply(
            variables, images, Nudged(fork, deltas), train=True, mutable=["batch_stats"]
        )
        return loss(outputs, LABELS)

    @jax.jit
    def gradients(params, images):
        deltas = [jnp.zeros(shape) for shape in shapes]
        _, pullback = jax.vjp(lambda p, d: losses(p, d, images), params, deltas)
        return jax.vmap(pullback)(jnp.eye(model.num_exits))

    of_params, of_features = gradients(network.variables["params"], network.images)
    return jax.device_get(of_params), jax.device_get(of_features)


def feature_shapes(network):
    seen = {}

    def note(x, *, exit_index, num_exits):
        seen[exit_index] = x.shape
        return create_fork("plain")(x, exit_index=exit_index, num_exits=num_exits)

    jax.eval_shape(lambda v, x: network.model.apply(v, x, note), network.variables, network.images)
    return list(seen.values())


@pytest.fixture(scope="module")
def dfs_gradients(network):
    return per_exit_gradients(network, create_fork("dfs", partition_ratio=BETA))


def test_dfs_partitions_every_feature_exactly(network, dfs_gradients):
    _, of_features = dfs_gradients
    exits = network.model.num_exits
    for i, gradients in enumerate(of_features[:-1]):
        k = partition_channels(gradients.shape[-1], BETA)
        assert 0 < k < gradients.shape[-1]
        for j in range(exits):
            shared, specific = gradients[j][..., :k], gradients[j][..., k:]
            assert np.any(shared) == (j > i), (i, j)
            assert np.any(specific) == (j == i), (i, j)
    assert [bool(np.any(g)) for g in of_features[-1]] == [False] * (exits - 1) + [True]


def test_no_exit_trains_what_lies_beyond_it(network, dfs_gradients):
    of_params, _ = dfs_gradients
    for i in range(network.model.num_exits):
        for j in range(network.model.num_exits):
            block = jax.tree.leaves(jax.tree.map(lambda g, j=j: g[j], of_params[f"block{i + 1}"]))
            head = jax.tree.leaves(jax.tree.map(lambda g, j=j: g[j], of_params[f"head{i + 1}"]))
            assert any(map(np.any, block)) == (j >= i), (i, j)
            assert any(map(np.any, head)) == (j == i), (i, j)


def test_variables_are_two_collections_and_heads_adapt_when_asked(network):
    assert network.variables.keys() == {"params", "batch_stats"}
    adapting = network.model.clone(adapt_features=True)
    run = jax.eval_shape(
        lambda key, x: adapting.init_with_output(key, x)[0], jax.random.key(0), network.images
    )
    widths = {feature.shape[-1] for feature in run.features}
    assert len(widths) == 1  # every exit's feature can be compared with the last one's


def test_every_model_has_its_row():
    assert MODEL_ROWS.keys() == MODELS.table.keys()
