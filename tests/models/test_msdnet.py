"""MSDNet: its layers, counts, names and values."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.costs.flops import exit_costs
from dfs_jax.forks import create_fork
from dfs_jax.interop import to_torch_gradients, to_torch_state_dict
from dfs_jax.models import create_model
from dfs_jax.models.msdnet import GrowingScale, MSDNetHead
from dfs_jax.models.msdnet_plan import Bottleneck
from dfs_jax.types import UserError
from tests.support.msdnet_reference import (
    CLASSES,
    counts_by_hand,
    naive_views,
    normal,
    random_like,
    reference_logits,
    small,
    variable_shapes,
)

# Layers


def test_a_scale_keeps_old_channels_first_then_the_finer_scale_then_itself():
    x, finer = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 5, 8, 2))
    scale = GrowingScale(Bottleneck(3, 2), Bottleneck(4, 3))
    variables = scale.init(jax.random.key(0), x, finer, train=False)
    statistics = {"batch_stats": variables["batch_stats"]}

    def without(part):
        params = jax.tree.map(jnp.copy, variables["params"])
        params[part]["wide"]["conv"]["kernel"] *= 0
        return scale.apply({"params": params, **statistics}, x, finer, train=False)

    chex.assert_shape(without("down"), (2, 3, 4, 10))
    np.testing.assert_array_equal(without("down")[..., :5], x)
    assert not without("down")[..., 5:7].any()
    assert without("down")[..., 7:].any()
    assert without("same")[..., 5:7].any()
    assert not without("same")[..., 7:].any()


def test_scales_halve_and_the_carry_holds_the_kept_ones():
    model, images = small(), jax.ShapeDtypeStruct((3, 8, 9, 3), jnp.float32)
    variables = variable_shapes(model, (8, 9, 3))

    def carries(variables, carry):
        found = []
        for i in range(model.num_exits):
            carry = model.apply(variables, i, carry, train=False, method="block")
            found.append(carry)
        return found

    shapes = [[x.shape[1:] for x in carry] for carry in jax.eval_shape(carries, variables, images)]
    assert shapes == [
        [(8, 9, 7), (4, 5, 14), (2, 3, 28)],
        [(4, 5, 10), (2, 3, 20)],
        [(4, 5, 18), (2, 3, 36)],
        [(2, 3, 28)],
    ]


def test_the_imagenet_stem_quarters_the_image_and_has_a_bias():
    model = small(stem="imagenet", head_channels=None)
    images = jax.ShapeDtypeStruct((2, 37, 45, 3), jnp.float32)
    (finest, *_), variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), 0, x, train=False, method="block"),
        images,
    )
    assert finest.shape == (2, 10, 12, 7)  # ceil(ceil(37 / 2) / 2)
    stem = variables["params"]["block1"]["first"]["scale1"]["conv"]
    assert {name: leaf.shape for name, leaf in stem.items()} == {
        "kernel": (7, 7, 3, 3),
        "bias": (3,),
    }


def test_dropout_acts_in_training_alone_and_needs_a_key():
    head = MSDNetHead(num_classes=3, width=5, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    variables = head.init(jax.random.key(1), x, train=False)

    def logits(key=None, **options):
        rngs = {} if key is None else {"dropout": jax.random.key(key)}
        output, _ = head.apply(variables, x, mutable="batch_stats", rngs=rngs, **options)
        return output.logits, output.feature

    np.testing.assert_array_equal(logits(train=False)[0], logits(5, train=False)[0])
    assert not np.allclose(logits(5, train=True)[0], logits(7, train=True)[0])
    # The feature that distillation compares is the one before dropout.
    np.testing.assert_array_equal(logits(5, train=True)[1], logits(7, train=True)[1])


@pytest.mark.parametrize(
    ("stem", "shape", "smallest"), [("cifar", (7, 9, 3), 8), ("imagenet", (224, 31, 3), 32)]
)
def test_images_too_small_for_the_scales_are_refused(stem, shape, smallest):
    model = small(stem=stem)
    message = f"{shape[0]}x{shape[1]} are too small for 3 scales .* at least {smallest} pixels"
    with pytest.raises(UserError, match=message):
        variable_shapes(model, shape)


# Counts


# Parameters and operations in millions, as published; exact ones are in the table of every model.
PUBLISHED = {
    "msdnet_cifar100": (
        (100, 32),
        (0.90, 1.84, 2.80, 3.76, 4.92, 6.10, 7.36),
        (56.43, 101.00, 155.31, 198.10, 249.53, 298.05, 340.64),
    ),
    "msdnet_imagenet": (
        (1000, 224),
        (4.24, 8.77, 13.07, 16.75, 23.96),
        (339.90, 685.46, 1008.16, 1254.47, 1360.53),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_by_hand_are_the_published_ones(name):
    (classes, size), *published = PUBLISHED[name]
    params, _, literature = counts_by_hand(create_model(name, num_classes=classes), classes, size)
    assert [
        tuple(round(x / 1e6, 2) for x in counts) for counts in (params, literature)
    ] == published


@pytest.mark.parametrize(
    ("options", "size"),
    [
        pytest.param(
            {"prune": "min", "step_mode": "lin_grow", "step": 1}, 32, marks=pytest.mark.slow
        ),
        pytest.param(
            {"prune": "min", "reduction": 0.7, "head_channels": None, "growth": 6},
            32,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"scale_factors": (1, 2, 2, 6), "bottleneck_factors": (3, 1, 2, 4), "growth": 10},
            64,
            marks=pytest.mark.slow,
        ),
        ({"scale_factors": (3,), "bottleneck_factors": (2,), "num_exits": 3, "step": 3}, 8),
        ({"stem": "imagenet", "num_exits": 2, "head_channels": None}, 128),
    ],
)
def test_counts_by_hand_are_the_traced_ones(options, size):
    model = small(**options)
    params, macs, literature = counts_by_hand(model, CLASSES, size)
    counted = exit_costs(model, (size, size, 3))
    assert [cost.params for cost in counted] == params
    assert [cost.published_macs for cost in counted] == macs
    assert (counted[0].macs < macs[0]) == (len(model.scale_factors) > 1)
    assert all(cost.macs <= cost.published_macs for cost in counted)
    assert [cost.literature_flops for cost in counted] == literature


# Names


def test_published_names_by_hand():
    model = small(num_exits=2)  # four layers: drops at 3, at the start of block 2
    shapes = variable_shapes(model, (8, 8, 3))
    variables = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    names = {n: x.shape for n, x in to_torch_state_dict(model, variables).items()}
    assert names["blocks.0.0.layers.2.net.0.weight"] == (12, 6, 3, 3)
    assert names["blocks.0.1.layers.2.conv_down.net.0.weight"] == (6, 6, 1, 1)
    assert names["blocks.0.1.layers.2.conv_normal.net.3.weight"] == (4, 12, 3, 3)
    assert names["blocks.1.0.layers.0.conv_down.net.4.running_var"] == (2,)
    assert names["blocks.1.1.m.1.net.0.weight"] == (16, 36, 1, 1)
    assert names["blocks.1.2.layers.0.conv_normal.net.0.weight"] == (8, 8, 1, 1)
    assert names["classifier.1.m.0.net.0.weight"] == (5, 24, 3, 3)
    assert names["classifier.1.linear.1.bias"] == (CLASSES,)
    assert not any(name.startswith("blocks.0.1.layers.0.conv_down") for name in names)


def test_the_large_stem_is_a_sequence_of_its_own():
    model = small(stem="imagenet", num_exits=2, adapt_features=True)
    shapes = variable_shapes(model, (64, 64, 3))
    variables = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    names = to_torch_state_dict(model, variables)
    assert names["blocks.0.0.layers.0.0.weight"].shape == (3, 3, 7, 7)
    assert names["blocks.0.0.layers.0.0.bias"].shape == (3,)
    assert names["blocks.0.0.layers.0.1.running_mean"].shape == (3,)
    assert names["blocks.0.0.layers.1.net.0.weight"].shape == (6, 3, 3, 3)
    assert names["adaptation_layer1.weight"].shape == (5, 5)


# Whole networks


@pytest.mark.parametrize(
    ("options", "betas", "referencing"),
    [
        pytest.param(
            {"prune": "min", "num_exits": 3, "step": 1},
            (0.3, 0.8),
            "trunk_only",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"prune": "min", "step_mode": "lin_grow", "step": 1},
            (0.3, 0.8, 0.5),
            "symmetric",
            marks=pytest.mark.slow,
        ),
        pytest.param({}, (0.0, 1.0, 0.4), "symmetric", marks=pytest.mark.slow),
        pytest.param({}, (0.6, 0.2, 0.7), "none", marks=pytest.mark.slow),
        pytest.param(
            {
                "stem": "imagenet",
                "scale_factors": (1, 3),
                "bottleneck_factors": (2, 1),
                "head_channels": None,
            },
            (0.7, 0.7, 0.7),
            "trunk_only",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_logits_and_gradients_are_the_references(options, betas, referencing):
    model, labels = small(**options), jnp.asarray([2, 6, 0, 2])
    variables = random_like(variable_shapes(model, (16, 18, 3)), 0)
    variables = jax.tree.map(lambda x: x if x.ndim > 1 else 1 + 0.1 * x, variables)
    weights = to_torch_state_dict(model, variables)
    weights = {name: x for name, x in weights.items() if x.ndim and "running" not in name}
    images = normal(1, (4, 16, 18, 3))
    fork = create_fork("dfs", partition_ratio=betas, referencing=referencing)

    def ours(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, fork, train=True, mutable="batch_stats"
        )
        return total_loss(outputs.logits), outputs.logits

    def theirs(weights):
        nchw = images.transpose(0, 3, 1, 2)
        logits = reference_logits(weights, nchw, naive_views(betas, referencing))
        return total_loss(logits), logits

    def total_loss(logits):
        return -jax.nn.log_softmax(logits)[:, jnp.arange(4), labels].mean(1).sum()

    found, found_logits = jax.jit(jax.grad(ours, has_aux=True))(variables["params"])
    expected, logits = jax.jit(jax.grad(theirs, has_aux=True))(weights)
    np.testing.assert_allclose(found_logits, logits, rtol=1e-3, atol=1e-3)
    found = to_torch_gradients(model, found)
    assert found.keys() == expected.keys()
    largest = max(np.linalg.norm(gradient) for gradient in expected.values())
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-4 * largest, err_msg=name)
        assert np.any(found[name]) == np.any(gradient), name
