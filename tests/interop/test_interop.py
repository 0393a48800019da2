"""Weights from and to other programs: names, layouts, files."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from dfs_jax.interop import (
    from_torch_state_dict,
    load_trunk,
    load_weights,
    save_weights,
    to_torch_gradients,
    to_torch_state_dict,
)
from dfs_jax.interop.torch_names import FAMILIES, family_of, flatten, unwrapped
from dfs_jax.models import create_model
from dfs_jax.types import UserError
from tests.support import make_golden

CLASSES, BETA = 7, 0.3
# A small model of each family that has published names.
FAMILY_ROWS = {
    "EfficientNetLite": ("efficientnet_lite0", {"width": 4, "head_width": 5}),
    "MSDNet": ("msdnet", {"num_exits": 3, "base": 1, "growth": 2, "head_channels": 5}),
    "ResNet": ("resnet50", {"width": 2, "stage_sizes": (2, 1, 1)}),
    "VGG": ("vgg7", {"width": 5}),
    "ViT": ("vit_tiny", {"width": 6, "heads": 2, "depth": 3, "first_exit_layer": 2}),
}


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=FAMILY_ROWS)
def model(request):
    name, options = FAMILY_ROWS[request.param]
    return create_model(name, num_classes=CLASSES, **options)


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


@pytest.fixture(scope="module")
def state_dict(model, variables):
    return to_torch_state_dict(model, variables, partition_ratio=BETA)


def random_variables(model):
    """Random variables, every tensor different."""
    images = jnp.zeros((1, *family_of(model).image_shape))
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images))
    leaves = {path: normal(i, leaf.shape) for i, (path, leaf) in enumerate(shapes.items())}
    return {"batch_stats": {}, **traverse_util.unflatten_dict(leaves)}


@pytest.fixture(scope="module")
def vgg():
    return create_model("vgg7", num_classes=CLASSES, width=5)


@pytest.fixture(scope="module")
def vgg_variables(vgg):
    return random_variables(vgg)


@pytest.fixture(scope="module")
def vgg_state_dict(vgg, vgg_variables):
    return to_torch_state_dict(vgg, vgg_variables, partition_ratio=BETA)


# Names and layouts


def test_there_and_back(model, variables, state_dict):
    chex.assert_trees_all_equal(
        from_torch_state_dict(model, state_dict, partition_ratio=BETA), variables
    )


def test_every_family_has_its_row():
    assert FAMILY_ROWS.keys() == FAMILIES.table.keys()


def test_vgg_weights_by_hand(vgg):
    entries = dict(make_golden.tensor_shapes(BETA, adapts=False))
    torch = {name: normal(i, entries[name]) for i, name in enumerate(entries)}
    ours = from_torch_state_dict(vgg, torch, partition_ratio=BETA)
    params, stats = ours["params"], ours["batch_stats"]
    stem = torch["feature_extractors.0.0.weight"]
    assert params["block1"]["conv"]["kernel"][1, 2, 0, 4] == stem[4, 0, 1, 2]
    # Five channels at beta 0.3: two are shared.
    halves = [torch[f"feature_extractors.1.conv_{half}.weight"] for half in "ps"]
    assert [half.shape for half in halves] == [(5, 2, 3, 3), (5, 3, 3, 3)]
    kernel = params["block2"]["conv"]["kernel"]
    assert kernel[0, 2, 1, 4] == halves[0][4, 1, 0, 2]
    assert kernel[0, 2, 2, 4] == halves[1][4, 0, 0, 2]
    classifier = params["head3"]["classifier"]["kernel"]  # ten channels, three shared
    assert classifier[2, 6] == torch["classifers.2.fc_p.weight"][6, 2]
    assert classifier[3, 6] == torch["classifers.2.fc_s.weight"][6, 0]
    assert params["block3"]["norm"]["scale"][9] == torch["feature_extractors.2.bn.weight"][9]
    assert params["block3"]["norm"]["bias"][9] == torch["feature_extractors.2.bn.bias"][9]
    assert stats["block1"]["norm"]["mean"][3] == torch["feature_extractors.0.2.running_mean"][3]
    assert stats["block1"]["norm"]["var"][3] == torch["feature_extractors.0.2.running_var"][3]


def test_written_names_shapes_and_counters_are_the_published_ones(vgg):
    shapes = {name: tuple(shape) for name, shape in make_golden.tensor_shapes(BETA, adapts=False)}
    torch = {name: np.zeros(shape) for name, shape in shapes.items()}
    written = to_torch_state_dict(
        vgg, from_torch_state_dict(vgg, torch, partition_ratio=BETA), partition_ratio=BETA
    )
    assert {name: array.shape for name, array in written.items()} == shapes
    counter = written["feature_extractors.3.bn.num_batches_tracked"]
    assert counter == 0
    assert counter.dtype == np.int64


def test_order_and_counters_of_the_file_do_not_matter(model, variables, state_dict):
    shuffled = dict(reversed(state_dict.items()))
    shuffled = {n: x for n, x in shuffled.items() if not n.endswith("num_batches_tracked")}
    back = from_torch_state_dict(model, shuffled, partition_ratio=BETA)
    chex.assert_trees_all_equal(back, variables)


def test_halves_of_any_width_where_no_ratio_is_given(vgg, vgg_state_dict):
    back = from_torch_state_dict(vgg, vgg_state_dict, partition_ratio=None)
    chex.assert_trees_all_equal(
        back, from_torch_state_dict(vgg, vgg_state_dict, partition_ratio=BETA)
    )
    with pytest.raises(UserError, match=r"conv_p.weight is \[10, 2, 3, 3\] instead of \[10, 4,"):
        from_torch_state_dict(vgg, vgg_state_dict, partition_ratio=0.8)


@pytest.mark.parametrize("beta", [0, 1])
def test_halves_may_be_empty(model, variables, beta):
    state_dict = to_torch_state_dict(model, variables, partition_ratio=beta)
    back = from_torch_state_dict(model, state_dict, partition_ratio=beta)
    chex.assert_trees_all_equal(back, variables)


def test_gradients_keep_their_products_with_weights(model, variables, state_dict):
    gradients = jax.tree.map(lambda x: normal(x.size, x.shape), variables["params"])
    published = to_torch_gradients(model, gradients, partition_ratio=BETA)
    products = jax.tree.map(lambda g, w: np.vdot(g, w), gradients, variables["params"])
    expected = sum(jax.tree.leaves(products))
    found = sum(np.vdot(published[name], state_dict[name]) for name in published)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not any("running" in name for name in published)


def test_adaptation_layers_go_along(vgg):
    adapting = vgg.clone(adapt_features=True)
    shapes = make_golden.tensor_shapes(BETA, adapts=True)
    torch = {name: normal(i, shape) for i, (name, shape) in enumerate(shapes)}
    ours = from_torch_state_dict(adapting, torch, partition_ratio=BETA)
    np.testing.assert_array_equal(
        ours["params"]["head3"]["adaptation"]["kernel"], torch["adaptation_layer3.weight"].T
    )


def test_all_names_that_do_not_fit_are_listed(vgg, vgg_state_dict):
    wrong = dict(vgg_state_dict)
    wrong["extra.weight"] = np.zeros(2)
    del wrong["classifers.1.fc_p.weight"]
    del wrong["feature_extractors.2.bn.running_var"]
    wrong["feature_extractors.0.0.weight"] = np.zeros((5, 4, 3, 3))
    wrong["feature_extractors.4.conv_s.weight"] = np.zeros(3)
    with pytest.raises(UserError) as caught:
        from_torch_state_dict(vgg, wrong, partition_ratio=BETA)
    message = str(caught.value)
    assert "missing: classifers.1.fc_p.weight, feature_extractors.2.bn.running_var;" in message
    assert "unexpected: extra.weight;" in message
    assert "feature_extractors.0.0.weight is [5, 4, 3, 3] instead of [5, 3, 3, 3]" in message
    assert "feature_extractors.4.conv_s.weight is [3] instead of" in message


def test_variables_of_another_tree_are_refused(model, variables):
    wrong = {**variables, "params": {**variables["params"], "neck": np.zeros(2)}}
    del wrong["params"]["block1"]
    with pytest.raises(UserError, match=r"missing: params/block1/.*unexpected: params/neck"):
        to_torch_state_dict(model, wrong)


def test_a_model_without_published_names_is_refused():
    with pytest.raises(UserError, match=r"Dense has no published PyTorch names: only .* VGG"):
        from_torch_state_dict(nn.Dense(3), {})


# Files


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_saved_weights_load_the_same(tmp_path, vgg_variables, ending):
    transposed = jax.tree.map(np.asfortranarray, vgg_variables)
    save_weights(tmp_path / f"w{ending}", transposed)
    flat = load_weights(tmp_path / f"w{ending}")
    assert "params/block1/conv/kernel" in flat
    chex.assert_trees_all_equal(traverse_util.unflatten_dict(flat, sep="/"), vgg_variables)
    assert [path.name for path in tmp_path.iterdir()] == [f"w{ending}"]


def test_files_that_cannot_be_read_are_told_in_a_sentence(tmp_path, variables):
    with pytest.raises(UserError, match="there is no file of weights"):
        load_weights(tmp_path / "absent.npz")
    with pytest.raises(UserError, match=r"'.onnx', which must be one of .safetensors, .npz"):
        load_weights(tmp_path / "w.onnx")
    for ending in (".safetensors", ".npz"):
        path = tmp_path / f"w{ending}"
        save_weights(path, variables)
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(UserError, match=r"is damaged or not a .*: copy it again"):
            load_weights(path)


def test_files_that_cannot_be_written_are_told_in_a_sentence(tmp_path, variables):
    with pytest.raises(UserError, match=r"written to .safetensors or .npz"):
        save_weights(tmp_path / "w.pth", variables)
    with pytest.raises(UserError, match=r"cannot write weights to .*No such file or directory"):
        save_weights(tmp_path / "absent" / "w.npz", variables)


def test_pytorchs_files(tmp_path, model, variables, state_dict):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.tensor(x) for name, x in state_dict.items()}
    tensors = {name: x.requires_grad_(x.dtype == torch.float32) for name, x in tensors.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": tensors}, path)
    back = from_torch_state_dict(model, load_weights(path), partition_ratio=BETA)
    chex.assert_trees_all_equal(back, variables)
    direct = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    chex.assert_trees_all_equal(
        from_torch_state_dict(model, direct, partition_ratio=BETA), variables
    )
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"is damaged or not a \.pth file"):
        load_weights(path)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_names_that_wrappers_changed(tmp_path, model, variables, state_dict, prefix, ending):
    wrapped = {f"{prefix}{name}": x for name, x in state_dict.items()}
    chex.assert_trees_all_equal(
        from_torch_state_dict(model, wrapped, partition_ratio=BETA), variables
    )
    path = tmp_path / f"w{ending}"
    if ending == ".npz":
        np.savez(path, **wrapped)
    else:
        safetensors.numpy.save_file(wrapped, path)
    assert load_weights(path).keys() == state_dict.keys()


def test_a_wrapper_within_the_model_and_a_state_dict_within_a_checkpoint(
    model, variables, state_dict
):
    first = next(iter(state_dict)).partition(".")[0]
    within = {
        name.replace(f"{first}.", f"{first}._orig_mod.", 1): x for name, x in state_dict.items()
    }
    checkpoint = {"epoch": 3, "model": {"state_dict": within}}
    chex.assert_trees_all_equal(
        from_torch_state_dict(model, checkpoint, partition_ratio=BETA), variables
    )


@pytest.mark.parametrize("prefix", ["net.", "model.backbone."])
def test_a_common_prefix_that_is_no_wrappers_is_named(model, state_dict, prefix):
    other = {f"{prefix}{name}": x for name, x in state_dict.items()}
    told = rf"nothing was loaded; all names begin with '{prefix}', without which \d+ of \d+"
    with pytest.raises(UserError, match=told):
        from_torch_state_dict(model, other, partition_ratio=BETA)
    with pytest.raises(UserError, match=r"missing") as error:
        from_torch_state_dict(model, {"some.weight": np.zeros(3)}, partition_ratio=BETA)
    assert "all names begin" not in str(error.value)


def test_a_common_prefix_before_our_own_names_is_named(tmp_path, model, variables):
    names = {"/".join(key): x for key, x in flatten(variables).items()}
    np.savez(tmp_path / "w.npz", **{f"teacher.{name}": x for name, x in names.items()})
    with pytest.raises(UserError, match=r"all names begin with 'teacher\.', without which"):
        load_trunk(tmp_path / "w.npz", model, variables)


def test_names_that_would_become_one_are_left_alone():
    assert unwrapped({"module.a": 1, "a": 2}) == {"module.a": 1, "a": 2}
    assert unwrapped({"module": 1}) == {"module": 1}


def test_what_is_no_state_dict_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no state_dict that can be found, but list"):
        load_weights(path)
    torch.save(torch.nn.Linear(2, 3), path)
    with pytest.raises(UserError, match=r"holds more than weights.*save model.state_dict"):
        load_weights(path)


# Starting the trunk from a checkpoint


@pytest.fixture(scope="module")
def fresh(variables):
    return jax.tree.map(lambda x: jnp.zeros(x.shape), variables)


@pytest.fixture(scope="module")
def vgg_fresh(vgg_variables):
    return jax.tree.map(lambda x: jnp.zeros(x.shape), vgg_variables)


def check_trunk(loaded, variables):
    for collection, tree in loaded.items():
        for name, leaves in tree.items():
            for path, leaf in traverse_util.flatten_dict(leaves).items():
                expected = traverse_util.flatten_dict(variables[collection][name])[path]
                expected = np.zeros_like(expected) if name.startswith("head") else expected
                np.testing.assert_array_equal(leaf, expected)
                assert leaf.dtype == jnp.float32


def test_trunk_from_our_names(tmp_path, model, variables, fresh):
    wide = jax.tree.map(np.float64, variables)
    save_weights(tmp_path / "w.safetensors", wide)
    check_trunk(load_trunk(tmp_path / "w.safetensors", model, fresh), variables)


def test_trunk_from_a_checkpoint_of_one_exit(tmp_path, model, variables, fresh):
    last = f"head{model.num_exits}"
    trunk = {
        collection: {k: v for k, v in tree.items() if not k.startswith("head") or k == last}
        for collection, tree in variables.items()
    }
    save_weights(tmp_path / "w.npz", trunk)
    check_trunk(load_trunk(tmp_path / "w.npz", model, fresh), variables)


def test_trunk_from_published_names_of_any_ratio(tmp_path, model, variables, fresh):
    state_dict = to_torch_state_dict(model, variables, partition_ratio=0.8)
    np.savez(tmp_path / "w.npz", **state_dict, **{"fc.weight": np.zeros((10, 3))})
    check_trunk(load_trunk(tmp_path / "w.npz", model, fresh), variables)


def test_a_trunk_that_does_not_fit_is_refused_by_name(tmp_path, vgg, vgg_variables, vgg_fresh):
    flat = traverse_util.flatten_dict(vgg_variables, sep="/")
    path = "params/block1/conv/kernel"
    wrong = {name: array for name, array in flat.items() if name != path}
    wrong |= {"params/block99/conv/kernel": np.zeros(2), "batch_stats/block2/norm/var": np.zeros(4)}
    np.savez(tmp_path / "w.npz", **wrong)
    with pytest.raises(UserError) as caught:
        load_trunk(tmp_path / "w.npz", vgg, vgg_fresh)
    message = str(caught.value)
    assert "w.npz does not fit the model, nothing was loaded" in message
    assert f"missing: {path};" in message
    assert "unexpected: params/block99/conv/kernel;" in message
    assert "misshapen: batch_stats/block2/norm/var is [4] instead of" in message


def test_a_published_trunk_that_does_not_fit_is_refused_by_name(
    tmp_path, vgg, vgg_fresh, vgg_state_dict
):
    wrong = dict(vgg_state_dict)
    del wrong["feature_extractors.1.conv_p.weight"]
    np.savez(tmp_path / "w.npz", **wrong, stray=np.zeros(2))
    message = r"missing: feature_extractors.1.conv_p.weight; unexpected: stray"
    with pytest.raises(UserError, match=message):
        load_trunk(tmp_path / "w.npz", vgg, vgg_fresh)
