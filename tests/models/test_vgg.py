"""VGG: sizes, parameters, and whose gradient each weight receives."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.interop import from_torch_state_dict, to_torch_state_dict
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.models.vgg import VGG
from dfs_jax.surgery import FeatureSurgery, partition_channels
from dfs_jax.types import UserError

BATCH, CLASSES, IMAGE_SHAPE = 2, 7, (11, 13, 3)


def variable_shapes(model, image_shape=IMAGE_SHAPE):
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("width", [3, 5, 64])
def test_vgg7_parameter_count(width):
    c = width
    convs = 9 * (3 * c + c * c + 2 * c * c + 4 * c * c + 8 * c * c + 16 * c * c) + c  # one bias
    norms = 2 * (c + c + 2 * c + 2 * c + 4 * c + 4 * c)
    heads = 14 * c * CLASSES  # no biases
    shapes = variable_shapes(create_model("vgg7", num_classes=CLASSES, width=width))
    assert count(shapes["params"]) == convs + norms + heads
    assert count(shapes["batch_stats"]) == norms


def test_vgg7_parameters_for_100_classes_layer_by_layer():
    # 64: 1728 + 64 + 36864; 128: 73728 + 147456; 256: 294912 + 589824; norms 1792; heads 89600.
    shapes = variable_shapes(create_model("vgg7", num_classes=100))
    by_hand = 1728 + 64 + 36864 + 73728 + 147456 + 294912 + 589824 + 1792 + 89600
    assert count(shapes["params"]) == by_hand == 1_235_968


def test_vgg16_parameters_at_every_exit():
    params = variable_shapes(create_model("vgg16", num_classes=1000), (32, 32, 3))["params"]
    widths = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    total = 64  # the first convolution's bias
    for i, (c_in, c_out) in enumerate(zip([3, *widths], widths, strict=False), start=1):
        total += 9 * c_in * c_out + 2 * c_out + 1000 * c_out  # convolution, norm, head
        upto = {name: params[name] for j in range(1, i + 1) for name in (f"block{j}", f"head{j}")}
        assert count(upto) == total
    assert len(params) == 2 * 13
    assert total == 18_942_976


def torch_vgg16(torch, num_classes):
    """The published stack in plain PyTorch, one exit: convolution, ReLU, BatchNorm, then pool."""
    layers, channels = [], 3
    for width, size in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(size):
            conv = torch.nn.Conv2d(channels, width, 3, padding=1, bias=not layers)
            layers += [conv, torch.nn.ReLU(), torch.nn.BatchNorm2d(width)]
            channels = width
        layers.append(torch.nn.MaxPool2d(2))
    pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, *pooled, torch.nn.Linear(512, num_classes, bias=False))


@pytest.mark.slow
def test_vgg16_with_one_exit_equals_a_plain_stack():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch_vgg16(torch, 11).eval()
    with torch.no_grad():
        for norm in (layer for layer in theirs if isinstance(layer, torch.nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape))
    ours = create_model("vgg16", num_classes=11)
    fresh = init_variables(ours, jax.random.key(0), (32, 32, 3))
    # At beta 1 all weights are of those that read shared channels, and the other halves empty.
    tensors = iter(theirs.state_dict().values())
    state_dict = to_torch_state_dict(ours, fresh, partition_ratio=1)
    for name, array in state_dict.items():
        is_early_head = name.startswith("classifers") and not name.startswith("classifers.12")
        if not is_early_head and 0 not in array.shape:
            state_dict[name] = next(tensors)
    assert next(tensors, None) is None
    variables = from_torch_state_dict(ours, state_dict, partition_ratio=1)
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    logits = jax.jit(ours.apply)(variables, images).logits[-1]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_vgg16_learns_in_a_step_at_full_size():
    model = create_model("vgg16", num_classes=1000)
    images = jax.random.normal(jax.random.key(1), (2, 224, 224, 3))
    variables = init_variables(model, jax.random.key(0), (224, 224, 3))
    fork, loss = FeatureSurgery(), create_loss("deep_supervision")

    @jax.jit
    def step(params):
        def total(params):
            outputs, _ = model.apply(
                {**variables, "params": params}, images, fork, train=True, mutable="batch_stats"
            )
            return loss(outputs, jnp.asarray([3, 500])).sum()

        value, gradients = jax.value_and_grad(total)(params)
        return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

    before, params = step(variables["params"])
    after, _ = step(params)
    assert before == pytest.approx(13 * np.log(1000), rel=0.2)
    assert after < before


def test_adaptation_layers_map_to_the_last_width():
    params = variable_shapes(
        create_model("vgg7", num_classes=CLASSES, width=5, adapt_features=True)
    )["params"]
    kernels = [params[f"head{i}"]["adaptation"]["kernel"].shape for i in range(1, 6)]
    assert kernels == [(5, 20), (5, 20), (10, 20), (10, 20), (20, 20)]
    assert "adaptation" not in params["head6"]


@pytest.fixture(scope="module")
def narrow():
    model = create_model("vgg7", num_classes=CLASSES, width=5)
    return model, init_variables(model, jax.random.key(0), IMAGE_SHAPE)


def test_maps_halve_after_every_second_convolution(narrow):
    model, variables = narrow

    def maps(variables, images):
        carry, shapes = images, []
        for i in range(model.num_exits):
            carry = model.apply(variables, i, carry, train=False, method="block")
            shapes.append(carry)
        return shapes

    shapes = jax.eval_shape(maps, variables, jnp.zeros((BATCH, *IMAGE_SHAPE)))
    assert [carry.shape[1:] for carry in shapes] == [
        (11, 13, 5),
        (5, 6, 5),
        (5, 6, 10),
        (2, 3, 10),
        (2, 3, 20),
        (1, 1, 20),
    ]


def test_only_the_first_convolution_and_no_classifier_has_a_bias(narrow):
    params = narrow[1]["params"]
    assert [name for name in sorted(params) if "bias" in params[name].get("conv", {})] == ["block1"]
    assert all(params[f"head{i}"]["classifier"].keys() == {"kernel"} for i in range(1, 7))


@pytest.mark.parametrize("beta", [0.3, (0.2, 0.4, 0.6, 0.8, 0.3)])
def test_each_output_channel_is_trained_by_its_owner_alone(narrow, beta):
    """w_i- receives the gradient of exit i only, w_i+ those of deeper exits only."""
    model, variables = narrow
    images = jax.random.normal(jax.random.key(1), (BATCH, *IMAGE_SHAPE))
    surgeon, loss = FeatureSurgery(beta), create_loss("deep_supervision")

    @jax.jit
    def per_exit(params):
        def losses(params):
            outputs, _ = model.apply(
                {**variables, "params": params}, images, surgeon, train=True, mutable="batch_stats"
            )
            return loss(outputs, jnp.asarray([3, 5]))

        _, pullback = jax.vjp(losses, params)
        return jax.vmap(lambda seed: pullback(seed)[0])(jnp.eye(6))

    by_exit = per_exit(variables["params"])
    for i in range(5):
        k = partition_channels(5 * (1, 1, 2, 2, 4)[i], surgeon.ratio_at(i, 6))
        for leaf in jax.tree.leaves(by_exit[f"block{i + 1}"]):
            shared, specific = np.asarray(leaf[..., :k]), np.asarray(leaf[..., k:])
            assert not specific[np.arange(6) != i].any()
            assert not shared[: i + 1].any()
            assert specific[i].any()
            assert shared[i + 1 :].any()


@pytest.mark.parametrize("shape", [(7, 32, 3), (32, 7, 3)])
def test_images_too_small_for_the_pools_are_refused(shape):
    model = create_model("vgg7", num_classes=CLASSES, width=3)
    message = f"{shape[0]}x{shape[1]} are too small for 3 max-pools: .* at least 8 pixels"
    with pytest.raises(UserError, match=message):
        variable_shapes(model, shape)


@pytest.mark.parametrize("width", [0, -3, 2.5, True, "wide"])
def test_a_width_that_is_no_positive_whole_number_is_refused(width):
    with pytest.raises(UserError, match=f"whole number of at least 1, got {width!r}"):
        create_model("vgg7", num_classes=CLASSES, width=width)


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="model 'vgg7' has no option 'depth'"):
        create_model("vgg7", num_classes=CLASSES, depth=3)


def test_stages_are_arguments():
    model = VGG(num_classes=CLASSES, width=2, stage_sizes=(1, 3), stage_multipliers=(3, 5))
    params = variable_shapes(model)["params"]
    assert model.num_exits == 4
    kernels = [params[f"block{i}"]["conv"]["kernel"].shape for i in range(1, 5)]
    assert kernels == [(3, 3, 3, 6), (3, 3, 6, 10), (3, 3, 10, 10), (3, 3, 10, 10)]


def test_convolutions_between_exits_are_one_block():
    params = variable_shapes(create_model("vgg7", num_classes=CLASSES, width=3, exits=(1, 4, 6)))
    params, stats = params["params"], params["batch_stats"]
    assert sorted(params) == ["block1", "block2", "block3", "head1", "head2", "head3"]
    assert sorted(params["block1"]) == ["conv", "norm"]
    shapes = [
        params[block][layer]["conv"]["kernel"].shape
        for block, layers in (("block2", 3), ("block3", 2))
        for layer in (f"layer{k}" for k in range(1, layers + 1))
    ]
    assert shapes == [(3, 3, a, b) for a, b in ((3, 3), (3, 6), (6, 6), (6, 12), (12, 12))]
    heads = [params[f"head{i}"]["classifier"]["kernel"].shape[0] for i in (1, 2, 3)]
    assert heads == [3, 6, 12]
    assert count(stats) == 2 * (3 + 3 + 6 + 6 + 12 + 12)


def test_with_fewer_exits_the_others_say_the_same():
    whole, chosen = (
        create_model("vgg7", num_classes=CLASSES, width=3, exits=exits) for exits in (None, (2, 6))
    )
    images = jax.random.normal(jax.random.key(3), (BATCH, *IMAGE_SHAPE))
    variables = init_variables(whole, jax.random.key(5), IMAGE_SHAPE)
    flat = {
        kind: {
            "block1": {"layer1": tree["block1"], "layer2": tree["block2"]},
            "block2": {f"layer{k}": tree[f"block{k + 2}"] for k in range(1, 5)},
            **({"head1": tree["head2"], "head2": tree["head6"]} if kind == "params" else {}),
        }
        for kind, tree in variables.items()
    }
    expected = whole.apply(variables, images).logits
    logits = chosen.apply(flat, images).logits
    np.testing.assert_allclose(logits[0], expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits[1], expected[5], rtol=1e-5, atol=1e-6)


def test_every_convolution_in_exits_is_the_plain_network():
    shapes = (
        variable_shapes(create_model("vgg7", num_classes=CLASSES, width=3, exits=exits))
        for exits in (None, (1, 2, 3, 4, 5, 6))
    )
    chex.assert_trees_all_equal_shapes(*shapes)


@pytest.mark.slow
def test_a_deeper_exit_trains_none_of_what_a_wide_block_leaves_to_an_early_one():
    model = create_model("vgg7", num_classes=CLASSES, width=4, exits=(2, 6))
    variables = init_variables(model, jax.random.key(5), IMAGE_SHAPE)
    images = jax.random.normal(jax.random.key(3), (BATCH, *IMAGE_SHAPE))
    fork = FeatureSurgery(partition_ratio=0.5, referencing="trunk_only")

    def last(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, fork, train=True, mutable=["batch_stats"]
        )
        return outputs.logits[-1].sum()

    kernel = jax.grad(last)(variables["params"])["block1"]["layer2"]["conv"]["kernel"]
    assert jnp.any(kernel[..., :2] != 0)
    np.testing.assert_array_equal(kernel[..., 2:], 0)


@pytest.mark.parametrize("exits", [(), (1, 5), (6, 1), (1, 1, 6), (0, 6), (1, 7), 6, (1.5, 6)])
def test_exits_that_are_no_convolutions_up_to_the_last_are_refused(exits):
    with pytest.raises(UserError, match=r"last one, 6, among them, such as \(1, 6\); got"):
        create_model("vgg7", num_classes=CLASSES, exits=exits)


def test_published_weights_need_an_exit_after_every_convolution():
    model = create_model("vgg7", num_classes=CLASSES, width=3, exits=(1, 6))
    with pytest.raises(UserError, match=r"exit after every convolution, and exits are \(1, 6\)"):
        from_torch_state_dict(model, {})
