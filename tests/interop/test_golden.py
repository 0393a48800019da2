"""Parity with golden numbers: the authors' where they are at hand, and our own fixtures."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from dfs_jax.interop import __main__ as program
from dfs_jax.interop import golden as golden_files
from tests.support import make_golden

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = sorted(FIXTURES.glob("*.json.gz"))


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


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
        (lambda f: f.pop("labels"), "damaged or not a golden file"),
        (lambda f: f.update(surprise=1), "damaged or not a golden file"),
        (lambda f: f.update(labels=[1, 2]), r"labels are \[1, 2\]"),
        (lambda f: f.update(labels=[1, 2, 7]), "labels are"),
        (lambda f: f.update(exit_gradient="half"), "exit_gradient is 'half'"),
        (lambda f: f["eval_logits"][0].pop(), "damaged or not a golden file"),
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
        assert "is damaged or not a golden file" in captured.err
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
