"""The cost of a training step: toys by hand, and the traced program against theory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from dfs_jax.costs.flops import exit_costs
from dfs_jax.costs.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.types import HeadOutput, UserError

CHANNELS, IMAGE_SHAPE = 10, (5, 7, 10)
UNIT = 5 * 7 * 9 * 10 * 10  # a 3x3 convolution of ten channels to ten
LOSS = create_loss("deep_supervision")
PLAIN, DFS = create_fork("plain"), create_fork("dfs")


class Block(nn.Module):
    """A function of one array that creates and runs layers."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


class Toy(MultiExitModel):
    """Blocks made by functions; heads average over positions and have no weights."""

    num_classes: int = CHANNELS
    functions: tuple = ()

    @property
    def num_exits(self):
        return len(self.functions)

    def setup(self):
        for i, function in enumerate(self.functions, start=1):
            setattr(self, f"block{i}", Block(function))

    def block(self, i, carry, *, train):
        return getattr(self, f"block{i + 1}")(carry)

    def head(self, i, x, *, train):
        pooled = x.mean((1, 2)).sum(-1, keepdims=True)
        return HeadOutput(jnp.tile(pooled, self.num_classes), pooled)


conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False)


def layer(x):
    return conv(CHANNELS)(x)


def cost(functions, fork=PLAIN, image_shape=IMAGE_SHAPE, count=theoretical_step_cost, **options):
    return count(Toy(functions=tuple(functions), **options), fork, LOSS, image_shape)


# In theory


@pytest.mark.parametrize(("layers", "speedup"), [(6, 0.172), (13, 0.188)])
def test_equal_layers(layers, speedup):
    plain, forked = (cost([layer] * layers, fork) for fork in (PLAIN, DFS))
    assert plain == (layers * UNIT, layers * UNIT, (layers - 1) * UNIT)
    assert forked.total == UNIT * (3 * layers - 1) - UNIT * (layers - 1) // 2
    assert plain.total / forked.total - 1 == pytest.approx(speedup, abs=6e-4)


@pytest.mark.parametrize(
    ("ratio", "live"), [(0.3, (3, 3)), (0.0, (0, 0)), (1.0, (10, 10)), ((0.2, 0.7), (2, 7))]
)
def test_every_ratio(ratio, live):
    forked = cost([layer] * 3, create_fork("dfs", partition_ratio=ratio))
    assert forked == (3 * UNIT, 3 * UNIT, sum(live) * UNIT // CHANNELS)


def test_vgg7():
    model = create_model("vgg7", num_classes=100)
    plain, forked = (theoretical_step_cost(model, f, LOSS, (32, 32, 3)) for f in (PLAIN, DFS))
    macs = exit_costs(model, (32, 32, 3))[-1].macs
    first = 32 * 32 * 9 * 3 * 64
    assert plain == (macs, macs, macs - first)
    # Heads read their own half of the channels alive, convolutions the other, the last head all.
    assert forked == (macs, macs, (macs - first + 256 * 100) // 2)
    assert plain.total / forked.total == pytest.approx(1.198, abs=6e-4)


@pytest.mark.parametrize(("referencing", "channels"), [("symmetric", 7), ("trunk_only", 10)])
def test_heads_pay_for_what_they_train(referencing, channels):
    model = create_model("vgg7", num_classes=7, width=CHANNELS)
    shares = {}
    for fork in (PLAIN, create_fork("dfs", partition_ratio=0.3, referencing=referencing)):
        shares[fork] = theoretical_step_cost(model, fork, LOSS, (8, 8, 3)).input_gradients
    plain, forked = shares.values()
    convs = [64 * 10 * 10, 16 * 10 * 20, 16 * 20 * 20, 4 * 20 * 40, 4 * 40 * 40]
    heads = 7 * (10 + 10 + 20 + 20 + 40)
    assert plain - forked == 9 * sum(convs) * 7 // 10 + heads * (10 - channels) // 10


def dense_layer(x):
    return jnp.concatenate([x, conv(5)(x)], axis=-1)


def test_dead_channels_stay_dead_in_concatenations():
    # Block 2 reads 10 channels, 5 alive, as its first layer, and 15, 10 alive, as its second; then
    # 20 channels are forked, of which the first ten are shared, and five of them are dead.
    def block(x):
        return dense_layer(dense_layer(x))

    plain, forked = (cost([layer, block, layer], f) for f in (PLAIN, DFS))
    tap = 5 * 7 * 9
    inputs = {"plain": 10 * 5 + 15 * 5 + 20 * 10, "forked": 5 * 5 + 10 * 5 + 5 * 10}
    assert plain.input_gradients == tap * inputs["plain"]
    assert forked.input_gradients == tap * inputs["forked"]


@pytest.mark.parametrize(
    ("between", "alive"),
    [
        (lambda x: x, 5),
        (lambda x: nn.max_pool(x, (1, 1), (1, 1)), 5),
        (lambda x: nn.avg_pool(nn.relu(x) * 3 - 1, (3, 3), padding="SAME"), 5),
        (lambda x: x.reshape(-1, 35, 10)[:, :, None].reshape(x.shape), 5),
        (lambda x: x + x.sum((1, 2), keepdims=True), 5),
        (lambda x: jax.jit(lambda y: y.astype(jnp.bfloat16).astype(y.dtype))(x), 5),
        (lambda x: nn.BatchNorm(use_running_average=True)(x), 10),  # scales and shifts are trained
        (lambda x: nn.LayerNorm(use_bias=False, use_scale=False)(x), 10),  # mixes channels
        (lambda x: x * nn.softmax(x), 10),
        (lambda x: jnp.flip(x, -1), 10),  # nothing is known of it, so nothing is saved
        (lax.stop_gradient, 0),
        (lambda x: jnp.round(x).astype(int).astype(float), 0),
    ],
)
def test_what_lies_between_a_fork_and_a_layer(between, alive):
    forked = cost([layer, lambda x: layer(between(x))], DFS)
    assert forked.input_gradients == alive * UNIT // CHANNELS


def test_what_no_exit_depends_on_has_no_gradient():
    def wasteful(x):
        layer(x)
        return layer(x)

    assert cost([wasteful, wasteful]) == (4 * UNIT, 2 * UNIT, UNIT)


def test_frozen_layers_cost_their_forward_pass():
    assert cost([lambda x: lax.stop_gradient(layer(x)), layer]) == (2 * UNIT, UNIT, 0)


# Traced


def attention(x):
    tokens = x.reshape(-1, 35, 2, 5)
    return nn.dot_product_attention(tokens, tokens, tokens).reshape(x.shape)


def resize(x):
    return jax.image.resize(x, (len(x), 11, 13, x.shape[-1]), "bilinear")


MIXED = [
    (layer, layer),
    (lambda x: conv(6, strides=2)(x), lambda x: conv(CHANNELS, strides=2)(x)),
    (layer, lambda x: nn.Conv(CHANNELS, (2, 3), padding="VALID")(x)),
    (layer, lambda x: conv(20, feature_group_count=10)(x)[..., :10]),
    (layer, lambda x: nn.Conv(CHANNELS, (3, 3), padding=2, kernel_dilation=2)(x)),
    (layer, lambda x: nn.Dense(CHANNELS)(nn.gelu(nn.Dense(3)(x)))),
    (layer, attention),
    (layer, nn.remat(Block)(layer)),
    (layer, lambda x: layer(resize(x))),
]


@pytest.mark.parametrize("functions", MIXED)
def test_a_plain_network_costs_in_theory_what_jax_makes_of_it(functions):
    traced, theory = (
        cost(functions, count=count) for count in (traced_step_cost, theoretical_step_cost)
    )
    assert traced == theory


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("vgg7", {}, "deep_supervision"),
        ("vgg7", {}, "byot"),
        ("resnet18", {"stage_sizes": (1, 2)}, "byot"),
        pytest.param(
            "msdnet",
            {"num_exits": 2, "base": 2, "step": 1},
            "deep_supervision",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_whole_networks(name, options, loss):
    model = create_model(name, num_classes=7, adapt_features=loss == "byot", **options)
    arguments = model, PLAIN, create_loss(loss), (32, 32, 3)
    traced, theory = traced_step_cost(*arguments), theoretical_step_cost(*arguments)
    assert traced == theory
    at_the_last_exit = exit_costs(model, (32, 32, 3))[-1].macs
    adaptation_layers = traced.forward - at_the_last_exit
    assert (adaptation_layers > 0) == (loss == "byot")


def split_layer(x):
    """A convolution that is told which channels are alive: two, of which one needs no gradient."""
    shared, rest = x[..., :5], x[..., 5:]
    return conv(CHANNELS)(shared) + conv(CHANNELS)(lax.stop_gradient(rest))


@pytest.mark.parametrize("cheaper_layer", [split_layer, layer])
def test_what_a_layer_saves_shows_in_the_traced_step(cheaper_layer):
    functions = (layer, cheaper_layer, cheaper_layer)
    cheaper = cost(functions, DFS, count=traced_step_cost)
    assert cheaper == cost([layer] * 3, DFS) == (3 * UNIT, 3 * UNIT, UNIT)
    assert cost(functions, DFS) == cheaper


def test_the_naive_graph_computes_the_whole_gradient_and_cuts_it_afterwards():
    naive = cost([layer] * 3, DFS, count=traced_step_cost, partitioned_backward=False)
    assert naive == (3 * UNIT, 3 * UNIT, 2 * UNIT)


def test_steps_count_one_image_and_plain_numbers():
    traced = cost([layer, layer], count=traced_step_cost)
    assert [type(count) for count in traced] == [int] * 3
    assert traced.total == sum(traced) == 5 * UNIT
    assert type(cost([layer, layer], DFS).total) is int


@pytest.mark.parametrize("count", [traced_step_cost, theoretical_step_cost])
def test_what_cannot_be_counted_is_refused(count):
    with pytest.raises(UserError, match="too small"):
        count(create_model("vgg7", num_classes=10, width=2), PLAIN, LOSS, (4, 4, 3))

    def endless(x):
        kernel = lax.stop_gradient(jnp.eye(CHANNELS) + x[0, 0, 0, 0])
        return lax.stop_gradient(
            lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ kernel, layer(x))
        )

    with pytest.raises(ValueError, match="no fixed length"):
        cost([endless], count=count)
