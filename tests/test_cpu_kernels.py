"""The CPU's kernels against XLA's convolutions and pooling, and where they are used."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export, lax

from dfs_jax.cpu_kernels import (
    chunks,
    compiler,
    compiler_options,
    depthwise,
    max_pool_2x2,
    pointwise,
    taps,
    winograd,
)
from dfs_jax.cpu_kernels.choice import Geometry, choose_kernels
from dfs_jax.partitioned import PartitionedConv
from tests.test_partitioned import DIMENSIONS, assert_close, gradients

PADDED = ((1, 1), (1, 1))


def convolve(x, w, stride=1):
    """XLA's convolution as the networks use it: half the kernel's size is padded."""
    pad = w.shape[0] // 2
    padding = ((pad, pad),) * 2
    return lax.conv_general_dilated(x, w, (stride,) * 2, padding, dimension_numbers=DIMENSIONS)


def xla_passes(x, w, stride, seed=0):
    """The output, its gradient (random), and the gradients of kernel and input."""
    y, pullback = jax.vjp(functools.partial(convolve, stride=stride), x, w)
    dy = jnp.asarray(np.random.default_rng(seed).normal(size=y.shape), x.dtype)
    dx, dw = pullback(dy)
    return y, dy, dw, dx


def random(*shape, dtype=np.float64, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# name, kernel size, stride, sides, the three passes; None where XLA's is always taken
KERNELS = {
    "winograd": (
        *(3, 1, (6, 10)),
        (winograd.forward, None, winograd.input_gradient),
    ),
    "taps": (3, 1, (5, 8), (None, taps.weight_gradient, None)),
    "strided taps": (
        *(3, 2, (6, 11)),
        (
            None,
            taps.strided_weight_gradient,
            functools.partial(taps.strided_input_gradient, sides=(6, 11)),
        ),
    ),
    "pointwise": (
        *(1, 1, (5, 7)),
        (
            None,
            functools.partial(pointwise.weight_gradient, strides=(1, 1)),
            None,
        ),
    ),
    "pointwise, stride 2": (
        *(1, 2, (5, 8)),
        (
            None,
            functools.partial(pointwise.weight_gradient, strides=(2, 2)),
            None,
        ),
    ),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(5, 8), (6, 7)])
def test_depthwise_kernels_equal_xlas(stride, sides):
    """Through the layer: float32 takes the kernels, float64 XLA's convolution."""

    def loss(x, w):
        options = {"dimension_numbers": DIMENSIONS, "feature_group_count": 3}
        y = PartitionedConv(((0, 2),))(x, w, (stride, stride), PADDED, **options)
        return jnp.sum(jnp.sin(y)), y

    with jax.enable_x64(True):
        x, w = random(5, *sides, 3), random(3, 3, 1, 3)
        function = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        single = x.astype(np.float32), w.astype(np.float32)
        ours, exact = function(*single), function(x, w)
        assert operations(function.lower(*single).as_text())["convolution"] == 0
        assert_close(ours, jax.tree.map(lambda a: a.astype(np.float32), exact), 1e-5)
        assert operations(function.lower(x, w).as_text())["convolution"] == 3


@pytest.mark.parametrize("bytes_per_chunk", [1, 1 << 14, 1 << 30], ids=["one", "some", "all"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_xlas_in_chunks_of_any_size(name, bytes_per_chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", bytes_per_chunk)
    monkeypatch.setattr(winograd, "LONGEST_SUM", 2)  # uneven parts of five and three channels
    size, stride, sides, passes = KERNELS[name]
    with jax.enable_x64(True):
        x, w = random(7, *sides, 5), random(size, size, 5, 7)
        y, dy, dw, dx = jax.jit(lambda: xla_passes(x, w, stride))()
        arguments = ((x, w), (x, dy), (dy, w))
        ours = jax.jit(
            lambda: [f and f(*a) for f, a in zip(passes, arguments, strict=True)],
        )()
        for actual, expected in zip(ours, (y, dw, dx), strict=True):
            if actual is not None:
                assert_close(actual, expected, 1e-12)


def test_chunks_are_equal_and_at_least_half_of_what_fits(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    assert chunks.chunk_size(64, 10) == 8  # 10 fit, 8 divides
    assert chunks.chunk_size(61, 10) == 9  # seven chunks, two images padded
    assert chunks.chunk_size(61, 1) == 61
    assert chunks.chunk_size(61, 101) == 1
    for batch in range(1, 80):
        size = chunks.chunk_size(batch, 10)
        assert min(batch, 6) <= size <= 10 or batch % size == 0
        assert -batch % size < -(-batch // size)


@pytest.mark.parametrize("channels", [64, 256])
def test_in_float32_no_less_accurate_than_xla(channels):
    """Inputs as after a ReLU; root mean square of the error against float64, of each pass.

    1.3 is the margin: Winograd's sums are shorter, but begin with differences of its inputs.
    """
    with jax.enable_x64(True):
        x = jnp.maximum(random(8, 8, 8, channels, dtype=np.float32), 0)
        w = random(3, 3, channels, channels, dtype=np.float32, seed=2) / (9 * channels) ** 0.5

        @jax.jit
        def errors(x, w):
            _, _, *exact_gradients = xla_passes(x.astype(np.float64), w.astype(np.float64), 1)
            exact_y = convolve(x.astype(np.float64), w.astype(np.float64))
            y, dy, dw, dx = xla_passes(x, w, 1)
            exact = (exact_y, *exact_gradients)

            def error(actual):
                return [
                    jnp.sqrt(jnp.mean((a - e) ** 2) / jnp.mean(e**2))
                    for a, e in zip(actual, exact, strict=True)
                ]

            ours = (
                winograd.forward(x, w),
                taps.weight_gradient(x, dy),
                winograd.input_gradient(dy, w),
            )
            return jnp.asarray(error(ours)), jnp.asarray(error((y, dw, dx)))

        ours, xlas = errors(x, w)
        assert (xlas > 1e-8).all()
        assert (ours < 1.3 * xlas).all(), ours / xlas


# kernel, stride, padding, sides, channels, features, depthwise -> modules of the three kernels
CHOICES = [
    (3, 1, 1, (24, 26), 32, 64, False, (winograd, taps, winograd)),
    (3, 1, 1, (8, 10), 32, 64, False, (winograd, None, winograd)),
    (3, 1, 1, (8, 6), 32, 64, False, (None, None, None)),
    (3, 1, 1, (24, 24), 3, 64, False, (None, taps, None)),
    (3, 1, 1, (25, 25), 64, 64, False, (None, taps, None)),
    (3, 1, 1, (24, 26), 63, 32, False, (None, taps, None)),
    (3, 1, 1, (64, 64), 64, 64, False, (winograd, taps, winograd)),
    (3, 1, 1, (128, 128), 64, 64, False, (None, taps, None)),
    (3, 1, 1, (130, 128), 64, 64, False, (None, None, None)),
    (3, 2, 1, (130, 128), 64, 64, False, (None, None, None)),
    (3, 2, 1, (7, 8), 32, 16, False, (None, taps, taps)),
    (3, 2, 1, (7, 8), 3, 32, False, (None, None, None)),
    (3, 3, 1, (7, 8), 32, 32, False, (None, None, None)),
    (1, 2, 0, (7, 8), 3, 5, False, (None, pointwise, None)),
    (1, 1, 0, (7, 8), 5, 5, True, (None, None, None)),
    (3, 2, 1, (7, 8), 5, 5, True, (depthwise, depthwise, depthwise)),
    (3, 3, 1, (7, 8), 5, 5, True, (None, None, None)),
    (3, 1, 0, (8, 8), 64, 64, False, (None, None, None)),
    (5, 1, 2, (8, 8), 64, 64, False, (None, None, None)),
]


@pytest.mark.parametrize("row", CHOICES)
def test_the_rule(row):
    size, stride, pad, sides, channels, features, is_depthwise, modules = row
    geometry = Geometry((size,) * 2, (stride,) * 2, ((pad,) * 2,) * 2, sides, is_depthwise)
    kernels = choose_kernels(geometry, channels, features)
    for kernel, module in zip(kernels, modules, strict=True):
        function = getattr(kernel, "func", kernel)
        assert (function and function.__module__) == (module and module.__name__)


def pooled(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def layer_and_pool(conv, pool):
    """A value and its gradients, with both layers in it."""

    def loss(x, w):
        y = conv(x, w, (1, 1), PADDED, dimension_numbers=DIMENSIONS)
        return jnp.sum(jnp.sin(pool(y)))

    return jax.value_and_grad(loss, (0, 1))


OURS = layer_and_pool(PartitionedConv(((0, 32),)), max_pool_2x2)
SWITCHED_OFF = layer_and_pool(
    PartitionedConv(((0, 32),), cpu_kernels=False),
    functools.partial(max_pool_2x2, cpu_kernels=False),
)
SHAPES = [
    jax.ShapeDtypeStruct((4, 24, 24, 37), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 37, 67), jnp.float32),
]


def operations(lowered: str) -> collections.Counter:
    """How often each operation occurs; the choice itself, a case of one branch, left out."""
    found = collections.Counter(re.findall(r"stablehlo\.(\w+)", lowered))
    return collections.Counter(
        {name: n for name, n in found.items() if name not in ("case", "return", "constant")}
    )


def lowered(function, platform):
    traced = jax.jit(function).trace(*SHAPES)
    return operations(traced.lower(lowering_platforms=(platform,)).as_text())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_keep_xlas_own_kernels_and_nothing_else(platform):
    assert lowered(OURS, platform) == lowered(SWITCHED_OFF, platform)
    text = operations(
        export.export(jax.jit(OURS), platforms=[platform])(*SHAPES).mlir_module(),
    )
    assert text["convolution"] == 3
    assert not text["dot_general"] + text["optimization_barrier"]


def test_a_cpu_gets_the_kernels_unless_they_are_switched_off():
    ours, off = lowered(OURS, "cpu"), lowered(SWITCHED_OFF, "cpu")
    assert (ours["convolution"], ours["reduce_window"], ours["dot_general"]) == (0, 0, 3)
    assert (off["convolution"], off["reduce_window"], off["dot_general"]) == (3, 1, 0)


def test_a_symbolic_batch_switches_them_off():
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 24, 24, 37), jnp.float32)
    exported = export.export(jax.jit(OURS), platforms=["cpu"])(images, SHAPES[1])
    x, w = random(2, 24, 24, 37, dtype=np.float32), random(3, 3, 37, 67, dtype=np.float32)
    assert operations(exported.mlir_module())["convolution"] == 3
    assert_close(exported.call(x, w), SWITCHED_OFF(x, w), 1e-6)


def test_what_the_kernels_do_not_cover_is_xlas():
    w = random(3, 3, 37, 67, dtype=np.float32)
    x = random(2, 24, 24, 37, dtype=np.float32)
    others = [
        (x, w, {"rhs_dilation": (2, 2)}),
        (x, w, {"precision": "highest"}),
        (x.transpose(0, 3, 1, 2), w, {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}),
        (x.astype(np.float16), w.astype(np.float16), {}),
        (x[:, 0], w[0], {"dimension_numbers": ("NHC", "HIO", "NHC")}),
    ]
    for x, w, options in others:
        options = {"dimension_numbers": DIMENSIONS, **options}
        ndim = x.ndim - 2
        conv = functools.partial(
            PartitionedConv(), window_strides=(1,) * ndim, padding=((1, 1),) * ndim, **options
        )
        found = operations(jax.jit(conv).lower(x, w).as_text())
        assert (found["convolution"], found["dot_general"]) == (1, 0)


@pytest.mark.parametrize("sides", [(6, 10), (5, 7)])
def test_pooling_equals_xlas_and_the_first_of_equal_maxima_takes_the_gradient(sides):
    """Small whole numbers, so that most maxima are shared."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, *sides, 5)), jnp.float32)

    def results(pool):
        def loss(x):
            return jnp.sum(jnp.sin(pool(x) * jnp.arange(1.0, 6)))

        def penalty(x):
            return jnp.sum(jax.grad(loss)(x) ** 3)

        direction = (jnp.cos(x),)
        return (
            (pool(x), jax.grad(loss)(x), jax.grad(penalty)(x)),
            jax.jvp(jax.grad(loss), (x,), direction)[1],
            jax.vmap(jax.grad(loss))(jnp.stack([x, -x])),
        )

    ours, plain = (jax.jit(lambda p=pool: results(p))() for pool in (max_pool_2x2, pooled))
    assert_close(ours, plain, 1e-6)
    for a, e in zip(ours[0][:2], plain[0][:2], strict=True):
        np.testing.assert_array_equal(a, e)


def test_pooling_passes_what_is_not_a_number_on():
    x = jnp.ones((1, 4, 4, 1)).at[0, [0, 1, 2, 3], [0, 2, 1, 3], 0].set(jnp.nan)
    assert np.isnan(max_pool_2x2(x)).all()


def test_bfloat16_is_computed_in_float32():
    x, w = random(2, 24, 24, 37, dtype=jnp.bfloat16), random(3, 3, 37, 67, dtype=jnp.bfloat16)
    conv = functools.partial(
        PartitionedConv(), window_strides=(1, 1), padding=PADDED, dimension_numbers=DIMENSIONS
    )

    def loss(x, w):
        return jnp.sum(jnp.sin(conv(x, w)))

    compiled = jax.jit(gradients(loss))
    assert operations(compiled.lower(x, w).as_text())["convolution"] == 0
    y = jax.jit(conv)(x, w)
    assert y.dtype == jnp.bfloat16
    exact = convolve(x.astype(np.float32), w.astype(np.float32))
    one_step = 2.0**-7  # what rounding to bfloat16 may turn the last bits of float32 into
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=one_step)


def test_compiler_options_are_those_that_xla_knows():
    assert compiler_options("tpu") == compiler_options("gpu") == {}
    assert not compiler._is_known((("xla_no_such_option", "1"),))
    options = compiler_options("cpu")
    doubled = jax.jit(lambda x: (2 * x).sum(), compiler_options=options)
    assert doubled(jnp.ones(7)) == 14
    assert compiler._is_known(tuple(options.items()))
