"""Whole networks with the cheaper backward pass: the naive gradients, at the theory's cost."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.costs.operations import count_operations
from dfs_jax.costs.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.tracing import skip_dead_gradients
from dfs_jax.training.experiment import build_experiment, initial_state, training_step
from tests.support.helpers import tiny_config
from tests.support.marks import slow
from tests.support.networks import SMALL_MSDNET

IMAGE_SHAPE = (10, 13, 3)
CLASSES = 7
SMALL = {
    "vgg7": {"width": 5},
    "resnet18": {"width": 3, "stage_sizes": (2, 1)},
    "resnet50": {"width": 3, "stage_sizes": (1, 1)},
    "msdnet": {**SMALL_MSDNET, "num_exits": 4, "prune": "min"},
}
# Ratios by exit where there are enough exits to tell them apart: none and all channels among them.
FORKS = {
    "vgg7": create_fork("dfs", partition_ratio=(0.3, 0.0, 1.0, 0.7, 0.3)),
    "resnet18": create_fork("dfs", partition_ratio=0.3),
    "resnet50": create_fork("dfs", partition_ratio=0.5, referencing="trunk_only"),
    "msdnet": create_fork("dfs", partition_ratio=(0.3, 1.0, 0.0)),
}


def gradients(model, fork, transform, variables, images):
    def loss(params, images):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, fork, train=True, mutable=["batch_stats"]
        )
        losses = create_loss("deep_supervision")(outputs, jnp.asarray([2, 6, 2]))
        return losses.sum()

    return jax.grad(transform(loss), (0, 1))(variables["params"], images)


@pytest.mark.parametrize("name", slow(SMALL, "msdnet", "resnet18", "resnet50"))
def test_gradients_are_the_naive_graphs(name):
    model = create_model(name, num_classes=CLASSES, **SMALL[name])
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda x: jnp.asarray(x + rng.uniform(0, 0.2, x.shape)),
            init_variables(model, jax.random.key(0), IMAGE_SHAPE),
        )
        images = jnp.asarray(rng.normal(size=(3, *IMAGE_SHAPE)))
        actual, expected = (
            jax.jit(functools.partial(gradients, model, FORKS[name], transform))(variables, images)
            for transform in (skip_dead_gradients, lambda loss: loss)
        )
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * largest)
            np.testing.assert_array_equal(a == 0, e == 0)


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("name", slow(SMALL, "msdnet", "resnet18", "resnet50"))
def test_a_step_costs_what_theory_says(name, ratio):
    """Exactly, but for depthwise convolutions, which compute their whole input gradient."""
    loss = create_loss("deep_supervision")
    fork = create_fork("dfs", partition_ratio=ratio)
    model = create_model(name, num_classes=CLASSES, **SMALL[name])
    theory = theoretical_step_cost(model, fork, loss, IMAGE_SHAPE)
    traced = traced_step_cost(model, fork, loss, IMAGE_SHAPE)
    if name.startswith("resnet"):
        assert theory.total <= traced.total < 1.02 * theory.total
    else:
        assert traced == theory
    naive = traced_step_cost(
        model.clone(partitioned_backward=False), create_fork("dfs"), loss, IMAGE_SHAPE
    )
    plain = theoretical_step_cost(model, create_fork("plain"), loss, IMAGE_SHAPE)
    assert naive == plain
    assert theory.total < plain.total


@pytest.mark.parametrize(
    ("name", "options"),
    [("vgg7", {"width": 64}), ("resnet18", {}), ("msdnet", {}), ("vgg16", {}), ("resnet50", {})],
)
@pytest.mark.slow
def test_full_networks_cost_what_theory_says(name, options):
    loss, fork = create_loss("deep_supervision"), create_fork("dfs")
    model = create_model(name, num_classes=CLASSES, **options)
    traced, theory = (
        count(model, fork, loss, (32, 32, 3)) for count in (traced_step_cost, theoretical_step_cost)
    )
    assert traced.total == pytest.approx(theory.total, rel=0.01)


def test_a_config_switches_both_off():
    config = tiny_config(**{"model.partitioned_backward": False, "model.cpu_kernels": False})
    naive, ours = build_experiment(config), build_experiment(tiny_config())
    assert (naive.model.partitioned_backward, naive.model.cpu_kernels) == (False, False)
    programs = []
    for experiment in (ours, naive):
        state = initial_state(experiment)
        shape = experiment.dataset.image_shape
        images = jax.ShapeDtypeStruct((6, *shape), jnp.uint8)
        labels = jax.ShapeDtypeStruct((6,), jnp.int32)
        programs.append(training_step(experiment).trace(state, images, labels).jaxpr)
    cost, naive_cost = map(count_operations, programs)
    assert cost < naive_cost
    pools = [str(program).count("select_and_scatter_add") for program in programs]
    assert pools[0] == 0 < pools[1]
