"""Costs of the exits of every model: VGG7 by hand, the others as published."""

import functools
from typing import NamedTuple

import jax
import pytest
from flax import linen as nn

from dfs_jax.costs.flops import (
    ExitCost,
    exit_costs,
)
from dfs_jax.models import MODELS, create_model
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.types import HeadOutput, UserError
from tests.support.marks import slow


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
            published_macs=trunk + heads,
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
    assert [type(value) for value in cost] == [int] * 6


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
    "efficientnet_lite0": Row(1000, 224, (590_008, 1_343_472, 2_361_624, 6_312_864)),
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
            flat = carry.reshape(len(carry), -1)
            return {"unused": self.block1(flat), "read": self.block1(flat)}
        return {"read": self.block2(carry["read"])}

    def feature(self, carry):
        return carry["read"]

    def with_feature(self, carry, x):
        return carry | {"read": x}

    def head(self, i, x, *, train):
        return HeadOutput((self.head1 if i == 0 else self.head2)(x), x)


def test_what_an_exit_does_not_need_counts_in_published_macs():
    first, second = exit_costs(TwoScales(num_classes=5), (2, 3, 1))
    assert (first.published_macs, first.macs) == (2 * 6 * 11 + 11 * 5, 6 * 11 + 11 * 5)
    assert second.published_macs == first.published_macs + 11 * 13 + 13 * 5
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
