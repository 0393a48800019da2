"""Functions whose dead gradients are left out: the same values and gradients, at a lower cost."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dfs_jax.layers import upsample_bilinear
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.tracing import skip_dead_gradients
from dfs_jax.tracing.channels import Along, joined, union, window
from tests.support.networks import macs

WIDTH, CLASSES = 7, 5


def fork(x, ratio=0.3):
    forked = FeatureSurgery(ratio)(x, exit_index=0, num_exits=2)
    return forked.to_head, forked.to_trunk


class Situation(nn.Module):
    """A plain Flax network: a layer, what stands between the fork and its readers, the readers."""

    between: str
    dtype: str | None = None

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        x = nn.relu(conv(WIDTH)(x))
        to_head, to_trunk = fork(x)
        between = BETWEEN[self.between]
        to_trunk = between(to_trunk)
        head = nn.Dense(CLASSES, dtype=self.dtype)(between(to_head).mean((1, 2)))
        deeper = conv(11)(to_trunk)
        return head, nn.Dense(CLASSES, dtype=self.dtype)(deeper.mean((1, 2)))


def layer_norm_by_hand(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)


BETWEEN = {
    "nothing": lambda x: x,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "batch statistics": lambda x: nn.BatchNorm(
        use_running_average=False, use_scale=False, use_bias=False
    )(x),
    "max pool": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "average pool": lambda x: nn.avg_pool(x, (3, 2), (1, 2), "SAME"),
    "per-channel scale": lambda x: x * jnp.arange(1.0, WIDTH + 1).astype(x.dtype) + 1,
    "residual sum": lambda x: x + jnp.tanh(x) * 2,
    "concatenation": lambda x: jnp.concatenate([x, lax.stop_gradient(x), jnp.sin(x)], -1),
    "slices": lambda x: jnp.concatenate([x[..., 5:], x[:, :, :, 1:4]], -1),
    "split": lambda x: jnp.concatenate(jnp.split(x, [2, 3], axis=-1)[::-1], -1),
    "padding": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (2, 1))),
    "transposed images": lambda x: jnp.transpose(x, (0, 2, 1, 3))[:, ::-1],
    "reshaped": lambda x: x.reshape(x.shape[0], 1, -1, x.shape[-1]),
    "where": lambda x: jnp.where(x > 0.1, x, 0.5 * x),
    "jit in jit": lambda x: jax.jit(lambda x: jax.jit(nn.relu)(x) + 1)(x),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(jnp.cos(x))),
    "cumulative sum": lambda x: jnp.cumsum(x, axis=1),
}
# What mixes channels, or is not known: nothing is saved, nothing is wrong.
LEFT_ALONE = {
    # its scale and bias train in all channels
    "batch norm": lambda x: nn.BatchNorm(use_running_average=False)(x),
    "layer norm": lambda x: nn.LayerNorm()(x),
    "layer norm by hand": layer_norm_by_hand,
    "group norm": lambda x: nn.GroupNorm(num_groups=1)(x),
    "softmax": nn.softmax,
    "reversed channels": lambda x: x[..., ::-1],
    "gathered channels": lambda x: x[..., jnp.asarray([3, 6, 0, 1])],
    "sorted channels": lambda x: jnp.sort(x, axis=-1),
    "every other channel": lambda x: x[..., ::2],
    "channels become pixels": lambda x: x.reshape(x.shape[0], x.shape[1], -1, 1),
    "channels in front": lambda x: jnp.moveaxis(x, -1, 1),
    "scan": lambda x: lax.scan(lambda c, r: (jnp.roll(c, 1, -1) + r, c), x[0], x)[1],
    "cond": lambda x: lax.cond(x[0, 0, 0, 0] > 0, lambda x: jnp.roll(x, 2, -1), jnp.sin, x),
    "sum of channels": lambda x: x + x.sum(-1, keepdims=True),
    "cumulative over channels": lambda x: jnp.cumsum(x, axis=-1),
}
BETWEEN |= LEFT_ALONE


def problem(between, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(3, 8, 6, 3)), dtype or jnp.float64)
    net = Situation(between, dtype)
    variables = net.init(jax.random.key(seed), x)

    def loss(params, x):
        outputs, state = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(y * (i + 1))) for i, y in enumerate(outputs)), state

    return loss, variables["params"], x


def assert_same(actual, expected, tolerance=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1))


@pytest.mark.parametrize("between", BETWEEN)
def test_values_and_gradients_are_those_of_the_function(between):
    with jax.enable_x64(True):
        loss, params, x = problem(between)
        both = [
            jax.value_and_grad(f, (0, 1), has_aux=True) for f in (skip_dead_gradients(loss), loss)
        ]
        actual, expected = jax.jit(lambda p, x: [f(p, x) for f in both])(params, x)
        assert_same(actual, expected)
        cost, naive = (macs(f, params, x) for f in both)
        assert cost == naive if between in LEFT_ALONE else cost < naive


@pytest.mark.parametrize("between", ["average pool", "gelu", "checkpoint"])
def test_in_bfloat16(between):
    loss, params, x = problem(between, "bfloat16")
    both = [jax.grad(f, has_aux=True) for f in (skip_dead_gradients(loss), loss)]
    assert_same(*(jax.jit(f)(params, x)[0] for f in both), tolerance=2**-7)
    assert macs(both[0], params, x) < macs(both[1], params, x)


def test_mapped_differentiated_forward_and_twice():
    with jax.enable_x64(True):
        loss, params, x = problem("silu")
        direction = jax.tree.map(jnp.cos, params)

        def answers(f):
            def scalar(p):
                return f(p, x)[0]

            return (
                jax.vmap(lambda x: jax.grad(lambda p: f(p, x)[0])(params))(x[:, None]),
                jax.jvp(scalar, (params,), (direction,)),
                jax.jvp(jax.grad(scalar), (params,), (direction,)),
                jax.grad(
                    lambda p: sum(map(jnp.vdot, *map(jax.tree.leaves, (jax.grad(scalar)(p), p))))
                )(params),
                jax.vjp(scalar, params)[1](2.0),
            )

        assert_same(
            *(jax.jit(functools.partial(answers, f))() for f in (skip_dead_gradients(loss), loss))
        )


def test_the_forward_pass_is_the_same_to_the_bit_and_no_dearer():
    loss, params, x = problem("max pool", "float32")
    jitted = [jax.jit(f)(params, x)[0] for f in (skip_dead_gradients(loss), loss)]
    np.testing.assert_array_equal(*jitted)
    assert macs(skip_dead_gradients(loss), params, x) == macs(loss, params, x)


def test_what_an_outer_function_differentiates_is_live_also_where_it_is_closed_over():
    with jax.enable_x64(True):
        x, w = jnp.linspace(0, 1, 6).reshape(2, 3), jnp.linspace(1, 2, 15).reshape(3, 5)

        def outer(transform):
            def of(x):
                return transform(lambda w: jnp.sum(jnp.sin(x * 2 @ w)))(w)

            return jax.grad(of)(x)

        assert_same(outer(skip_dead_gradients), outer(lambda f: f))


def test_a_custom_derivative_counts_not_the_function_it_replaces():
    """A straight-through estimator: its value stops gradients and its derivative does not."""

    @jax.custom_jvp
    def rounded(x):
        return lax.stop_gradient(jnp.round(x))

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0][..., ::-1]))

    @jax.custom_vjp
    def same(x):
        return lax.stop_gradient(x)

    same.defvjp(lambda x: (same(x), None), lambda _, dy: (dy[..., ::-1],))
    with jax.enable_x64(True):
        x, w = jnp.linspace(0, 3, 6).reshape(2, 3), jnp.linspace(1, 2, 15).reshape(3, 5)
        for function in (rounded, same):

            def loss(x, function=function):
                return jnp.sum(
                    function(jnp.concatenate([x[:, :1], lax.stop_gradient(x[:, 1:])], 1)) @ w
                )

            assert_same(jax.grad(skip_dead_gradients(loss))(x), jax.grad(loss)(x))
            assert jax.grad(lambda x, f=function: jnp.sum(f(x) @ w))(x).any()


@pytest.mark.parametrize("resized", ["rule of its own", "bilinear"])
def test_a_linear_function_whose_rule_is_the_function(resized):
    """Its rule has no end; it counts as unknown, so that gradients stay right."""

    @jax.custom_jvp
    def doubled(x):
        return jnp.concatenate([x, 2 * x], 1)

    doubled.defjvp(lambda primals, tangents: (doubled(*primals), doubled(*tangents)))
    bilinear = lambda x: upsample_bilinear(x[:, :, None], 4, 1)[:, :, 0]  # noqa: E731
    function = doubled if resized == "rule of its own" else bilinear

    def loss(x):
        forked = FeatureSurgery(0.5)(x, exit_index=0, num_exits=2)
        return jnp.sum(jnp.tanh(function(forked.to_head) @ w))

    with jax.enable_x64(True):
        x, w = jnp.linspace(0, 3, 16).reshape(2, 2, 4), jnp.linspace(1, 2, 20).reshape(4, 5)
        assert_same(jax.grad(skip_dead_gradients(loss))(x), jax.grad(loss)(x))


def test_products_in_any_order_of_axes():
    equations = ("bc,cd->bd", "dc,bc->bd", "cd,bc->db", "bc,dc->bd", "bc,bcd->bd", "bec,cd->bed")
    with jax.enable_x64(True):
        sizes = {"b": 2, "c": 7, "d": 3, "e": 5}
        rng = np.random.default_rng(0)
        for equation in equations:
            shapes = [[sizes[a] for a in part] for part in equation.split("->")[0].split(",")]
            operands = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]

            def loss(operands, equation=equation):
                cut = [fork(x)[0] if x.shape[-1] == 7 else x for x in operands]
                return jnp.sum(jnp.sin(jnp.einsum(equation, *cut)))

            both = [jax.grad(f) for f in (skip_dead_gradients(loss), loss)]
            assert_same(*(f(operands) for f in both))
            costs = [macs(f, operands) for f in both]
            assert costs[0] < costs[1], equation


STEPS = {
    "conv": lambda x, y, w: lax.conv_general_dilated(
        x,
        jnp.ones((1, 1, x.shape[-1], 7)) * w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "dot": lambda x, y, w: x @ (w * jnp.eye(x.shape[-1])[:, ::-1]),
    "stop": lambda x, y, w: jnp.concatenate([lax.stop_gradient(x[..., :3]), x[..., 3:]], -1),
    "fork": lambda x, y, w: fork(x, 0.5)[1],
    "sum": lambda x, y, w: x + y,
    "product": lambda x, y, w: x * jnp.sin(y),
    "join": lambda x, y, w: jnp.concatenate([y[..., 4:], x[..., 1:5]], -1),
    "pad": lambda x, y, w: jnp.pad(x[..., :5], ((0, 0),) * 3 + ((1, 1),)),
    "relu": lambda x, y, w: nn.relu(x),
    "centred": lambda x, y, w: x - x.mean((0, 1, 2)),
    "scaled": lambda x, y, w: x * w[0, 0],
    "normed": lambda x, y, w: x / (1 + jnp.abs(x).sum(-1, keepdims=True)),
    "rolled": lambda x, y, w: jnp.roll(x, 2, axis=-1),
    "jit": lambda x, y, w: jax.jit(lambda x, y: fork(x + y)[0])(x, y),
    "remat": lambda x, y, w: jax.checkpoint(lambda x: jnp.tanh(fork(x)[1]) @ w)(x),
    "where": lambda x, y, w: jnp.where(y > 0, x, lax.stop_gradient(y)),
    "scan": lambda x, y, w: lax.scan(lambda c, r: (c + fork(r)[0] @ w, c), x[0], x)[1],
}


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))]
)
def test_random_programs_have_the_naive_gradients(seed):
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(list(STEPS), size=12)]

    def loss(params, x):
        values = [x, jnp.cos(x)]
        for name, i, j in zip(names, rng_pairs, rng_pairs[1:], strict=False):
            value = STEPS[name](values[i % len(values)], values[j % len(values)], params)
            values.append(value)
        return sum(jnp.sum(jnp.sin(value)) for value in values[2:])

    with jax.enable_x64(True):
        rng_pairs = rng.integers(-3, 0, size=13).tolist()
        x = jnp.asarray(rng.normal(size=(2, 3, 5, 7)))
        params = jnp.asarray(rng.normal(size=(7, 7)) / 3)
        both = [jax.grad(f, (0, 1)) for f in (skip_dead_gradients(loss), loss)]
        actual, expected = jax.jit(lambda p, x: [f(p, x) for f in both])(params, x)
        assert_same(actual, expected)
        assert macs(both[0], params, x) <= macs(both[1], params, x)


def test_sharding_constraints_stay():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def loss(w, v, x):
        to_trunk = lax.with_sharding_constraint(fork(x @ v)[1], sharding)
        return jnp.sum((to_trunk @ w) ** 2)

    x, v, w = jnp.ones((2, 5)), jnp.ones((5, 7)), jnp.ones((7, 3))
    both = [jax.grad(f, (0, 1)) for f in (skip_dead_gradients(loss), loss)]
    assert_same(*(f(w, v, x) for f in both))
    assert macs(both[0], w, v, x) < macs(both[1], w, v, x)
    assert "sharding_constraint" in str(jax.make_jaxpr(both[0])(w, v, x))


def test_arguments_that_are_no_arrays_stay_what_they_are():
    @skip_dead_gradients
    def function(tree, name, *, train=False, scale=2.0):
        assert name == "a name"
        return {"y": tree["x"] * (scale if train else 1)}, None

    assert function({"x": jnp.asarray(3.0)}, "a name", train=True)[0]["y"] == 6
    assert function({"x": jnp.asarray(3.0)}, name="a name") == ({"y": 3.0}, None)


def test_live_channels_are_joined_cut_and_united():
    shape, low, high = (3, 7), Along(1, ((0, 2),)), Along(1, ((5, 7),))
    assert union([low, high, ()], shape) == Along(1, ((0, 2), (5, 7)))
    assert union([low, None], shape) is None
    assert union([low, Along(0, ((0, 2),))], shape) is None
    assert joined([None, Along(0, ((1, 2),))], [2, 3], 0) == Along(0, ((0, 2), (3, 4)))
    assert joined([Along(1, ((1, 2),)), ()], [2, 3], 0) == Along(0, ((0, 2),))
    assert window(Along(1, ((2, 5),)), 1, 2, 5, 11) is None
    assert window(Along(1, ((2, 5),)), 1, 5, 11, 11) == ()
    assert window(Along(1, ((2, 5),)), 0, 5, 11, 11) == Along(1, ((2, 5),))
