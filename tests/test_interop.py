"""Weights from and to other programs, and parity with golden numbers."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from dfs_jax.interop import __main__ as program
from dfs_jax.interop import (
    from_torch_state_dict,
    load_trunk,
    load_weights,
    save_weights,
    to_torch_gradients,
    to_torch_state_dict,
)
from dfs_jax.interop import golden as golden_files
from dfs_jax.interop.torch_names import FAMILIES, family_of
from dfs_jax.models import create_model
from dfs_jax.types import UserError

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = sorted(FIXTURES.glob("*.json.gz"))
CLASSES, BETA = 7, 0.3
# A small model of each family that has published names.
FAMILY_ROWS = {
    "VGG": ("vgg7", {"width": 5}),
}


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=FAMILY_ROWS)
def model(request):
    name, options = FAMILY_ROWS[request.param]
    return create_model(name, num_classes=CLASSES, **options)


@pytest.fixture(scope="module")
def variables(model):
    """Random variables, every tensor different."""
    entries = family_of(model).entries(model)
    shape = (1, *family_of(model).image_shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    leaves = {
        entry.path: normal(i, traverse_util.flatten_dict(shapes)[entry.path].shape)
        for i, entry in enumerate(entries)
    }
    return traverse_util.unflatten_dict(leaves)


@pytest.fixture(scope="module")
def state_dict(model, variables):
    return to_torch_state_dict(model, variables, partition_ratio=BETA)


# Names and layouts


def test_there_and_back(model, variables, state_dict):
    chex.assert_trees_all_equal(
        from_torch_state_dict(model, state_dict, partition_ratio=BETA), variables
    )


def test_every_family_has_its_row():
    assert FAMILY_ROWS.keys() == FAMILIES.table.keys()


@pytest.fixture(scope="module")
def vgg():
    return create_model("vgg7", num_classes=CLASSES, width=5)


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


def test_halves_of_any_width_where_no_ratio_is_given(vgg, state_dict):
    back = from_torch_state_dict(vgg, state_dict, partition_ratio=None)
    chex.assert_trees_all_equal(back, from_torch_state_dict(vgg, state_dict, partition_ratio=BETA))
    with pytest.raises(UserError, match=r"conv_p.weight is \[10, 2, 3, 3\] instead of \[10, 4,"):
        from_torch_state_dict(vgg, state_dict, partition_ratio=0.8)


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


def test_all_names_that_do_not_fit_are_listed(vgg, state_dict):
    wrong = dict(state_dict)
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
    wrong = {"params": {**variables["params"], "neck": np.zeros(2)}, "batch_stats": {}}
    with pytest.raises(UserError, match=r"missing: batch_stats/.*unexpected: params/neck"):
        to_torch_state_dict(model, wrong)


def test_a_model_without_published_names_is_refused():
    with pytest.raises(UserError, match=r"Dense has no published PyTorch names: only .* VGG"):
        from_torch_state_dict(nn.Dense(3), {})


# Files


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_saved_weights_load_the_same(tmp_path, variables, ending):
    transposed = jax.tree.map(np.asfortranarray, variables)
    save_weights(tmp_path / f"w{ending}", transposed)
    flat = load_weights(tmp_path / f"w{ending}")
    assert "params/block1/conv/kernel" in flat
    chex.assert_trees_all_equal(traverse_util.unflatten_dict(flat, sep="/"), variables)
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


def test_pytorchs_files_need_pytorch(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    path.write_bytes(b"some")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs PyTorch: pip install torch, or convert"):
        load_weights(path)


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


# Starting the trunk from a checkpoint


@pytest.fixture(scope="module")
def fresh(variables):
    return jax.tree.map(lambda x: jnp.zeros(x.shape), variables)


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


def test_a_trunk_that_does_not_fit_is_refused_by_name(tmp_path, model, variables, fresh):
    flat = traverse_util.flatten_dict(variables, sep="/")
    path = "params/block1/conv/kernel"
    wrong = {name: array for name, array in flat.items() if name != path}
    wrong |= {"params/block99/conv/kernel": np.zeros(2), "batch_stats/block2/norm/var": np.zeros(4)}
    np.savez(tmp_path / "w.npz", **wrong)
    with pytest.raises(UserError) as caught:
        load_trunk(tmp_path / "w.npz", model, fresh)
    message = str(caught.value)
    assert "w.npz does not fit the model, nothing was loaded" in message
    assert f"missing: {path};" in message
    assert "unexpected: params/block99/conv/kernel;" in message
    assert "misshapen: batch_stats/block2/norm/var is [4] instead of" in message


def test_a_published_trunk_that_does_not_fit_is_refused_by_name(tmp_path, vgg, fresh, state_dict):
    wrong = dict(state_dict)
    del wrong["feature_extractors.1.conv_p.weight"]
    np.savez(tmp_path / "w.npz", **wrong, stray=np.zeros(2))
    message = r"missing: feature_extractors.1.conv_p.weight; unexpected: stray"
    with pytest.raises(UserError, match=message):
        load_trunk(tmp_path / "w.npz", vgg, fresh)


# Golden numbers


@pytest.fixture
def x64():
    """Leaves jax in the precision it was in, whatever the program sets."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


def leaves_of(tree):
    return traverse_util.flatten_dict(json.loads(json.dumps(tree)))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name.partition(".")[0])
def test_fixtures_are_what_their_script_makes(path):
    with gzip.open(path) as file:
        stored = leaves_of(json.load(file))
    made = leaves_of(make_golden.golden(path.name.removesuffix(".json.gz")))
    assert stored.keys() == made.keys()
    for key, value in made.items():
        if isinstance(value, float) or key[-1] in ("head", "eval_logits", "train_logits"):
            np.testing.assert_allclose(stored[key], value, rtol=1e-9, atol=2e-12, err_msg=str(key))
        else:
            assert stored[key] == value, key


def test_hand_written_gradients_agree_with_finite_differences():
    """The independent implementation is itself right: the plain network, along one direction."""
    shapes = make_golden.tensor_shapes(0.5, adapts=True)
    weights = {name: make_golden.draw(name, shape) for name, shape in shapes}
    masks = make_golden.view_masks(False, False, "full", 0.5)
    images = np.random.default_rng(0).normal(size=(3, 3, 8, 8))
    network = make_golden.Network(weights, masks, adapts=True)
    _, d_logits, d_features = make_golden.deep_supervision(*network.forward(images, train=True))
    gradients = network.backward(d_logits, d_features)
    direction = {name: normal(i, g.shape) for i, (name, g) in enumerate(gradients.items())}

    def loss(step):
        moved = {
            n: weights[n] + step * direction[n] if n in direction else weights[n] for n in weights
        }
        network = make_golden.Network(moved, masks, adapts=True)
        return make_golden.deep_supervision(*network.forward(images, train=True))[0]

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(
        sum(np.vdot(g, direction[n]) for n, g in gradients.items()), slope, rtol=1e-5
    )


def test_our_models_compute_the_golden_numbers(x64, capsys, monkeypatch):
    monkeypatch.setitem(golden_files.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    assert program.main(["check", *map(str, GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["ok"] * len(GOLDEN)
    assert (
        "10 exact" in lines[1 + [path.name[:20] for path in GOLDEN].index("vgg7_narrow_partitio")]
    )


def test_the_authors_numbers(x64, shared_dir, capsys):
    files = sorted((shared_dir / "golden").glob("vgg7_dfs_beta0.25.json.gz"))
    assert program.main(["check", *map(str, files)]) == 0
    assert "ok" in capsys.readouterr().out


@pytest.mark.slow
def test_all_the_authors_numbers(x64, shared_dir, capsys):
    files = sorted((shared_dir / "golden").glob("vgg7_*.json.gz"))
    assert program.main(["check", *map(str, files)]) == 0
    assert capsys.readouterr().out.count(" ok") == len(files)


def altered(tmp_path, change):
    """Writes a golden file with one thing changed, and returns its path."""
    with gzip.open(FIXTURES / "vgg7_narrow_plain.json.gz") as file:
        fields = json.load(file)
    change(fields)
    path = tmp_path / "altered.json.gz"
    path.write_bytes(gzip.compress(json.dumps(fields).encode()))
    return str(path)


def test_other_numbers_fail_with_status_1(x64, tmp_path, capsys):
    path = altered(tmp_path, lambda fields: fields["losses"]["deep_supervision"].update(loss=20.0))
    assert program.main(["check", path]) == 1
    assert "FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(model="vgg99"), "unknown model 'vgg99'"),
        (lambda f: f.update(options={"depth": 3}), "no option 'depth'"),
        (lambda f: f.pop("labels"), "damaged or no golden file"),
        (lambda f: f.update(surprise=1), "damaged or no golden file"),
        (lambda f: f.update(labels=[1, 2]), r"labels are \[1, 2\]"),
        (lambda f: f.update(labels=[1, 2, 7]), "labels are"),
        (lambda f: f.update(exit_gradient="half"), "exit_gradient is 'half'"),
        (lambda f: f["eval_logits"][0].pop(), "damaged or no golden file"),
        (lambda f: f["batch_stats_after"].popitem(), "batch statistics are missing"),
        (lambda f: f.update(losses={}), "losses or batch statistics are missing"),
        (lambda f: f["losses"]["deep_supervision"]["grads"].popitem(), "names of deep_supervision"),
        (lambda f: f["losses"].update(other=f["losses"]["deep_supervision"]), "unknown loss"),
        (
            lambda f: [f[k].pop() for k in ("eval_logits", "train_logits")],
            "has 5 exits, but vgg7 h",
        ),
        (
            lambda f: f["state_dict"][0].__setitem__(1, [5, 4, 3, 3]),
            "misshapen: feature_extractors",
        ),
    ],
)
def test_what_cannot_be_checked_is_told_with_status_2(x64, tmp_path, capsys, change, message):
    assert program.main(["check", altered(tmp_path, change)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_missing_and_damaged_files_are_told_with_status_2(x64, tmp_path, capsys):
    assert program.main(["check", str(tmp_path / "absent.json.gz")]) == 2
    assert "there is no golden file" in capsys.readouterr().err
    whole = GOLDEN[0].read_bytes()
    for damaged in (whole[:1000], b"plain text", gzip.compress(b"[1]"), gzip.compress(b"{")):
        (tmp_path / "bad.json.gz").write_bytes(damaged)
        assert program.main(["check", str(GOLDEN[0]), str(tmp_path / "bad.json.gz")]) == 2
        captured = capsys.readouterr()
        assert "is damaged or no golden file" in captured.err
        assert not captured.out  # told before anything is computed


# What the comparison notices, on results made from a file's own numbers


def exact_results(case):
    """Results with the file's norms, sums and first values in arrays of six."""

    def array(digest):
        if digest is None:
            return np.zeros(6)
        head = np.asarray(digest["head"])
        # Two more values with the sum and the squares that are left.
        s = digest.get("sum", head.sum()) - head.sum()
        q = digest["norm"] ** 2 - (head**2).sum()
        root = np.sqrt(np.maximum(2 * q - s * s, 0))
        return np.append(head, [(s + root) / 2, (s - root) / 2])

    return golden_files.Results(
        case.eval_logits.copy(),
        case.train_logits.copy(),
        {name: array(digest) for name, digest in case.batch_stats_after.items()},
        {name: loss["loss"] for name, loss in case.losses.items()},
        {
            name: {n: array(d) for n, d in loss["grads"].items()}
            for name, loss in case.losses.items()
        },
    )


@pytest.fixture(scope="module")
def simple_case():
    """A golden file whose digests six values can have."""
    case = golden_files.read_golden(FIXTURES / "vgg7_narrow_partition_only.json.gz")
    digest = {"norm": 4.0, "sum": 3.0, "head": [1.0, -2.0, 0.5, 1.5]}
    losses = {
        name: {
            "loss": loss["loss"],
            "grads": {n: None if d is None else digest for n, d in loss["grads"].items()},
        }
        for name, loss in case.losses.items()
    }
    statistics = {name: {"norm": 4.0, "head": digest["head"]} for name in case.batch_stats_after}
    return dataclasses.replace(case, losses=losses, batch_stats_after=statistics)


def test_equal_numbers_pass(simple_case):
    comparison = golden_files.compare(simple_case, exact_results(simple_case))
    assert max(comparison.differences.values()) < 1e-12
    assert comparison.zeros == 10
    assert comparison.passes(1e-12)


STEM = "feature_extractors.0.0.weight"
DEAD = "feature_extractors.1.conv_s.weight"


def shift(array, index, amount):
    array[index] += amount


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda r: shift(r.eval_logits, (2, 1, 3), 1e-4), "eval logits"),
        (lambda r: shift(r.train_logits, (5, 0, 6), 1e-4), "train logits"),
        (lambda r: shift(r.train_logits, (5, 0, 6), np.nan), "train logits"),
        (
            lambda r: shift(r.batch_stats["feature_extractors.2.bn.running_var"], 3, 1e-4),
            "batch st",
        ),
        (lambda r: r.losses.update(deep_supervision=17.0), "losses"),
        (lambda r: shift(r.gradients["deep_supervision"][STEM], 5, 1e-4), "grad norms"),
        (lambda r: shift(r.gradients["deep_supervision"][STEM], 5, 1e-4), "grad sums"),
        (lambda r: shift(r.gradients["deep_supervision"][STEM], 1, 1e-4), "grad values"),
        (lambda r: shift(r.gradients["deep_supervision"][STEM], 1, np.nan), "grad norms"),
    ],
)
def test_every_kind_of_difference_is_noticed(simple_case, change, kind):
    results = exact_results(simple_case)
    change(results)
    comparison = golden_files.compare(simple_case, results)
    (worst,) = [value for name, value in comparison.differences.items() if name.startswith(kind)]
    assert not worst <= 1e-6
    assert not comparison.passes(1e-6)


def test_a_gradient_that_must_be_zero_and_is_tiny_fails(simple_case):
    results = exact_results(simple_case)
    results.gradients["deep_supervision"][DEAD][2] = 1e-30
    comparison = golden_files.compare(simple_case, results)
    assert comparison.nonzero == [DEAD]
    assert not comparison.passes(1e-6)


def test_dropout_is_off_in_the_training_pass():
    dropout = nn.Dropout(0.5, deterministic=False)
    x = jnp.arange(7.0)
    with nn.intercept_methods(golden_files._without_dropout):
        np.testing.assert_array_equal(dropout.apply({}, x), x)
