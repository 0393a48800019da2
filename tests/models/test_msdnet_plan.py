"""MSDNet's layout by hand, and the arguments that make none."""

from __future__ import annotations

import pytest

from dfs_jax.models import create_model
from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.msdnet_plan import (
    Bottleneck,
    ScaleGrowth,
    ScaleMix,
    Transition,
    block_sizes,
    kept_scales,
    transition_layers,
)
from dfs_jax.types import UserError
from tests.support.msdnet_reference import small


def steps_of(model):
    return [step for block in model.plan for step in block.steps]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((7, 4, 2, "even"), (4, 2, 2, 2, 2, 2, 2)),
        ((5, 4, 4, "even"), (4, 4, 4, 4, 4)),
        ((5, 1, 1, "lin_grow"), (1, 2, 3, 4, 5)),
        ((3, 5, 2, "lin_grow"), (5, 3, 5)),
        ((1, 3, 0, "even"), (3,)),
    ],
)
def test_layers_in_each_block(arguments, sizes):
    assert block_sizes(*arguments) == sizes


@pytest.mark.parametrize(
    ("layers", "scales", "prune", "kept", "reduced"),
    [
        (16, 3, "max", (3,) * 6 + (2,) * 6 + (1,) * 4, {7, 13}),  # CIFAR: ceil(16 / 3) = 6
        (20, 4, "max", (4,) * 5 + (3,) * 5 + (2,) * 5 + (1,) * 5, {6, 11, 16}),  # ImageNet
        (2, 3, "max", (3, 2), {2}),
        (16, 3, "min", (3,) * 14 + (2, 1), {5, 10}),
        (7, 4, "min", (4, 4, 4, 4, 3, 2, 1), {2, 4}),
        (3, 4, "min", (3, 2, 1), {1, 2}),
    ],
)
def test_dropped_scales_and_transitions(layers, scales, prune, kept, reduced):
    assert kept_scales(layers, scales, prune) == kept
    assert transition_layers(kept, scales, prune) - {0} == reduced


def test_cifar100_layers_by_hand():
    plan = create_model("msdnet_cifar100", num_classes=100).plan
    assert plan[0].first == (16, 32, 64)
    assert plan[1].first == ()
    assert plan[0].steps[0].name == "layer1"
    assert plan[0].steps[0].scales == (
        ScaleGrowth(1, 16, None, Bottleneck(16, 16)),
        ScaleGrowth(2, 32, Bottleneck(16, 16), Bottleneck(32, 16)),
        ScaleGrowth(3, 64, Bottleneck(32, 32), Bottleneck(64, 32)),
    )
    # Layer 7 still reads the scale that it drops; the transition follows in the same block.
    seventh, transition, eighth = plan[2].steps
    assert seventh.scales == (
        ScaleGrowth(2, 224, Bottleneck(16, 16), Bottleneck(32, 16)),
        ScaleGrowth(3, 448, Bottleneck(64, 32), Bottleneck(128, 32)),
    )
    assert transition == Transition("transition7", (ScaleMix(2, 256, 128), ScaleMix(3, 512, 256)))
    assert eighth.scales[0] == ScaleGrowth(2, 128, None, Bottleneck(64, 32))
    assert plan[6].steps[-1].scales == (ScaleGrowth(3, 448, None, Bottleneck(256, 64)),)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("msdnet", (320, 448, 320, 448, 576, 384, 512)),
        ("msdnet_cifar100", (320, 448, 320, 448, 576, 384, 512)),
        ("msdnet_imagenet", (384, 384, 352, 304, 560)),
        # Widths 40 52 70->35 47 59 65->32, 38 50: rounded down before they are multiplied by 4.
        ("msdnet_cifar_anytime", (160, 208, 140, 188, 236, 152, 200)),
        # 22 34 52->26, 50 62->31 37 43 49 61->...
        ("msdnet_cifar_budgeted", (88, 136, 104, 200, 208)),
    ],
)
def test_features_at_the_exits(name, features):
    model = create_model(name, num_classes=10)
    assert tuple(block.features for block in model.plan) == features
    assert model.num_exits == len(features)


def test_without_reduction_there_are_no_transitions():
    model = small(reduction=0.0)
    assert not any(isinstance(step, Transition) for step in steps_of(model))
    assert [block.features for block in model.plan] == [28, 44, 60, 76]


def test_a_scale_factor_may_be_a_fraction_where_widths_stay_whole():
    model = small(initial_channels=4, growth=4, scale_factors=(1, 1.5), bottleneck_factors=(1, 2))
    assert model.plan[0].first == (4, 6)
    assert [step.scales[-1].features for step in model.plan[0].steps] == [12, 18]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "num_exits 4 are more exits than the 2 layers of base 2 and step 0"),
        ({"base": 0}, "more exits than the 6 layers of base 0"),
        ({"num_exits": 0}, "num_exits must be a whole number of at least 1, got 0"),
        ({"base": 2.5}, "base must be a whole number of at least 0, got 2.5"),
        ({"step": True}, "step must be a whole number of at least 0, got True"),
        ({"initial_channels": -3}, "initial_channels must be .* at least 1, got -3"),
        ({"growth": 0}, "growth must be a whole number of at least 1, got 0"),
        ({"growth": 3, "scale_factors": (1, 1, 2)}, r"scale 2 grows by growth 3 x scale factor 1"),
        ({"scale_factors": (1, 1.5, 4)}, "width of 3 times the scale factor 1.5 is 4.5, no whole"),
        (
            {"initial_channels": 4, "growth": 3, "scale_factors": (1, 0.5, 4)},
            "growth 3 times the scale factor 0.5 is 1.5, no whole number of channels",
        ),
        ({"scale_factors": (1, 2)}, r"one number for each scale, got \(1, 2\) and \(1, 2, 4\)"),
        ({"scale_factors": (), "bottleneck_factors": ()}, "one number for each scale"),
        ({"scale_factors": (1, -2, 4)}, r"must be numbers above 0, got \(1, -2, 4\)"),
        ({"bottleneck_factors": (1, 0, 4)}, "each of bottleneck_factors must be .*, got 0"),
        ({"prune": "mean"}, "prune must be one of max, min, got 'mean'"),
        ({"step_mode": "odd"}, "step_mode must be one of even, lin_grow, got 'odd'"),
        ({"stem": "mnist"}, "stem must be one of cifar, imagenet, got 'mnist'"),
        ({"reduction": 1.5}, r"reduction must lie in \[0, 1\], got 1.5"),
        ({"reduction": 0.01}, "reduction 0.01 leaves nothing of the width 11 after layer 4"),
        ({"head_dropout": 1.0}, r"head_dropout must lie in \[0, 1\), got 1.0"),
        ({"head_channels": 0}, "head_channels must be a whole number of at least 1, got 0"),
        (
            {"prune": "min", "num_exits": 1, "base": 1},
            "prune 'min' drops one scale a layer and so needs at least 2 layers for 3 scales",
        ),
    ],
)
def test_arguments_that_cannot_be_are_told_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match=r"unknown model 'msdnet_cifar1000': choose one of .*msdne"):
        create_model("msdnet_cifar1000", num_classes=3)


def test_configs_may_give_lists():
    model = small(scale_factors=[1, 2, 4], bottleneck_factors=[1, 2, 4])
    assert model == small()
    assert isinstance(model, MSDNet)
