"""Every operation that converts, against jax, in batches of several sizes."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dfs_jax.layers import upsample_bilinear
from dfs_jax.onnx import Input, to_onnx
from dfs_jax.onnx.contractions import CONTRACTIONS
from dfs_jax.onnx.elementwise import ELEMENTWISE
from dfs_jax.onnx.moves import MOVES
from dfs_jax.onnx.reductions import REDUCTIONS
from dfs_jax.types import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
ROW, IMAGE, TOKENS = (7,), (5, 6, 3), (5, 8)


def weights(*shape):
    return RNG.normal(size=shape).astype(np.float32)


W_IMAGE, W_ROW, W_TOKENS = weights(3, 3, 3, 4), weights(7, 4), weights(8, 2, 3)
W_DEPTH, W_CENTRE = weights(3, 2, 1, 3), weights(5, 9)
TABLE, W_STACK = weights(11, 4), weights(3, 7, 7)


def convolved(x, w=W_IMAGE, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def scanned_rows(x):
    """A loop over rows that are all the same, as broadcasting makes them."""
    rows = jnp.broadcast_to(x.T[:1], (3, x.shape[0]))
    return lax.scan(lambda c, row: (c + row, row), jnp.zeros(x.shape[0]), rows)[0]


def scanned(x):
    carry, ys = lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum(-1)), x, W_STACK)
    return carry + ys.sum(0)[:, None]


def attention(x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, w) for w in (W_TOKENS, W_TOKENS + 1, W_TOKENS * 2))
    p = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
    return jnp.einsum("bhqs,bshk->bqhk", p, v).reshape(x.shape[0], 5, 6)


CASES = {
    # primitive: (function, shape of one example)
    "abs": (jnp.abs, ROW),
    "add": (lambda x: x + x[:, :1], ROW),
    "and": (lambda x: (x > 0) & (x < 1), ROW),
    "argmax": (lambda x: jnp.argmax(x, 2), IMAGE),
    "argmin": (lambda x: jnp.argmin(x, 1), ROW),
    "broadcast_in_dim": (lambda x: jnp.broadcast_to(x.mean((1, 2))[:, None, None], x.shape), IMAGE),
    "ceil": (jnp.ceil, ROW),
    "clamp": (lambda x: jnp.clip(x, -0.5, 0.7), ROW),
    "concatenate": (
        lambda x: jnp.concatenate([x, 2 * x, jnp.ones((x.shape[0], 5, 2, 3))], 2),
        IMAGE,
    ),
    "conv_general_dilated": (convolved, IMAGE),
    "convert_element_type": (lambda x: (x * 3).astype(jnp.int32).astype(jnp.float32), ROW),
    "cos": (jnp.cos, ROW),
    "div": (lambda x: x / (3 + x[:, :1] ** 2), ROW),
    "dot_general": (lambda x: x @ W_ROW, ROW),
    "eq": (lambda x: jnp.floor(x) == 0, ROW),
    "erf": (jax.lax.erf, ROW),
    "erfc": (jax.lax.erfc, ROW),
    "exp": (jnp.exp, ROW),
    "expand_dims": (lambda x: x[:, None, :, None] * 2, ROW),
    "expm1": (jnp.expm1, ROW),
    "floor": (jnp.floor, ROW),
    "gather": (lambda x: jnp.take(TABLE, jnp.abs(x * 3).astype(jnp.int32) % 11, axis=0), ROW),
    "ge": (lambda x: x >= x[:, :1], ROW),
    "gt": (lambda x: x > x[:, :1], ROW),
    "integer_pow": (lambda x: x**3 + x**2, ROW),
    "is_finite": (lambda x: jnp.isfinite(1 / jnp.floor(x)), ROW),
    "le": (lambda x: x <= x[:, :1], ROW),
    "log": (lambda x: jnp.log(1 + x * x), ROW),
    "log1p": (lambda x: jnp.log1p(x * x), ROW),
    "logistic": (jax.nn.sigmoid, ROW),
    "lt": (lambda x: x < x[:, :1], ROW),
    "max": (lambda x: jnp.maximum(x, x[:, :1]), ROW),
    "min": (lambda x: jnp.minimum(x, x[:, :1]), ROW),
    "mul": (lambda x: x * x.sum(1, keepdims=True), ROW),
    "ne": (lambda x: jnp.floor(x) != 0, ROW),
    "neg": (lambda x: -x, ROW),
    "not": (lambda x: ~(x > 0), ROW),
    "or": (lambda x: (x > 1) | (x < 0), ROW),
    "pad": (lambda x: lax.pad(x, 0.5, ((0, 0, 0), (1, 2, 0), (-1, 3, 0), (0, 0, 0))), IMAGE),
    "pow": (lambda x: jnp.abs(x) ** 1.5, ROW),
    "reduce_max": (lambda x: x.max((1, 3)), IMAGE),
    "reduce_min": (lambda x: x.min(1), ROW),
    "reduce_prod": (lambda x: x.prod(1), ROW),
    "reduce_sum": (lambda x: x.sum((1, 2)), IMAGE),
    "reduce_window_max": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), "SAME"),
        IMAGE,
    ),
    "reduce_window_sum": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 3, 1), (1, 1, 2, 1), "SAME"),
        IMAGE,
    ),
    "reshape": (lambda x: x.reshape(x.shape[0], 15, 6), IMAGE),
    "rem": (lambda x: lax.rem(10 * x, jnp.full_like(x, 3)), ROW),
    "rev": (lambda x: lax.rev(x, (1, 3)), IMAGE),
    "rsqrt": (lambda x: lax.rsqrt(1 + x * x), ROW),
    "select_n": (lambda x: jnp.where(x > 0, x, 0.1 * x), ROW),
    "sign": (jnp.sign, ROW),
    "sin": (jnp.sin, ROW),
    "slice": (lambda x: lax.slice_in_dim(x, 1, 6, 2, axis=2), IMAGE),
    "split": (lambda x: sum(jnp.split(x, 3, axis=2)), IMAGE),
    "sqrt": (lambda x: jnp.sqrt(x * x), ROW),
    "square": (lax.square, ROW),
    "squeeze": (lambda x: x.max(2, keepdims=True).squeeze(2), IMAGE),
    "stack": (lambda x: jnp.stack([x, 2 * x, x[:, ::-1]], 2), IMAGE),
    "sub": (lambda x: 1 - x, ROW),
    "tanh": (jnp.tanh, ROW),
    "transpose": (lambda x: x.transpose(0, 3, 1, 2) + 1, IMAGE),
    "unstack": (lambda x: x[:, 0] + x[:, 3], IMAGE),
    # compositions
    "size of the batch": (lambda x: x.sum(0) + x * x.shape[0], ROW),
    "strided": (lambda x: x[:, ::2, ::-1] + x[:, :3], IMAGE),
    "attention": (attention, TOKENS),
    "average pool": (lambda x: convolved(x).mean((1, 2)), IMAGE),
    "bilinear": (lambda x: upsample_bilinear(convolved(x), 10, 12), IMAGE),
    "bilinear to any size": (
        lambda x: jax.image.resize(x, (x.shape[0], 7, 9, 3), "bilinear"),
        IMAGE,
    ),
    "checkpoint": (jax.checkpoint(lambda x: jnp.tanh(x @ W_ROW)), ROW),
    "class token": (
        lambda x: jnp.concatenate([jnp.broadcast_to(W_TOKENS[:, 0, 0], (x.shape[0], 1, 8)), x], 1),
        TOKENS,
    ),
    "depthwise": (
        lambda x: convolved(x, W_DEPTH, feature_group_count=3, window_strides=(2, 1)),
        IMAGE,
    ),
    "dilated": (lambda x: convolved(x, rhs_dilation=(2, 1)), IMAGE),
    "flatten": (lambda x: convolved(x).reshape(x.shape[0], -1)[:, :9], IMAGE),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), ROW),
    "layer norm": (
        lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6),
        TOKENS,
    ),
    "matrix from the left": (lambda x: jnp.einsum("hk,bhwc->bkwc", W_CENTRE, x), IMAGE),
    "matrix of the middle": (lambda x: jnp.einsum("bhwc,hk->bwkc", convolved(x), W_CENTRE), IMAGE),
    "reduce over a broadcast": (
        lambda x: (jnp.broadcast_to(x[:, None], (x.shape[0], 4, 7)) + 0.0).sum(1),
        ROW,
    ),
    "scan": (scanned, ROW),
    "scan over a broadcast": (scanned_rows, ROW),
    "several contracted": (lambda x: jnp.tensordot(x, W_IMAGE[:, :, :, 0][:5], 0).sum(-1), ROW),
    "softmax": (jax.nn.softmax, ROW),
    "weights over two axes": (
        lambda x: jnp.einsum("bhwc,wck->bhk", x, np.resize(W_IMAGE, (6, 3, 4))),
        IMAGE,
    ),
}
IMPLIED = {"add_any", "copy", "copy_p", "optimization_barrier", "exit_logits", "stop_gradient"}


def run(function, example, batches, dtype=np.float32):
    axes = tuple(range(len(example) + 1))
    found = to_onnx(lambda x: (function(x),), [Input("x", example, dtype, axes)], ["y"])
    session = onnxruntime.InferenceSession(found.model, providers=["CPUExecutionProvider"])
    order = found.outputs[0].axes
    for batch in batches:
        x = RNG.normal(size=(batch, *example)).astype(dtype)
        (got,) = session.run(None, {"x": x})
        yield np.transpose(got, np.argsort(order)), np.asarray(function(jnp.asarray(x)))


def assert_close(got, expected, tolerance=1e-5):
    """Equal to a part of the largest value, which is what rounding in float32 depends on."""
    scale = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max(
        initial=1
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_jax(name):
    function, example = CASES[name]
    for got, expected in run(function, example, (1, 2, 11)):
        assert got.dtype == expected.dtype
        assert_close(got, expected)


def test_every_operation_has_a_case():
    known = {*ELEMENTWISE, *MOVES, *REDUCTIONS, *CONTRACTIONS} - IMPLIED
    assert known <= set(CASES)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (jnp.sort, "sort of the function cannot be converted to ONNX: it has no counterpart"),
        (lambda x: x * len(x), "network cannot be traced for a batch of any size"),
        (
            lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x),
            "while of the function cannot be converted to ONNX",
        ),
        (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1))), "padding between elements"),
    ],
)
def test_what_has_no_counterpart_is_named(function, message):
    with pytest.raises(UserError, match=message):
        list(run(function, ROW, (2,)))


def operators(function, example):
    axes = tuple(range(len(example) + 1))
    found = to_onnx(lambda x: (function(x),), [Input("x", example, np.float32, axes)], ["y"])
    return Counter(node.op_type for node in onnx.load_from_string(found.model).graph.node)


NORM = [weights(4), np.abs(weights(4)) + 0.5, weights(4), weights(4)]
W_1X1, W_HEAD = weights(1, 1, 4, 4), weights(4, 4)


def batch_norm(x):
    mean, var, scale, bias = NORM
    return (x - mean) * lax.rsqrt(jnp.asarray(var) + 1e-3) * scale + bias


def test_normalisation_becomes_part_of_the_layer_before_it():
    def network(x):
        x = jax.nn.relu(batch_norm(convolved(x)))
        x = jax.nn.relu6(batch_norm(convolved(x, W_1X1)))
        return batch_norm(x.mean((1, 2)) @ W_HEAD)

    expected = {"Transpose": 1, "Conv": 2, "Relu": 1, "Clip": 1}
    expected |= {"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert operators(network, IMAGE) == expected
    for got, wanted in run(network, IMAGE, (1, 3)):
        assert_close(got, wanted)


def test_a_layer_that_two_read_keeps_its_weights():
    def network(x):
        x = convolved(x)
        return jax.nn.relu(2 * x + 1) + x

    for got, expected in run(network, IMAGE, (1, 4)):
        assert_close(got, expected)


def test_normalisation_after_an_activation_stays_a_normalisation():
    network = lambda x: batch_norm(jax.nn.relu(convolved(x)))  # noqa: E731
    expected = {"Transpose": 1, "Conv": 1, "Relu": 1, "BatchNormalization": 1}
    assert operators(network, IMAGE) == expected
    for got, wanted in run(network, IMAGE, (1, 3)):
        assert_close(got, wanted)


def test_a_bilinear_doubling_is_one_operator():
    network = lambda x: upsample_bilinear(x, 10, 12)  # noqa: E731
    assert operators(network, IMAGE) == {"Transpose": 1, "Resize": 1}
    for got, expected in run(network, IMAGE, (1, 3)):
        assert_close(got, expected)


def test_parts_that_are_joined_again_are_the_whole():
    def forked(x):
        return jnp.tanh(jnp.concatenate([x[..., :3], lax.stop_gradient(x[..., 3:])], -1))

    assert operators(forked, ROW) == {"Tanh": 1}
    shifted = lambda x: jnp.concatenate([x[..., 1:3], x[..., 3:6]], -1)  # noqa: E731
    assert operators(shifted, ROW) == {"Slice": 1}
    for got, expected in run(shifted, ROW, (2,)):
        np.testing.assert_array_equal(got, expected)


def test_bfloat16_is_computed_in_float32():
    function = lambda x: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32)  # noqa: E731
    for got, expected in run(function, ROW, (2,)):
        np.testing.assert_allclose(got, expected, rtol=1e-2)


def test_outputs_hand_their_layout_on():
    axes = (0, 1, 2, 3)
    first = to_onnx(
        lambda x: (x.mean((1, 2, 3)), convolved(x)),
        [Input("x", IMAGE, np.float32, axes)],
        ["m", "c"],
    )
    carry = first.outputs[1]
    assert (carry.name, carry.shape, carry.axes) == ("c", (5, 6, 4), (0, 3, 1, 2))
    second = to_onnx(lambda c: (c.sum(1),), [carry], ["y"])
    sessions = [
        onnxruntime.InferenceSession(m.model, providers=["CPUExecutionProvider"])
        for m in (first, second)
    ]
    x = RNG.normal(size=(3, *IMAGE)).astype(np.float32)
    _, handed = sessions[0].run(None, {"x": x})
    assert handed.shape == (3, 4, 5, 6)
    (got,) = sessions[1].run(None, {"c": handed})
    order = np.argsort(second.outputs[0].axes)
    assert_close(got.transpose(order), convolved(x).sum(1))
