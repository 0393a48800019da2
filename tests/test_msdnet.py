"""MSDNet: its layout by hand, its counts, which channels carry gradient, mistakes, training."""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import cifar10_msdnet
from dfs_jax.analysis.flops import exit_costs
from dfs_jax.data.dataset import RawDataset
from dfs_jax.data.tfds_source import load_tfds
from dfs_jax.forks import create_fork
from dfs_jax.interop import to_torch_state_dict
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.models.msdnet import GrowingScale, MSDNet, MSDNetHead, MSDNetLayer, MSDNetTransition
from dfs_jax.models.msdnet_plan import (
    Bottleneck,
    ScaleGrowth,
    ScaleMix,
    Transition,
    append_live,
    block_sizes,
    kept_scales,
    transition_layers,
)
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.sharding import create_mesh, put_batch, replicated
from dfs_jax.training.state import NO_BAD_STEP, create_state
from dfs_jax.training.step import make_train_step
from dfs_jax.types import UserError

CLASSES = 7
# 2 + 2 + 2 + 2 layers; scales are dropped after layer 4, at a block's end, and 7, within a block.
SMALL = {
    "num_exits": 4,
    "base": 2,
    "initial_channels": 3,
    "growth": 2,
    "head_channels": 5,
    "head_dropout": 0.0,
}


def small(**options):
    return create_model("msdnet", num_classes=CLASSES, **{**SMALL, **options})


def steps_of(model):
    return [step for block in model.plan for step in block.steps]


# The layout, by hand


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


# Live channels


@pytest.mark.parametrize(
    ("live", "old", "new", "expected"),
    [
        (((0, 3),), 7, 11, ((0, 3), (7, 11))),
        (((0, 3), (5, 7)), 7, 11, ((0, 3), (5, 11))),
        ((), 7, 11, ((7, 11),)),
        (((0, 7),), 7, 11, None),
    ],
)
def test_appended_channels_are_live(live, old, new, expected):
    assert append_live(live, old, new) == expected


def test_live_channels_through_blocks_by_hand():
    plan = small().plan
    # Coarsest scale: 12 -> 20 -> 28 | 36, 44, transition to 20 | 28, 36 | 44, to 20, 28.
    assert plan[0].live(None) == (None, None, None)
    assert plan[1].live(((0, 9),)) == (
        ((0, 9),),
        ((0, 9), (28, 36)),
        ((0, 9), (28, 44)),
        None,
    )
    assert plan[2].live(()) == ((), ((20, 28),), ((20, 36),))
    assert plan[3].live(((0, 36),)) == (((0, 36),), None, None, None)


def coarse_inputs(model, fork, variables, images):
    """Each step's and head's view of the coarsest scale, its claimed live channels, finer scales.

    Returns what a trace finds: a function of params that returns the arrays, and the list, filled
    by the trace, of the claims.
    """
    claims = []

    def run(params):
        claims.clear()
        seen = []

        def note(method, args, kwargs, context):
            if isinstance(context.module, MSDNetLayer | MSDNetTransition | MSDNetHead):
                scales = args[0] if isinstance(args[0], tuple) else (args[0],)
                seen.append(scales)
                claims.append(args[1])
            return method(*args, **kwargs)

        with nn.intercept_methods(note):
            model.apply(
                {**variables, "params": params}, images, fork, train=True, mutable="batch_stats"
            )
        return seen

    return run, claims


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([normal((seed, i), leaf.shape) for i, leaf in enumerate(leaves)])


def variable_shapes(model, image_shape):
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))


@pytest.fixture(scope="module")
def small_network():
    model = small()
    variables = random_like(variable_shapes(model, (8, 9, 3)), 0)
    # Norms near scale and bias 1, so that no channel is dead for another reason.
    variables = jax.tree.map(lambda x: x if x.ndim > 1 else 1 + 0.1 * x, variables)
    return model, variables, normal(1, (3, 8, 9, 3))


@pytest.mark.parametrize(
    ("beta", "referencing"),
    [((0.0, 1.0, 0.3), "symmetric"), (0.5, "trunk_only"), ((0.6, 0.2, 0.7), "none")],
)
def test_claimed_live_channels_are_those_that_depend_on_parameters(
    small_network, beta, referencing
):
    """In the naive graph, whose stop_gradient cuts derivatives in both directions alike."""
    model, variables, images = small_network
    fork = create_fork("dfs", partition_ratio=beta, referencing=referencing)
    run, claims = coarse_inputs(model, fork, variables, images)
    params, direction = variables["params"], random_like(variables["params"], 2)
    tangents = jax.jit(lambda p, d: jax.jvp(run, (p,), (d,))[1])(params, direction)
    assert len(claims) == len(tangents) == 8 + 2 + 4  # layers, transitions, heads
    cut = 0
    for claim, (*finer, coarsest) in zip(claims, tangents, strict=True):
        depends = np.any(np.asarray(coarsest) != 0, axis=(0, 1, 2))
        claimed = np.zeros(coarsest.shape[-1], bool)
        for start, stop in claim if claim is not None else ((0, None),):
            claimed[start:stop] = True
        np.testing.assert_array_equal(claimed, depends)
        assert all(np.any(np.asarray(x) != 0, axis=(0, 1, 2)).all() for x in finer)
        cut += not depends.all()
    assert cut >= 5


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


def test_scales_halve_and_the_carry_holds_the_kept_ones(small_network):
    model, variables, images = small_network

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


# Counts


class Count:
    """Parameters and operations, layer by layer: a slow reference that knows nothing of the plan.

    `literature` counts a multiply-add once, a linear's bias, ReLUs, and k * k for each pooled one.
    """

    def __init__(self):
        self.params = self.macs = self.literature = 0

    def conv(self, kernel, inputs, outputs, side, *, bias=False):
        """A convolution to a map of side x side, BatchNorm and ReLU."""
        self.params += kernel**2 * inputs * outputs + 2 * outputs + bias * outputs
        self.macs += kernel**2 * inputs * outputs * side**2
        self.literature += kernel**2 * inputs * outputs * side**2 + outputs * side**2

    def bottleneck(self, factor, inputs, outputs, side_in, side_out):
        hidden = min(inputs, factor * outputs)
        self.conv(1, inputs, hidden, side_in)
        self.conv(3, hidden, outputs, side_out)

    def head(self, inputs, width, classes, side):
        half = math.ceil(side / 2)
        quarter = math.ceil(half / 2)
        self.conv(3, inputs, width, half)
        self.conv(3, width, width, quarter)
        self.params += width * classes + classes
        self.macs += width * classes
        self.literature += 4 * width * (quarter // 2) ** 2 + width * classes + classes


def counts_by_hand(model, classes, size):
    """Cumulative counts at each exit, walking through the network as the paper describes it."""
    f, b, scales = model.scale_factors, model.bottleneck_factors, len(model.scale_factors)
    sizes = [model.base]
    for k in range(2, model.num_exits + 1):
        sizes.append(model.step if model.step_mode == "even" else model.step * (k - 1) + 1)
    layers, total, found = sum(sizes), Count(), []
    if model.stem == "imagenet":
        total.conv(7, 3, model.initial_channels * f[0], size // 2, bias=True)
        size //= 4
        total.literature += 9 * model.initial_channels * f[0] * size**2
    else:
        total.conv(3, 3, model.initial_channels * f[0], size)
    sides = [size // 2**s for s in range(scales)]
    channels = [model.initial_channels * factor for factor in f]
    for s in range(1, scales):
        total.conv(3, channels[s - 1], channels[s], sides[s])
    width, kept, n = model.initial_channels, scales, 0
    for block_size in sizes:
        for _ in range(block_size):
            n, before = n + 1, kept
            if model.prune == "max":
                kept = scales - (n - 1) // math.ceil(layers / scales)
            else:
                kept = min(scales, layers - n + 1)
            for s in range(scales - kept, scales):
                if s == scales - before:
                    total.bottleneck(b[s], channels[s], model.growth * f[s], sides[s], sides[s])
                else:
                    half = model.growth * f[s] // 2
                    total.bottleneck(b[s - 1], channels[s - 1], half, sides[s - 1], sides[s])
                    total.bottleneck(b[s], channels[s], half, sides[s], sides[s])
            width += model.growth
            drops = kept < before
            thirds = n in (layers // 3, 2 * layers // 3)
            if drops if model.prune == "max" else thirds:
                narrow = int(model.reduction * width)
                for s in range(scales - kept, scales):
                    total.conv(1, width * f[s], narrow * f[s], sides[s])
                width = narrow
            channels = [width * factor for factor in f]
        total.head(channels[-1], model.head_channels or channels[-1], classes, sides[-1])
        found.append((total.params, total.macs, total.literature))
    return found


class Row(NamedTuple):
    """Published parameters and operations, in millions, and the exact parameters behind them."""

    classes: int
    size: int
    params: tuple[int, ...]
    published_params: tuple[float, ...] = ()
    published_flops: tuple[float, ...] = ()


CIFAR100 = Row(
    100,
    32,
    (898_996, 1_835_992, 2_797_212, 3_758_208, 4_915_812, 6_102_472, 7_362_348),
    (0.90, 1.84, 2.80, 3.76, 4.92, 6.10, 7.36),
    (56.43, 101.00, 155.31, 198.10, 249.53, 298.05, 340.64),
)
COUNT_ROWS = {
    "msdnet": CIFAR100,
    "msdnet_cifar100": CIFAR100,
    "msdnet_imagenet": Row(
        1000,
        224,
        (4_238_504, 8_772_240, 13_073_272, 16_748_416, 23_958_440),
        (4.24, 8.77, 13.07, 16.75, 23.96),
        (339.90, 685.46, 1008.16, 1254.47, 1360.53),
    ),
    "msdnet_cifar_anytime": Row(
        100, 32, (433_876, 876_792, 1_274_952, 1_695_548, 2_178_352, 2_603_252, 3_067_960)
    ),
    "msdnet_cifar_budgeted": Row(100, 32, (299_704, 649_740, 1_018_308, 1_492_424, 2_078_924)),
}


@pytest.mark.parametrize("name", COUNT_ROWS)
def test_published_counts(name):
    row = COUNT_ROWS[name]
    model = create_model(name, num_classes=row.classes)
    params, macs, literature = zip(*counts_by_hand(model, row.classes, row.size), strict=True)
    assert params == row.params
    if row.published_flops:
        assert tuple(round(x / 1e6, 2) for x in params) == row.published_params
        assert tuple(round(x / 1e6, 2) for x in literature) == row.published_flops
    counted = exit_costs(model, (row.size, row.size, 3))
    assert tuple(cost.params for cost in counted) == params
    assert tuple(cost.macs for cost in counted) == macs


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "min", "step_mode": "lin_grow", "step": 1},
        {"prune": "min", "reduction": 0.7, "head_channels": None, "growth": 6},
        {"scale_factors": (1, 2, 2, 6), "bottleneck_factors": (3, 1, 2, 4), "growth": 10},
        {"scale_factors": (3,), "bottleneck_factors": (2,), "num_exits": 3, "base": 1, "step": 3},
    ],
)
def test_counts_of_other_networks(options):
    model = small(**options)
    params, macs, _ = zip(*counts_by_hand(model, CLASSES, 64), strict=True)
    counted = exit_costs(model, (64, 64, 3))
    assert tuple(cost.params for cost in counted) == params
    assert tuple(cost.macs for cost in counted) == macs


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


# Mistakes


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


@pytest.mark.parametrize(
    ("stem", "shape", "smallest"), [("cifar", (7, 9, 3), 8), ("imagenet", (224, 31, 3), 32)]
)
def test_images_too_small_for_the_scales_are_refused(stem, shape, smallest):
    model = small(stem=stem)
    message = f"{shape[0]}x{shape[1]} are too small for 3 scales .* at least {smallest} pixels"
    with pytest.raises(UserError, match=message):
        variable_shapes(model, shape)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match=r"unknown model 'msdnet_cifar1000': choose one of .*msdne"):
        create_model("msdnet_cifar1000", num_classes=3)


def test_configs_may_give_lists():
    model = small(scale_factors=[1, 2, 4], bottleneck_factors=[1, 2, 4])
    assert model == small()
    assert isinstance(model, MSDNet)


# Training, which takes long


def few_images(data_dir):
    """5,000 training and 1,000 test images of CIFAR-10; a config names this function."""
    whole = load_tfds("cifar10", data_dir=data_dir)
    return RawDataset(
        whole.train.take(np.arange(5000)), whole.test.take(np.arange(1000)), whole.class_names
    )


@pytest.mark.slow
def test_growth_4_learns_real_images_in_two_epochs(tmp_path, shared_dir):
    config = cifar10_msdnet.get_config()
    config.update_from_flattened_dict(
        {
            "model.growth": 4,
            "data.name": "tests.test_msdnet:few_images",
            "data.data_dir": str(shared_dir / "tfds"),
            "data.validation_examples": 1000,
            "batch_size": 50,
            "epochs": 2,
            "schedule.decay_epochs": (1,),
        }
    )
    train(config, tmp_path)
    lines = [line for line in read_metrics(tmp_path) if line["split"] == "validation"]
    assert lines[-1]["exit7/accuracy"] > 0.25
    assert all(lines[-1][f"exit{i}/accuracy"] > 0.15 for i in range(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msdnet_cifar100", "msdnet_imagenet"])
def test_a_full_size_model_runs_a_step(name):
    row = COUNT_ROWS[name]
    model = create_model(name, num_classes=row.classes)
    optimizer, mesh = optax.sgd(0.1), create_mesh()
    variables = init_variables(model, jax.random.key(0), (row.size, row.size, 3))
    state = create_state(
        variables, optimizer, jax.random.key(1), num_exits=model.num_exits, keep_average=False
    )
    step = make_train_step(
        model,
        create_fork("dfs", referencing="trunk_only"),
        create_loss("deep_supervision"),
        optimizer,
        lambda images, key: images,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        mesh=mesh,
    )
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, row.size, row.size, 3)).astype(np.uint8)
    before = jax.tree.map(np.array, variables["params"])
    state = step(
        jax.device_put(state, replicated(mesh)), *put_batch((images, np.array([3, 5])), mesh)
    )
    assert state.first_bad_step == NO_BAD_STEP
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    assert all(any(jax.tree.leaves(part)) for part in moved.values())
