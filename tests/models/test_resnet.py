"""ResNet: parameters and operations by hand, features at the forks, bad input."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.costs.flops import exit_costs
from dfs_jax.forks import create_fork
from dfs_jax.models import MODELS, create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.types import UserError
from tests.support.marks import slow


def variable_shapes(model, image_shape):
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Parameters and operations


class Family(NamedTuple):
    """What He et al. and torchvision say: blocks, and the whole of the ImageNet network."""

    blocks: tuple[int, ...]
    bottleneck: bool
    imagenet_params: int
    imagenet_gmacs: float


MODEL_ROWS = {
    "resnet18": Family((2, 2, 2, 2), False, 11_689_512, 1.814),
    "resnet34": Family((3, 4, 6, 3), False, 21_797_672, 3.664),
    "resnet50": Family((3, 4, 6, 3), True, 25_557_032, 4.089),
    "resnet101": Family((3, 4, 23, 3), True, 44_549_160, 7.801),
    "resnet152": Family((3, 8, 36, 3), True, 60_192_808, 11.514),
}


def test_every_resnet_has_its_row():
    assert MODEL_ROWS.keys() == {name for name in MODELS.table if name.startswith("resnet")}


def conv_norm(c_in, c_out, kernel=3):
    return kernel * kernel * c_in * c_out + 2 * c_out


def separable(c_in, c_out):
    return 9 * c_in + conv_norm(c_in, c_in, 1) + 9 * c_in + conv_norm(c_in, c_out, 1)


def params_by_hand(family, width, classes):
    """Parameters up to each exit, heads passed included, with the CIFAR stem."""
    total, c_in, counts = conv_norm(3, width), width, []
    c_last = 8 * width * (4 if family.bottleneck else 1)
    for s, blocks in enumerate(family.blocks):
        c = width * 2**s
        c_out = 4 * c if family.bottleneck else c
        for _ in range(blocks):
            if family.bottleneck:
                total += conv_norm(c_in, c, 1) + conv_norm(c, c) + conv_norm(c, c_out, 1)
            else:
                total += conv_norm(c_in, c) + conv_norm(c, c)
            total += conv_norm(c_in, c_out, 1) if c_in != c_out else 0
            c_in = c_out
        if s < 3:
            total += separable(c_out, c_out) + 2 * c_out
        for j in range(3 - s):
            total += separable(c_out * 2**j, 2 * c_out * 2**j)
        total += (c_last + 1) * classes
        counts.append(total)
    return counts


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet101")) for name in MODEL_ROWS],
)
@pytest.mark.parametrize(("width", "classes"), [(64, 100), (3, 7)])
def test_parameters_of_each_exit_by_hand(name, width, classes):
    model = create_model(name, num_classes=classes, width=width)
    params = variable_shapes(model, (32, 32, 3))["params"]
    counts = [count([params[f"block{i}"], params[f"head{i}"]]) for i in range(1, 5)]
    assert np.cumsum(counts).tolist() == params_by_hand(MODEL_ROWS[name], width, classes)


@pytest.mark.parametrize("name", slow(MODEL_ROWS, "resnet34", "resnet50", "resnet101", "resnet152"))
def test_trunk_and_last_classifier_are_the_imagenet_network(name):
    row = MODEL_ROWS[name]
    model = create_model(name, num_classes=1000, stem="imagenet")
    params = variable_shapes(model, (224, 224, 3))["params"]
    whole = [params[f"block{i}"] for i in range(1, 5)] + [params["head4"]]
    assert count(whole) == row.imagenet_params
    macs = exit_costs(model, (224, 224, 3))[-1].macs_without_earlier_heads
    assert round(macs / 1e9, 3) == row.imagenet_gmacs


def test_costs_of_resnet18_as_published():
    costs = exit_costs(create_model("resnet18", num_classes=100), (32, 32, 3))
    assert [cost.params for cost in costs] == [479_652, 1_347_336, 3_838_316, 12_283_344]
    assert [round(cost.macs / 1e6, 2) for cost in costs] == [165.16, 308.19, 447.85, 582.12]
    alone = [round(cost.macs_without_earlier_heads / 1e6, 2) for cost in costs]
    assert alone == [165.16, 295.79, 426.64, 555.47]


def test_adaptation_layers_are_as_wide_as_the_last_feature():
    for name, width in (("resnet18", 24), ("resnet50", 96)):
        model = create_model(name, num_classes=7, width=3, adapt_features=True)
        params = variable_shapes(model, (8, 8, 3))["params"]
        shapes = [params[f"head{i}"]["pooled"]["adaptation"]["kernel"].shape for i in (1, 2, 3)]
        assert shapes == [(width, width)] * 3
        assert "adaptation" not in params["head4"]


@pytest.mark.parametrize(
    ("stem", "image", "sides"),
    [
        ("cifar", (32, 48), [(32, 48), (16, 24), (8, 12), (4, 6)]),
        ("cifar", (11, 13), [(11, 13), (6, 7), (3, 4), (2, 2)]),
        ("imagenet", (224, 160), [(56, 40), (28, 20), (14, 10), (7, 5)]),
    ],
)
def test_features_at_the_forks(stem, image, sides):
    model = create_model("resnet50", num_classes=7, width=3, stem=stem)
    seen = {}

    def note(x, *, exit_index, num_exits):
        seen[exit_index] = x.shape
        return create_fork("plain")(x, exit_index=exit_index, num_exits=num_exits)

    images = jnp.zeros((2, *image, 3))
    jax.eval_shape(lambda key: model.init(key, images, note), jax.random.key(0))
    assert seen == {s: (2, *side, 12 * 2**s) for s, side in enumerate(sides)}


# Bad input


@pytest.mark.parametrize("width", [0, -3, 2.5, True, "wide"])
def test_a_width_that_is_no_positive_whole_number_is_refused(width):
    with pytest.raises(UserError, match=f"whole number of at least 1, got {width!r}"):
        create_model("resnet18", num_classes=7, width=width)


def test_an_unknown_stem_is_refused():
    with pytest.raises(UserError, match="stem must be one of cifar, imagenet, got 'vgg'"):
        create_model("resnet50", num_classes=7, stem="vgg")


@pytest.mark.parametrize(
    ("stem", "shape", "needed"),
    [("cifar", (7, 32, 3), 8), ("cifar", (32, 7, 3), 8), ("imagenet", (31, 32, 3), 32)],
)
def test_images_too_small_for_the_stages_are_refused(stem, shape, needed):
    model = create_model("resnet18", num_classes=7, width=3, stem=stem)
    message = f"{shape[0]}x{shape[1]} are too small .*{stem} stem.* at least {needed} pixels"
    with pytest.raises(UserError, match=message):
        variable_shapes(model, shape)
    variable_shapes(model, (needed, needed, 3))
