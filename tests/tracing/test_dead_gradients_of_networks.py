"""Whole networks without their dead gradients: at the cost that theory says, and sharded."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.tracing import skip_dead_gradients
from tests.support.marks import slow
from tests.support.networks import SMALL_MSDNET, macs


class Equal(nn.Module):
    """L equal layers, each of which reads the one before through a fork."""

    layers: int
    ratio: float

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(10, (3, 3))(x)))
            if i < self.layers - 1:
                x = FeatureSurgery(self.ratio)(x, exit_index=i, num_exits=self.layers).to_trunk
        return x


@pytest.mark.parametrize(("layers", "ratio"), [(2, 0.5), (5, 0.3), (5, 0.0), (3, 1.0)])
def test_equal_layers_cost_what_theory_says(layers, ratio):
    net, x = Equal(layers, ratio), jnp.ones((2, 7, 5, 10))
    variables = net.init(jax.random.key(0), x)

    def loss(params, x):
        y, _ = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**2)

    layer = macs(
        lambda p, x: nn.Conv(10, (3, 3)).apply({"params": p}, x), variables["params"]["Conv_0"], x
    )
    cost = macs(jax.grad(skip_dead_gradients(loss)), variables["params"], x)
    saved = (1 - ratio) * (layers - 1)
    if not ratio:  # nor do the weights before the last fork train
        saved = 2 * (layers - 1)
    assert macs(jax.grad(loss), variables["params"], x) == layer * (3 * layers - 1)
    assert cost == pytest.approx(layer * (3 * layers - 1 - saved), rel=1e-9)


# FLOPs of an image: of the naive graph, and as each layer that is told its live channels computes.
NETWORKS = {
    "vgg7": ({"width": 16}, (32, 32, 3), 58_406_016, 48_967_232),
    "resnet18": ({"width": 3, "stage_sizes": (2, 1)}, (32, 32, 3), 3_332_304, 3_301_584),
    "msdnet": ({**SMALL_MSDNET, "num_exits": 4, "prune": "min"}, (10, 13, 3), 980_220, 946_000),
}


@pytest.mark.parametrize("name", slow(NETWORKS, "msdnet"))
def test_networks_cost_what_layers_that_know_their_live_channels_do(name):
    options, shape, whole, cheaper = NETWORKS[name]
    model = create_model(name, num_classes=10, **options)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def loss(params, rest, images):
        outputs, _ = model.apply(
            {**rest, "params": params}, images, create_fork("dfs"), train=True, mutable=[*rest]
        )
        return create_loss("deep_supervision")(outputs, jnp.zeros(1, int)).sum()

    costs = [2 * macs(jax.grad(f), params, rest, images) for f in (loss, skip_dead_gradients(loss))]
    assert costs == [whole, cheaper]


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.tracing.test_dead_gradients_of_networks import *
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (6, 11, 13, 7))
net = Equal(2, 0.3)
variables = jax.jit(net.init)(jax.random.key(1), x)
def loss(x):
    return jnp.sum(jnp.sin(net.apply(variables, x, mutable=["batch_stats"])[0]))
split = jax.device_put(x, NamedSharding(mesh, P("data")))
ours = jax.jit(jax.grad(skip_dead_gradients(loss)))
np.testing.assert_allclose(ours(split), jax.jit(jax.grad(loss))(x), rtol=0, atol=1e-5)
assert ours(split).sharding.spec[0] == "data"
assert "all-gather" not in ours.lower(split).compile().as_text()
"""


def test_a_batch_over_two_devices(request, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    subprocess.run([sys.executable, "-c", SHARDED], check=True, cwd=request.config.rootpath)
