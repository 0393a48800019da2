"""Exported networks: equal to what was exported, without flax, and clear about what is damaged."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image

from dfs_jax.inference import load_exported
from dfs_jax.inference.export_network import export_network
from dfs_jax.inference.manifest import FILE as MANIFEST
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.stablehlo import PLATFORMS
from dfs_jax.inference.stages import model_stages, recorded_logits, run_stages
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.types import UserError
from tests.models.test_contract import (
    SMALL_BASIC_RESNET,
    SMALL_BOTTLENECK_RESNET,
    SMALL_MSDNET,
    SMALL_VIT,
)

LABELS = ("ant", "bee", "cat")
EXAMPLE = jax.ShapeDtypeStruct((8, 8, 3), np.uint8)


def tiny_stages():
    """Two exits whose carry is two arrays, with weights in dictionaries."""
    draw = np.random.default_rng(1)
    names = {1: ("kernel", "small", "head"), 2: ("both", "head")}
    shapes = {"kernel": (3, 5), "small": (5, 2), "both": (7, 7), "head": (7, 3)}
    weights = [
        {f"block{i}": {name: draw.standard_normal(shapes[name], np.float32) for name in some}}
        for i, some in names.items()
    ]

    def first(weights, images):
        w = weights["params"]["block1"]
        x = jnp.tanh((images / 127.5 - 1).mean(1) @ w["kernel"])
        scales = {"large": x, "small": x.mean(1) @ w["small"]}
        return scales, jnp.concatenate([x.mean(1), scales["small"]], axis=1) @ w["head"]

    def second(weights, scales):
        w = weights["params"]["block2"]
        x = jnp.concatenate([scales["large"].max(1), scales["small"]], axis=1)
        return None, jnp.tanh(x @ w["both"]) @ w["head"]

    return [Partial(f, {"params": w}) for f, w in zip((first, second), weights, strict=True)]


FAMILIES = {
    "vgg7": {"width": 3},
    "resnet18": SMALL_BASIC_RESNET,
    "resnet50": SMALL_BOTTLENECK_RESNET,
    "vit_tiny": SMALL_VIT,
    "msdnet": {**SMALL_MSDNET, "base": 1, "step": 1},
}


def network_stages(name, variables=None):
    """The stages of a narrow network of a family."""
    model = create_model(name, num_classes=3, **FAMILIES[name])
    if variables is None:
        variables = init_variables(model, jax.random.key(0), EXAMPLE.shape)
    return model_stages(
        model, variables, FeatureSurgery(0.5), EXAMPLE, prepare=lambda x: x / 127.5 - 1
    )


@pytest.fixture(scope="module")
def stages():
    return tiny_stages()


OPTIONS = {"batch_size": 11, "shapes": (1, 11), "fall_back": False}


def some_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def policy(stages):
    return half_leaves(stages)


def half_leaves(stages):
    """A policy under which half of the images leave at the first exit."""
    return Policy((median_at_first(stages),), exit_shares=(0.5, 0.5), fitted_on={"data": "noise"})


def median_at_first(stages):
    """The confidence that half of the images reach at the first exit."""
    everybody = Policy((-1e8, *[None] * (len(stages) - 2)))
    first = EarlyExitPredictor(stages, EXAMPLE, everybody, **OPTIONS)(some_images(11))
    return float(np.sort(first.confidence)[5:7].mean())


@pytest.fixture(scope="module")
def directory(tmp_path_factory, stages, policy):
    path = tmp_path_factory.mktemp("exported")
    export_network(path, stages, EXAMPLE, labels=LABELS, policy=policy, about={"model": "msdnet"})
    return path


@pytest.mark.parametrize("n", [1, 11])
def test_the_export_is_the_network(directory, stages, policy, n):
    network = load_exported(directory)
    assert network.labels == LABELS
    assert network.policy == policy
    assert network.example == EXAMPLE
    assert network.image_size == 8
    assert network.manifest["about"] == {"model": "msdnet"}
    got = network.predictor(**OPTIONS)(some_images(n))
    expected = EarlyExitPredictor(stages, EXAMPLE, policy, **OPTIONS)(some_images(n))
    np.testing.assert_array_equal(got.exit_index, expected.exit_index)
    np.testing.assert_array_equal(got.predicted, expected.predicted)
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=1e-6)
    if n > 1:
        assert set(got.exit_index) == {0, 1}


QUICK = ("resnet18", "vit_tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FAMILIES]
)
def test_every_family_is_written_for_any_batch(name):
    """As far as it goes without values: shapes that follow the batch, on every platform."""
    model = create_model(name, num_classes=3, **FAMILIES[name])
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), EXAMPLE.shape))
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *EXAMPLE.shape), EXAMPLE.dtype)
    run = jax.jit(lambda weights, x: run_stages(network_stages(name, weights), x))
    program = jax.export.export(run, platforms=PLATFORMS)(variables, images)
    assert str(program.out_avals[0].shape) == f"({model.num_exits}, batch, 3)"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_from_its_files_as_before(tmp_path, name):
    stages = network_stages(name)
    policy = Policy((median_at_first(stages), *[None] * (len(stages) - 2)))
    export_network(tmp_path, stages, EXAMPLE, labels=LABELS, policy=policy)
    got = load_exported(tmp_path).predictor(**OPTIONS)(some_images(11))
    expected = EarlyExitPredictor(stages, EXAMPLE, policy, **OPTIONS)(some_images(11))
    np.testing.assert_array_equal(got.exit_index, expected.exit_index)
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=1e-6)
    assert set(got.exit_index) == {0, len(stages) - 1}


def test_it_is_for_every_platform_and_any_batch(directory):
    manifest = json.loads((directory / MANIFEST).read_text())
    for i, entry in enumerate(manifest["formats"]["stablehlo"]["stages"]):
        program = jax.export.deserialize(bytearray((directory / entry["file"]).read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert str(program.out_avals[-1].shape) == "(batch, 3)"
        assert entry["weights"]
        assert all(f"{i + 1}" in name.split("/")[1] for name in entry["weights"])


SCRIPT = """
import sys
import numpy as np
from dfs_jax.inference import load_exported
network = load_exported(sys.argv[1])
predictor = network.predictor(batch_size=1)
print(predictor(np.zeros((1, 8, 8, 3), np.uint8)).predicted.tolist())
from dfs_jax.inference import classify
unwanted = {"flax", "optax", "chex", "orbax", "tensorflow_datasets", "ml_collections", "absl"}
print(sorted(unwanted & set(sys.modules)))
"""


def test_jax_alone_runs_it(directory):
    """In a process of its own: none of what training needs is imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, directory], capture_output=True, text=True, check=True
    )
    predicted, unwanted = done.stdout.splitlines()
    assert predicted in ("[0]", "[1]", "[2]")
    assert unwanted == "[]"


def test_an_export_again_replaces_the_old_one(tmp_path, stages, policy):
    export_network(tmp_path, stages, EXAMPLE, labels=LABELS, policy=policy)
    export_network(tmp_path, stages, EXAMPLE, labels=LABELS[::-1])
    network = load_exported(tmp_path)
    assert network.labels == LABELS[::-1]
    assert network.policy.thresholds == (None,)


@pytest.mark.parametrize("name", ["stage2.stablehlo", "weights.safetensors", "policy.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_is_told(tmp_path, directory, name, damage):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content if damage == "flipped" else content[:-7])
    if damage == "gone":
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name) as told:
        load_exported(tmp_path)
    assert ("No such file" if damage == "gone" else "is damaged") in str(told.value)


MANIFESTS = {"": "is not JSON", "[]": '"version" is None', '{"version": 7}': '"version" is 7'}


@pytest.mark.parametrize("content", MANIFESTS)
def test_other_manifests(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=MANIFESTS[content]):
        load_exported(tmp_path)


def test_mistakes(tmp_path, stages):
    with pytest.raises(UserError, match="there is no exported network in"):
        load_exported(tmp_path)
    with pytest.raises(UserError, match="3 classes take 3 labels, got 2"):
        export_network(tmp_path, stages, EXAMPLE, labels=LABELS[:2])
    with pytest.raises(UserError, match="the policy is for 3 exits, the network has 2"):
        export_network(tmp_path, stages, EXAMPLE, labels=LABELS, policy=Policy((0.5, 0.5)))
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"file is a file: name a directory"):
        export_network(file, stages, EXAMPLE, labels=LABELS)


def photo(path, size, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_classify_real_files(directory, tmp_path, capsys):
    """Good ones are answered whatever lies between them, each in a line."""
    from dfs_jax.inference.classify import main

    good = [photo(tmp_path / "one.png", (8, 8)), photo(tmp_path / "two.jpg", (23, 17), 1)]
    empty, cut = tmp_path / "empty.jpg", tmp_path / "cut.png"
    empty.write_bytes(b"")
    cut.write_bytes(good[0].read_bytes()[:60])
    missing = tmp_path / "missing.png"
    status = main([str(directory), *map(str, (good[0], empty, cut, missing, good[1]))])
    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert len(lines) == 5
    for line, path in zip((lines[0], lines[4]), good, strict=True):
        assert line.startswith(f"{path}: ")
        label, exit_, confidence, milliseconds = line.partition(": ")[2].split(", ")
        assert label in LABELS
        assert exit_ in ("exit 1", "exit 2")
        assert 1 / 3 <= float(confidence.removeprefix("confidence ")) <= 1
        assert float(milliseconds.removesuffix(" ms")) > 0
    for line, path in zip(lines[1:4], (empty, cut, missing), strict=True):
        assert line.startswith("error: 1 image cannot be read: ")
        assert str(path) in line
    image = np.asarray(Image.open(good[0]))[None]
    logits = recorded_logits(load_exported(directory).stages, [(image, np.ones(1, bool))])
    exit_index = int(lines[0].partition(", exit ")[2][0]) - 1
    assert LABELS[logits[exit_index, 0].argmax()] in lines[0]
    assert main([str(directory), str(good[0])]) == 0
    assert main([str(tmp_path), str(good[0])]) == 2
    assert "there is no exported network" in capsys.readouterr().err


def test_classify_directories(directory, tmp_path, capsys):
    """Searched with those below; one unreadable image changes the status, and is counted."""
    from dfs_jax.inference.classify import main

    folder = tmp_path / "photos"
    (folder / "2024").mkdir(parents=True)
    photos = [photo(folder / "one.png", (8, 8)), photo(folder / "2024" / "two.jpg", (23, 17), 1)]
    (folder / "notes.txt").write_text("no image")
    assert main([str(directory), str(folder)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == sorted(map(str, photos))
    assert last.startswith("2 images: ")
    assert last.endswith("; 0 unreadable")
    (folder / "broken.gif").write_bytes(b"GIF8")
    assert main([str(directory), str(folder), str(photos[0])]) == 1
    out = capsys.readouterr().out
    assert "broken.gif (damaged GIF)" in out
    assert out.splitlines()[-1].startswith("4 images: ")
    assert out.splitlines()[-1].endswith("; 1 unreadable")
    (tmp_path / "none").mkdir()
    assert main([str(directory), str(tmp_path / "none")]) == 2
    assert "holds no images: they end in .apng" in capsys.readouterr().err
