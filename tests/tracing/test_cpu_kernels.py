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

from dfs_jax.tracing import skip_dead_gradients
from dfs_jax.tracing.cpu import (
    chunks,
    compiler,
    compiler_options,
    depthwise,
    inference_options,
    pointwise,
    taps,
    winograd,
)
from dfs_jax.tracing.cpu.choice import Geometry, choose_kernels
from dfs_jax.tracing.for_cpu import for_cpu

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

PADDED = ((1, 1), (1, 1))


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1))


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
@pytest.mark.parametrize(
    ("sides", "kernel", "padding"),
    [
        ((5, 8), 3, PADDED),
        ((6, 7), 3, PADDED),
        ((6, 7), 3, "SAME"),
        ((5, 8), 3, "VALID"),
        ((5, 8), 5, "SAME"),
        ((6, 7), 5, ((0, 3), (2, 1))),
    ],
)
def test_depthwise_kernels_equal_xlas(stride, sides, kernel, padding):
    """Through the layer: float32 takes the kernels, float64 XLA's convolution."""

    def loss(x, w):
        options = {"dimension_numbers": DIMENSIONS, "feature_group_count": 3}
        y = lax.conv_general_dilated(x, w, (stride, stride), padding, **options)
        return jnp.sum(jnp.sin(y)), y

    with jax.enable_x64(True):
        x, w = random(5, *sides, 3), random(kernel, kernel, 1, 3)
        function = jax.jit(for_cpu(jax.grad(loss, (0, 1), has_aux=True)))
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


def loss(x, w, strides=(1, 1), padding=PADDED, **options):
    """Its terms are positive: a relative tolerance is one of the sum's rounding."""
    options = {"dimension_numbers": DIMENSIONS, **options}
    return jnp.sum(1 - jnp.cos(lax.conv_general_dilated(x, w, strides, padding, **options)))


def operations(lowered: str) -> collections.Counter:
    """How often each operation occurs."""
    return collections.Counter(re.findall(r"stablehlo\.(\w+)", lowered))


def convolutions_of(function, *arguments):
    return operations(jax.jit(function).lower(*arguments).as_text())["convolution"]


# sides, channels, features, stride, padding, groups -> convolutions left to XLA of three
PASSES = {
    "winograd and taps": ((24, 26), 37, 67, 1, PADDED, 1, 0),
    "taps alone": ((25, 25), 3, 7, 1, PADDED, 1, 2),
    "strided": ((7, 10), 17, 19, 2, PADDED, 1, 1),
    "strided, padded as SAME": ((8, 10), 17, 19, 2, ((0, 1), (0, 1)), 1, 3),
    "pointwise": ((5, 6), 5, 7, 1, ((0, 0), (0, 0)), 1, 2),
    "pointwise, strided": ((5, 8), 5, 7, 2, ((0, 0), (0, 0)), 1, 2),
    "depthwise": ((5, 7), 5, 5, 1, PADDED, 5, 0),
    "depthwise, strided": ((5, 8), 5, 5, 2, PADDED, 5, 0),
    "grouped": ((24, 24), 6, 9, 1, PADDED, 3, 3),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_of_a_gradient_is_recognised(name):
    sides, channels, features, stride, padding, groups, left = PASSES[name]
    size = 1 if "pointwise" in name else 3
    x = random(2, *sides, channels, dtype=np.float32)
    w = random(size, size, channels // groups, features, dtype=np.float32, seed=2)
    plain = jax.value_and_grad(
        functools.partial(loss, strides=(stride,) * 2, padding=padding, feature_group_count=groups),
        (0, 1),
    )
    assert_close(jax.jit(for_cpu(plain))(x, w), jax.jit(plain)(x, w), 1e-5)
    assert convolutions_of(for_cpu(plain), x, w) == left
    assert convolutions_of(for_cpu(plain, kernels=False), x, w) == 3


def test_gradients_of_live_channels_mapped_rematerialised_and_of_gradients():
    """The kernels stand in the program of every derivative, within every call."""
    x, w = random(2, 24, 24, 37, dtype=np.float32), random(3, 3, 37, 67, dtype=np.float32)

    def forked(x, w):
        x = jnp.concatenate([x[..., :32], lax.stop_gradient(x[..., 32:])], axis=-1)
        return jax.checkpoint(loss)(x, w)

    def mapped(x, w):
        grad = jax.grad(skip_dead_gradients(forked), (0, 1))
        _, pull = jax.vjp(lambda x, w: jnp.stack([loss(x, w), 2 * loss(x, w)]), x, w)
        return (
            grad(x, w),
            jax.vmap(pull)(jnp.eye(2)),
            jax.lax.map(lambda c: loss(c * x, w), x[0, 0, :2, 0]),
        )

    def penalty(x, w):
        return jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(loss)(x, w))))(x)

    for function in (mapped, penalty):
        assert_close(jax.jit(for_cpu(function))(x, w), jax.jit(function)(x, w), 1e-4)
        assert convolutions_of(for_cpu(function), x, w) == 0


def test_a_symbolic_batch_keeps_xlas_own():
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 24, 24, 37), jnp.float32)
    x, w = random(2, 24, 24, 37, dtype=np.float32), random(3, 3, 37, 67, dtype=np.float32)
    exported = export.export(jax.jit(for_cpu(loss)), platforms=["cpu"])(images, w)
    assert operations(exported.mlir_module())["convolution"] == 1
    assert_close(exported.call(x, w), loss(x, w), 1e-6)


def test_what_the_kernels_do_not_cover_is_xlas():
    w = random(3, 3, 37, 67, dtype=np.float32)
    x = random(2, 24, 24, 37, dtype=np.float32)
    others = [
        (x, w, {"rhs_dilation": (2, 2)}),
        (x, w, {"precision": "highest"}),
        (x, w, {"preferred_element_type": jnp.float64}),
        (x.transpose(0, 3, 1, 2), w, {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}),
        (x.astype(np.float16), w.astype(np.float16), {}),
        (x[:, 0], w[0], {"dimension_numbers": ("NHC", "HIO", "NHC")}),
    ]
    for x, w, options in others:
        ndim = x.ndim - 2
        conv = functools.partial(loss, strides=(1,) * ndim, padding=((1, 1),) * ndim, **options)
        with jax.enable_x64("preferred_element_type" in options):
            found = operations(jax.jit(for_cpu(conv)).lower(x, w).as_text())
        assert (found["convolution"], found["dot_general"]) == (1, 0)


def pooled(x):
    return nn.max_pool(x, (2, 2), (2, 2))


@pytest.mark.parametrize(("sides", "windows"), [((6, 10), 0), ((5, 7), 1)])
def test_pooling_equals_xlas_and_the_first_of_equal_maxima_takes_the_gradient(sides, windows):
    """Small whole numbers, so that most maxima are shared."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, *sides, 5)), jnp.float32)

    def loss(x):
        return jnp.sum(jnp.sin(pooled(x) * jnp.arange(1.0, 6)))

    def results(x):
        return pooled(x), jax.grad(loss)(x), jax.vmap(jax.grad(loss))(jnp.stack([x, -x]))

    def penalty(x):
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 3))(x)

    ours, plain = jax.jit(for_cpu(results))(x), jax.jit(results)(x)
    assert_close(ours, plain, 1e-6)
    for a, e in zip(ours[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(a, e)
    assert_close(jax.jit(for_cpu(penalty))(x), jax.jit(penalty)(x), 1e-6)
    found = operations(jax.jit(for_cpu(jax.grad(loss))).lower(x).as_text())
    assert found["reduce_window"] == found["select_and_scatter"] == windows


def test_other_pools_are_xlas():
    x = random(2, 6, 8, 5, dtype=np.float32)
    for pool in (
        lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
        lambda x: nn.max_pool(x, (2, 2), (1, 1)),
        lambda x: nn.max_pool(x, (2, 2), (2, 2), ((1, 1), (1, 1))),
    ):
        function = jax.grad(lambda x, pool=pool: jnp.sum(jnp.sin(pool(x))))
        assert_close(jax.jit(for_cpu(function))(x), jax.jit(function)(x), 1e-6)


def test_pooling_passes_what_is_not_a_number_on():
    x = jnp.ones((1, 4, 4, 1)).at[0, [0, 1, 2, 3], [0, 2, 1, 3], 0].set(jnp.nan)
    assert np.isnan(jax.jit(for_cpu(pooled))(x)).all()


def test_bfloat16_is_computed_in_float32():
    x, w = random(2, 24, 24, 37, dtype=jnp.bfloat16), random(3, 3, 37, 67, dtype=jnp.bfloat16)
    assert convolutions_of(for_cpu(jax.grad(loss, (0, 1))), x, w) == 0
    y = jax.jit(for_cpu(convolve))(x, w)
    assert y.dtype == jnp.bfloat16
    exact = convolve(x.astype(np.float32), w.astype(np.float32))
    one_step = 2.0**-7  # what rounding to bfloat16 may turn the last bits of float32 into
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=one_step)


def test_inference_leaves_convolutions_to_xla():
    """The library absorbs the convolutions before a reduction, and computes them slowly."""
    w = jnp.ones((3, 3, 16, 16))

    def network(x):
        for _ in range(3):
            x = convolve(x, w)
        return x.mean((1, 2))

    options = inference_options("cpu")
    program = jax.jit(network, compiler_options=options).lower(jnp.ones((1, 8, 8, 16))).compile()
    assert "ynn" not in program.as_text()
    assert compiler._is_known(tuple(options.items()))


def test_compiler_options_are_those_that_xla_knows():
    assert compiler_options("tpu") == compiler_options("gpu") == inference_options("tpu") == {}
    assert not compiler._is_known((("xla_no_such_option", "1"),))
    options = compiler_options("cpu")
    doubled = jax.jit(lambda x: (2 * x).sum(), compiler_options=options)
    assert doubled(jnp.ones(7)) == 14
    assert compiler._is_known(tuple(options.items()))
