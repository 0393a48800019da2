"""Partitioned layers against what they replace: stop_gradient, concatenation, an ordinary layer."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from dfs_jax.analysis.traced import Kind, TracedProgram, multiply_adds
from dfs_jax.partitioned import PartitionedConv, PartitionedDot
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.types import UserError

CHANNELS, FEATURES = 7, 5
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# beta 0, 0.3 and 1, what a symmetric head leaves live, and what MSDNet's concatenations do.
LIVE = [(), ((0, 2),), None, ((2, 7),), ((0, 1), (3, 5)), ((1, 2), (2, 4), (6, 7))]
# kernel, strides, padding, kernel dilation
GEOMETRIES = {
    "3x3": ((3, 3), (1, 1), ((1, 1), (1, 1)), None),
    "3x3/2": ((3, 3), (2, 2), ((1, 1), (1, 1)), None),
    "SAME, one stride of 2": ((3, 2), (2, 1), "SAME", None),
    "VALID, dilated": ((2, 3), (1, 2), "VALID", (2, 3)),
    "1x1/2": ((1, 1), (2, 2), "VALID", None),
    "uneven padding": ((3, 3), (1, 3), ((0, 2), (3, 1)), (1, 2)),
}


def arrays(kernel=(3, 3), dtype=np.float64, batch=3, sides=(11, 13), channels=CHANNELS):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *sides, channels))
    w = rng.normal(size=(*kernel, channels, FEATURES))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def cut(x, live):
    """`x`, a constant outside the live channels, in the obvious way."""
    pieces, done = [], 0
    for start, stop in (((0, x.shape[-1]),) if live is None else live) + ((x.shape[-1],) * 2,):
        pieces += [lax.stop_gradient(x[..., done:start]), x[..., start:stop]]
        done = stop
    return jnp.concatenate(pieces, axis=-1)


def loss(conv, x, w, geometry=GEOMETRIES["3x3"]):
    _, strides, padding, dilation = geometry
    y = conv(x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=DIMENSIONS)
    return jnp.sum(jnp.sin(y))


def naive(live, geometry=GEOMETRIES["3x3"]):
    return lambda x, w: loss(lax.conv_general_dilated, cut(x, live), w, geometry)


def partitioned(live, geometry=GEOMETRIES["3x3"], *, cpu_kernels=True):
    """Without the `stop_gradient` of a fork, so that the zeros have to come from the layer."""
    return lambda x, w: loss(PartitionedConv(live, cpu_kernels), x, w, geometry)


def gradients(function):
    return jax.grad(function, (0, 1))


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_equal_the_naive_graphs(name):
    geometry = GEOMETRIES[name]
    with jax.enable_x64(True):
        x, w = arrays(geometry[0])
        ours = jax.jit(lambda: [gradients(partitioned(live, geometry))(x, w) for live in LIVE])()
        plain = jax.jit(lambda: [gradients(naive(live, geometry))(x, w) for live in LIVE])()
        assert_close(ours, plain, 1e-12)
        for live, (dx, _) in zip(LIVE, ours, strict=True):
            dead = np.ones(CHANNELS, bool)
            for start, stop in ((0, CHANNELS),) if live is None else live:
                dead[start:stop] = False
            assert not np.asarray(dx)[..., dead].any()


def test_the_output_is_the_ordinary_convolutions():
    x, w = arrays(dtype=np.float32)
    plain = lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=DIMENSIONS)
    layer = PartitionedConv(((0, 2),))
    np.testing.assert_array_equal(layer(x, w, (2, 1), "SAME", dimension_numbers=DIMENSIONS), plain)


@pytest.mark.parametrize("live", LIVE)
def test_dense_gradients_equal_the_naive_graphs(live):
    with jax.enable_x64(True):
        x, _ = arrays()
        w = jnp.asarray(np.random.default_rng(1).normal(size=(CHANNELS, FEATURES)))
        dimensions = (((3,), (0,)), ((), ()))

        def of(dot, x, w):
            return jnp.sum(jnp.sin(dot(x, w, dimensions)))

        ours = jax.jit(gradients(functools.partial(of, PartitionedDot(live))))(x, w)
        plain = jax.jit(gradients(lambda x, w: of(lax.dot_general, cut(x, live), w)))(x, w)
        assert_close(ours, plain, 1e-12)


def macs(function, *arguments):
    """Multiply-adds of everything that is traced, and of each product alone."""
    program = TracedProgram(jax.make_jaxpr(function)(*arguments), [Kind.ACTIVATION] * 2)
    return sum(multiply_adds(operation) * operation.times for operation in program.operations)


@pytest.mark.parametrize(("live", "channels"), [((), 0), (((0, 3),), 3), (((0, 1), (5, 7)), 3)])
def test_the_backward_pass_counts_live_channels_alone(live, channels):
    x, w = arrays(dtype=np.float32)
    pass_macs = 3 * 11 * 13 * 9 * CHANNELS * FEATURES
    assert macs(lambda x, w: partitioned(None)(x, w), x, w) == pass_macs
    assert macs(gradients(naive(live)), x, w) == 3 * pass_macs
    ours = macs(gradients(partitioned(live, cpu_kernels=False)), x, w)
    assert ours == 2 * pass_macs + pass_macs * channels // CHANNELS


def test_xla_computes_less_too_where_the_naive_graph_saves_nothing():
    x, w = arrays(dtype=np.float32)

    def flops(function):
        compiled = jax.jit(gradients(function)).lower(x, w).compile()
        return compiled.cost_analysis()["flops"]

    live = ((0, 1),)
    whole, saved = flops(naive(None)), flops(naive(live))
    assert saved > 0.98 * whole
    assert flops(partitioned(live, cpu_kernels=False)) < (2 + 1.5 / CHANNELS) / 3 * whole


def test_images_need_no_gradient_and_none_is_traced():
    x, w = arrays(dtype=np.float32)
    assert macs(lambda x, w: jax.grad(partitioned(None), 1)(x, w), x, w) == macs(
        gradients(partitioned(())), x, w
    )


LIVE_CHANNELS = ((0, 1), (3, 5))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gradients_of_gradients(dtype):
    """Reverse over reverse and forward over reverse; in float32 through the CPU's kernels."""
    with jax.enable_x64(True):
        x, w = arrays(dtype=dtype, sides=(6, 10))
        direction = (jnp.sin(x), jnp.cos(w))

        def forked(x, w):
            return partitioned(LIVE_CHANNELS)(cut(x, LIVE_CHANNELS), w)

        def derivatives(function):
            def penalty(x, w):
                return sum(jnp.sum(jnp.cos(g)) for g in gradients(function)(x, w))

            return gradients(penalty)(x, w), jax.jvp(gradients(function), (x, w), direction)

        ours = jax.jit(lambda: derivatives(forked))()
        plain = jax.jit(lambda: derivatives(naive(LIVE_CHANNELS)))()
        assert_close(ours, plain, 1e-12 if dtype == np.float64 else 1e-5)


def test_plain_forward_mode_is_refused():
    x, w = arrays(dtype=np.float32)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partitioned(None), (x, w), (x, w))


def test_vmap_and_remat():
    with jax.enable_x64(True):
        x, w = arrays()
        xs, live = jnp.stack([x, 2 * x]), LIVE_CHANNELS
        ours = jax.jit(jax.vmap(gradients(jax.remat(partitioned(live))), (0, None)))(xs, w)
        plain = jax.jit(jax.vmap(gradients(naive(live)), (0, None)))(xs, w)
        assert_close(ours, plain, 1e-12)


def test_bfloat16():
    x, w = arrays(dtype=jnp.bfloat16, sides=(6, 10))
    ours = jax.jit(gradients(partitioned(LIVE_CHANNELS)))(x, w)
    plain = jax.jit(gradients(naive(LIVE_CHANNELS)))(x.astype(np.float32), w.astype(np.float32))
    assert all(g.dtype == jnp.bfloat16 for g in ours)
    assert_close([g.astype(np.float32) for g in ours], plain, 2e-2)


class Forked(nn.Module):
    """Two layers with a fork between them, by Flax."""

    partitioned: bool

    @nn.compact
    def __call__(self, x):
        forked = FeatureSurgery(0.3)(x, exit_index=0, num_exits=2)
        conv = PartitionedConv(forked.trunk_live) if self.partitioned else None
        dot = PartitionedDot(forked.head_live) if self.partitioned else None
        y = nn.Conv(FEATURES, (3, 3), 2, padding=1, conv_general_dilated=conv)(forked.to_trunk)
        return y.sum() + nn.Dense(2, dot_general=dot)(forked.to_head).sum()


def test_flax_layers_keep_their_parameters_and_gradients():
    x, _ = arrays(dtype=np.float32)

    def variables_and_gradient(p):
        variables = Forked(p).init(jax.random.key(0), x)
        return variables, gradients(lambda v, x: jnp.sin(Forked(p).apply(v, x)))(variables, x)

    ours, plain = jax.jit(lambda: [variables_and_gradient(p) for p in (True, False)])()
    assert_close(ours, plain, 1e-6)


def test_depthwise_and_grouped_convolutions_are_the_plain_ones():
    x, _ = arrays(dtype=np.float32)
    w = jnp.ones((3, 3, 1, CHANNELS))
    options = {"dimension_numbers": DIMENSIONS, "feature_group_count": CHANNELS}
    ours, plain = (
        jax.make_jaxpr(lambda x, w, c=conv: c(x, w, (1, 1), "SAME", **options))(x, w)
        for conv in (PartitionedConv(((0, 2),), cpu_kernels=False), lax.conv_general_dilated)
    )
    assert str(ours) == str(plain)


@pytest.mark.parametrize("live", [((0, 8),), ((2, 4), (3, 5)), ((3, 3),), ((-1, 2),)])
def test_live_channels_that_cannot_be_are_refused(live):
    x, w = arrays(dtype=np.float32)
    with pytest.raises(UserError, match=r"within 7 channels, got \(\("):
        partitioned(live)(x, w)


def test_a_product_that_no_dense_layer_makes_is_refused():
    x = jnp.ones((2, 3, 5))
    with pytest.raises(UserError, match=r"use jax\.lax\.dot_general"):
        PartitionedDot()(x, x, (((2,), (2,)), ((0,), (0,))))


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.test_partitioned import *
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x, w = arrays(dtype=np.float32, batch=6)
split = jax.device_put(x, NamedSharding(mesh, P("data")))
ours = jax.jit(gradients(partitioned(LIVE_CHANNELS, cpu_kernels=False)))
assert_close(ours(split, w), gradients(naive(LIVE_CHANNELS))(x, w), 1e-6)
assert ours(split, w)[0].sharding.spec[0] == "data"
assert "all-gather" not in ours.lower(split, w).compile().as_text()
"""


def test_a_batch_over_two_devices(request, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    subprocess.run([sys.executable, "-c", SHARDED], check=True, cwd=request.config.rootpath)
