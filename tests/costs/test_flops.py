"""Costs of the exits: VGG7 by hand, every kind of inner jaxpr, and what must not count."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from dfs_jax.costs.flops import (
    LITERATURE_FLOPS,
    MULTIPLY_ADDS,
    ExitCost,
    count_by,
    count_operations,
    exit_costs,
)
from dfs_jax.models import MODELS, create_model
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.tracing.traced import Kind, TracedProgram
from dfs_jax.types import HeadOutput, UserError
from tests.support.marks import slow


def count(function, *shapes):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_operations(jax.make_jaxpr(function)(*inputs))


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


# VGG7 on 32x32x3 with c channels: (side, channels in, channels out) of the six convolutions. A
# convolution costs side^2 * 9 * in * out; a head reads `out` channels and has no bias.
def vgg7_layers(c):
    first, second = [(32, 3, c), (32, c, c)], [(16, c, 2 * c), (16, 2 * c, 2 * c)]
    return [*first, *second, (8, 2 * c, 4 * c), (8, 4 * c, 4 * c)]


@pytest.mark.parametrize(
    ("width", "classes", "first_and_last"),
    [
        (64, 100, ((8_320, 1_775_872), (1_235_968, 152_854_016))),
        (16, 10, ((640, 442_528), (74_560, 9_881_792))),
    ],
)
def test_vgg7_by_hand(width, classes, first_and_last):
    got = exit_costs(create_model("vgg7", num_classes=classes, width=width), (32, 32, 3))
    params, trunk, heads, others = width, 0, 0, 0  # the first convolution's bias
    for i, (side, c_in, c_out) in enumerate(vgg7_layers(width)):
        params += 9 * c_in * c_out + 2 * c_out + c_out * classes  # convolution, norm, head
        trunk += side * side * 9 * c_in * c_out
        heads += c_out * classes
        # ReLU, the 2x2 max-pool (4 operations for each of a quarter of the positions), which comes
        # after every second convolution, and the average over all positions that are left.
        others += side * side * c_out + (side * side * c_out if i % 2 else 0)
        others += (side // 2 if i % 2 else side) ** 2 * c_out
        assert got[i] == ExitCost(
            exit=i + 1,
            params=params,
            macs=trunk + heads,
            literature_flops=trunk + heads + others,
            macs_without_earlier_heads=trunk + c_out * classes,
        )
    assert (got[0][1:3], got[-1][1:3]) == first_and_last


def test_parameters_are_the_initialised_ones():
    model = create_model("vgg7", num_classes=7, width=3)
    params = init_variables(model, jax.random.key(0), (8, 8, 3))["params"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert exit_costs(model, (8, 8, 3))[-1].params == total


def test_adaptation_layers_are_left_out():
    plain = create_model("vgg7", num_classes=7, width=3)
    adapting = create_model("vgg7", num_classes=7, width=3, adapt_features=True)
    assert exit_costs(adapting, (8, 8, 3)) == exit_costs(plain, (8, 8, 3))


def test_counts_are_plain_numbers():
    cost = exit_costs(create_model("vgg7", num_classes=7, width=3), (8, 8, 3))[0]
    assert [type(value) for value in cost] == [int] * 5


def test_nothing_is_executed():
    # These weights would take some 20 PB.
    macs = exit_costs(create_model("vgg7", num_classes=10, width=2**22), (32, 32, 3))[-1].macs
    assert macs > 2**59


def test_images_that_the_model_refuses():
    with pytest.raises(UserError, match="too small"):
        exit_costs(create_model("vgg7", num_classes=10, width=2), (4, 4, 3))


cached_costs = functools.cache(exit_costs)  # some names are of one model


def costs_of(name):
    row = MODEL_ROWS[name]
    return cached_costs(create_model(name, num_classes=row.classes), (row.side, row.side, 3))


class Row(NamedTuple):
    classes: int
    side: int
    params: tuple[int, ...]  # up to each exit, the heads passed on the way included


MSDNET = Row(100, 32, (898_996, 1_835_992, 2_797_212, 3_758_208, 4_915_812, 6_102_472, 7_362_348))
# At their usual sizes.
MODEL_ROWS = {
    "msdnet": MSDNET,
    "msdnet_cifar100": MSDNET,
    "msdnet_cifar_anytime": Row(
        100, 32, (433_876, 876_792, 1_274_952, 1_695_548, 2_178_352, 2_603_252, 3_067_960)
    ),
    "msdnet_cifar_budgeted": Row(100, 32, (299_704, 649_740, 1_018_308, 1_492_424, 2_078_924)),
    "msdnet_imagenet": Row(1000, 224, (4_238_504, 8_772_240, 13_073_272, 16_748_416, 23_958_440)),
    "resnet101": Row(100, 32, (4_731_556, 10_661_640, 42_249_068, 57_418_704)),
    "resnet152": Row(100, 32, (4_731_556, 11_781_896, 57_892_716, 73_062_352)),
    "resnet18": Row(100, 32, (479_652, 1_347_336, 3_838_316, 12_283_344)),
    "resnet34": Row(100, 32, (553_636, 2_012_168, 9_225_836, 22_391_504)),
    "resnet50": Row(100, 32, (4_731_556, 10_661_640, 23_256_940, 38_426_576)),
    "vgg16": Row(
        1000,
        224,
        (
            *(65_920, 166_912, 368_896, 644_608, 1_196_032, 2_042_368, 2_888_704),
            *(4_581_376, 7_453_696, 10_326_016, 13_198_336, 16_070_656, 18_942_976),
        ),
    ),
    "vgg7": Row(100, 32, (8_320, 51_712, 138_496, 299_008, 620_032, 1_235_968)),
    "vit_base": Row(
        1000,
        224,
        (44_040_424, 51_898_832, 59_757_240, 67_615_648, 75_474_056, 83_332_464, 91_190_872),
    ),
    "vit_small": Row(
        1000,
        224,
        (11_403_880, 13_564_112, 15_724_344, 17_884_576, 20_044_808, 22_205_040, 24_365_272),
    ),
    "vit_tiny": Row(
        1000, 224, (3_048_232, 3_686_480, 4_324_728, 4_962_976, 5_601_224, 6_239_472, 6_877_720)
    ),
}
# What was published, or counted from what was published, in millions for each exit.
PUBLISHED = {
    "msdnet_cifar100": {
        "params": (0.90, 1.84, 2.80, 3.76, 4.92, 6.10, 7.36),
        "literature_flops": (56.43, 101.00, 155.31, 198.10, 249.53, 298.05, 340.64),
    },
    "msdnet_imagenet": {
        "params": (4.24, 8.77, 13.07, 16.75, 23.96),
        "literature_flops": (339.90, 685.46, 1008.16, 1254.47, 1360.53),
    },
    "resnet18": {
        "params": (0.48, 1.35, 3.84, 12.28),
        "macs": (165.16, 308.19, 447.85, 582.12),
        "macs_without_earlier_heads": (165.16, 295.79, 426.64, 555.47),
    },
}


@pytest.mark.parametrize(
    "name",
    slow(
        MODEL_ROWS,
        "resnet34",
        "msdnet",
        "resnet50",
        "resnet101",
        "resnet152",
        "msdnet_cifar100",
        "msdnet_imagenet",
        "msdnet_cifar_anytime",
        "msdnet_cifar_budgeted",
    ),
)
def test_parameters_of_every_model_at_every_exit(name):
    assert tuple(cost.params for cost in costs_of(name)) == MODEL_ROWS[name].params


def test_every_model_has_its_row():
    assert MODEL_ROWS.keys() == MODELS.table.keys()


@pytest.mark.parametrize("name", slow(PUBLISHED, "msdnet_imagenet"))
def test_published_counts_to_the_printed_digits(name):
    for field, published in PUBLISHED[name].items():
        ours = tuple(round(getattr(cost, field) / 1e6, 2) for cost in costs_of(name))
        assert ours == published


class TwoScales(MultiExitModel):
    """A carry of two scales, of which heads read one; nothing ever reads the other."""

    @property
    def num_exits(self):
        return 2

    def setup(self):
        self.block1, self.block2 = nn.Dense(11, use_bias=False), nn.Dense(13, use_bias=False)
        self.head1, self.head2 = nn.Dense(self.num_classes), nn.Dense(self.num_classes)

    def block(self, i, carry, *, train):
        if i == 0:
            flat = carry.reshape(1, -1)
            return {"unused": self.block1(flat), "read": self.block1(flat)}
        return {"read": self.block2(carry["read"])}

    def feature(self, carry):
        return carry["read"]

    def with_feature(self, carry, x):
        return carry | {"read": x}

    def head(self, i, x, *, train):
        return HeadOutput((self.head1 if i == 0 else self.head2)(x), x)


def test_what_an_exit_does_not_need_counts_too():
    first, second = exit_costs(TwoScales(num_classes=5), (2, 3, 1))
    assert first.macs == 2 * 6 * 11 + 11 * 5
    assert second.macs == first.macs + 11 * 13 + 13 * 5
    assert first.params == 6 * 11 + 11 * 5 + 5
    assert second.params == first.params + 11 * 13 + 13 * 5 + 5


class Astray(TwoScales):
    """A model with a parameter outside its blocks and heads."""

    def setup(self):
        super().setup()
        self.stem = self.param("stem", nn.initializers.zeros_init(), (3,))


def test_parameters_outside_blocks_and_heads_are_refused():
    with pytest.raises(ValueError, match="stem"):
        exit_costs(Astray(num_classes=5), (2, 3, 1))


@pytest.mark.parametrize(
    ("options", "kernel", "expected"),
    [
        ({}, (3, 3, 5, 7), 11 * 13 * 7 * 9 * 5),
        ({"padding": [(1, 1), (1, 1)], "window_strides": (2, 2)}, (3, 3, 5, 7), 6 * 7 * 7 * 9 * 5),
        ({"padding": "VALID"}, (2, 3, 5, 7), 10 * 11 * 7 * 6 * 5),
        ({"feature_group_count": 5}, (3, 3, 1, 5), 11 * 13 * 5 * 9),  # depthwise
        ({"feature_group_count": 5}, (3, 3, 1, 10), 11 * 13 * 10 * 9),
        ({"rhs_dilation": (2, 2)}, (3, 3, 5, 7), 11 * 13 * 7 * 9 * 5),
    ],
)
def test_convolutions_by_hand(options, kernel, expected):
    assert count(lambda x, k: conv(x, k, **options), (1, 11, 13, 5), kernel) == expected


def test_gradients_of_a_convolution_cost_what_it_costs():
    def forward(x, k):
        return conv(x, k, padding=[(1, 1), (1, 1)], window_strides=(2, 2))

    def backward(x, k, y):
        return jax.vjp(forward, x, k)[1](y)

    # Input gradients are convolutions over dilated inputs: the zeros in between do not count.
    shapes = (3, 8, 12, 5), (3, 3, 5, 7)
    once = count(forward, *shapes)
    assert once == 3 * 4 * 6 * 7 * 9 * 5
    assert count(backward, *shapes, (3, 4, 6, 7)) == 3 * once


def test_matrix_products_by_hand():
    assert count(lambda a, b: a @ b, (2, 3), (3, 5)) == 2 * 3 * 5
    batched = count(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (2, 3, 5, 7), (2, 11, 5, 7))
    assert batched == 2 * 3 * 5 * 7 * 11
    assert count(lambda a, b: jnp.outer(a, b) + jnp.sum(a), (3,), (5,)) == 0  # no product by layer


class Layers(nn.Module):
    """One function of a batch of one as a model's part, so that its weights are weights."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def literature(function, *shape):
    """What the rules count beyond multiply-adds."""
    images = jnp.zeros((1, *shape))
    variables = jax.eval_shape(Layers(function).init, jax.random.key(0), images)
    program = jax.make_jaxpr(Layers(function).apply)(variables, images)
    weights = [Kind.WEIGHT] * len(jax.tree.leaves(variables))
    traced = TracedProgram(program, [*weights, Kind.ACTIVATION])
    return count_by(traced, LITERATURE_FLOPS) - count_by(traced, MULTIPLY_ADDS)


def residual_dense(x):
    return x + nn.Dense(7, use_bias=False)(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.relu, 5 * 3 * 7),
        (lambda x: jnp.maximum(0.0, x), 5 * 3 * 7),
        (lambda x: jax.jit(nn.relu)(x) + nn.relu(x[..., :2]).sum(), 5 * 3 * 7 + 5 * 3 * 2),
        (lambda x: jnp.maximum(x, jnp.zeros_like(x)), 5 * 3 * 7),
        (lambda x: jnp.maximum(x, 1.0), 0),
        (nn.gelu, 0),
        (nn.softmax, 0),
        (nn.sigmoid, 0),
        (nn.LayerNorm(), 0),  # its variance is clipped at zero
        (nn.Conv(2, (3, 3), use_bias=True), 0),
        (nn.Dense(2), 5 * 3 * 2),
        (nn.Dense(2, use_bias=False), 0),
        (nn.DenseGeneral((2, 3), axis=-1), 5 * 3 * 2 * 3),
        (residual_dense, 0),
        (lambda x: nn.Dense(2)(nn.Dense(3)(x)), 5 * 3 * (2 + 3)),
        (lambda x: nn.BatchNorm(use_running_average=True)(nn.Dense(2, use_bias=False)(x)), 0),
        (lambda x: nn.max_pool(x, (2, 3), (1, 1)), 4 * 1 * 7 * 6),
        (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), 2 * 1 * 7 * 4),
        (lambda x: nn.avg_pool(x, (2, 2), (2, 2), count_include_pad=False), 2 * 1 * 7 * 4),
        (lambda x: x.mean((1, 2)), 5 * 3 * 7),
        (lambda x: x.max((1, 2)), 5 * 3 * 7),
        (lambda x: x.reshape(1, 15, 7).mean(1), 5 * 3 * 7),
        (lambda x: x.mean(-1), 0),
        (lambda x: nn.Dense(2)(nn.relu(x).mean((1, 2))), 5 * 3 * 7 * 2 + 2),
        (lambda x: jax.image.resize(x, (1, 10, 6, 7), "bilinear"), 0),
    ],
)
def test_what_else_the_literature_counts(function, expected):
    assert literature(function, 5, 3, 7) == expected


def matmul(a):
    return a @ a


@jax.custom_vjp
def custom_gradient(a):
    return a @ a


custom_gradient.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a.T + a.T @ g,))


@jax.custom_jvp
def custom_tangent(a):
    return a @ a


custom_tangent.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (matmul, 1),
        (jax.jit(matmul), 1),
        (jax.jit(lambda a: jax.jit(matmul)(jax.jit(matmul)(a))), 2),
        (jax.checkpoint(matmul), 1),
        (custom_gradient, 1),
        (custom_tangent, 1),
        (jax.jit(jax.checkpoint(custom_gradient)), 1),
        (jax.grad(lambda a: (custom_gradient(a) ** 2).sum()), 3),
        (lambda a: lax.scan(lambda c, _: (custom_gradient(c), None), a, length=7)[0], 7),
        (lambda a: lax.fori_loop(0, 7, lambda _, c: c @ c, a), 7),
        (lambda a: lax.cond(a[0, 0] > 0, lambda b: b @ b @ b, matmul, a), 2),
        (lambda a: lax.switch(2, [lambda b: b, matmul, lambda b: b @ b @ b @ b], a), 3),
        (lambda a: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c - 1, a) @ a, 1),
    ],
)
def test_inner_programs(function, products):
    assert count(function, (3, 3)) == products * 27


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="no fixed length"):
        count(lambda a: lax.while_loop(lambda c: c[0, 0] > 0, matmul, a), (3, 3))


def test_products_with_constants_are_no_layers():
    # Bilinear resizing multiplies by matrices that depend on no input, also under jit.
    assert count(lambda x: jax.image.resize(x, (1, 8, 8, 3), "bilinear"), (1, 4, 4, 3)) == 0
    # Cutting patches is a convolution with a constant kernel.
    patches = lambda x: lax.conv_general_dilated_patches(x, (2, 2), (2, 2), "VALID")  # noqa: E731
    assert count(patches, (1, 3, 4, 4)) == 0
    # What comes after, on real operands, counts; so does a carry that only comes to depend on them.
    resized = lambda x, k: conv(jax.image.resize(x, (1, 8, 8, 3), "bilinear"), k)  # noqa: E731
    assert count(resized, (1, 4, 4, 3), (1, 1, 3, 5)) == 64 * 15
    grown = lambda a: lax.scan(lambda c, _: (c + a, a @ c), jnp.zeros((3, 3)), length=5)  # noqa: E731
    assert count(grown, (3, 3)) == 5 * 27
