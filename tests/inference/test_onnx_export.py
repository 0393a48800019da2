"""Networks exported as ONNX: equal to jax's, without jax, checked on loading, and in int8."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax import exit_logits, stages_of
from dfs_jax.inference import (
    AnytimePredictor,
    EarlyExitPredictor,
    load_exported,
    onnx_models,
    quantize,
)
from dfs_jax.inference.export_network import export_network
from dfs_jax.inference.manifest import FILE as MANIFEST
from dfs_jax.inference.onnx_stages import OnnxStage, OnnxStages
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.stages import recorded_logits, run_stages
from dfs_jax.types import UserError
from tests.inference.test_exported import (
    EXAMPLE,
    FAMILIES,
    LABELS,
    OPTIONS,
    half_leaves,
    median_at_first,
    network_stages,
    some_images,
    tiny_stages,
)

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUICK = ("vgg7",)


@pytest.fixture(scope="module")
def stages():
    return tiny_stages()


@pytest.fixture(scope="module")
def directory(tmp_path_factory, stages):
    path = tmp_path_factory.mktemp("exported")
    policy, formats = half_leaves(stages), ("stablehlo", "onnx")
    export_network(path, stages, EXAMPLE, labels=LABELS, policy=policy, formats=formats)
    return path


def copied(directory, target):
    target.mkdir(exist_ok=True)
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FAMILIES]
)
def test_every_family_answers_as_in_jax(tmp_path, name):
    stages = network_stages(name)
    policy = Policy((median_at_first(stages), *[None] * (len(stages) - 2)))
    export_network(tmp_path, stages, EXAMPLE, labels=LABELS, policy=policy, formats=["onnx"])
    network, images = load_exported(tmp_path), some_images(11)
    assert not (tmp_path / "weights.safetensors").exists()
    batches = [(images[:7], np.ones(7, bool)), (images[7:], np.array([True, False, True, True]))]
    expected = np.asarray(run_stages(stages, images))
    scale = np.abs(expected).max()
    keep = np.arange(11) != 8
    got = recorded_logits(network.stages, batches)
    np.testing.assert_allclose(got, expected[:, keep], atol=1e-5 * scale, rtol=1e-5)
    last = network.stages.last_logits(images)
    np.testing.assert_allclose(last, expected[-1], atol=1e-5 * scale, rtol=1e-5)
    ours = network.predictor(**OPTIONS)(images)
    theirs = EarlyExitPredictor(stages, EXAMPLE, policy, **OPTIONS)(images)
    np.testing.assert_array_equal(ours.exit_index, theirs.exit_index)
    np.testing.assert_array_equal(ours.predicted, theirs.predicted)
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)


def marked(params, x):
    x = jnp.tanh(x.reshape(x.shape[0], 6) @ params["a"])
    exit_logits(0, x[:, :3])
    rows = jnp.moveaxis(x.reshape(x.shape[0], 2, 3) * 2, 0, 1)  # a carry without the batch first
    exit_logits(1, jnp.tanh(rows).sum(0) @ params["b"])


def test_a_function_of_ones_own(tmp_path):
    draw = np.random.default_rng(2)
    params = {
        "a": jnp.asarray(draw.normal(size=(6, 6)), jnp.float32),
        "b": jnp.asarray(draw.normal(size=(3, 3)), jnp.float32),
    }
    example = jax.ShapeDtypeStruct((2, 3), np.float32)
    stages = stages_of(marked, params, example)
    export_network(tmp_path, stages, example, labels=LABELS, formats=["onnx"])
    network, x = load_exported(tmp_path), draw.normal(size=(5, 2, 3)).astype(np.float32)
    got = recorded_logits(network.stages, [(x, np.ones(5, bool))])
    np.testing.assert_allclose(got, run_stages(stages, x), rtol=1e-5, atol=1e-6)
    assert network.image_size is None


@pytest.mark.parametrize(
    ("measure", "sizes"),
    [
        pytest.param("max_softmax", [40], marks=pytest.mark.slow),
        pytest.param("entropy", [7] * 5, marks=pytest.mark.slow),
        ("margin", [1, 30, 2]),
        ("patience", [7] * 4),
    ],
)
def test_measures_in_streams_of_any_sizes(directory, stages, measure, sizes):
    threshold = {"patience": 2.0, "entropy": 0.2}.get(measure, 0.6)
    policy = Policy((threshold,), measure=measure, temperatures=(1.5, 0.7))
    network = load_exported(directory, format="onnx")
    images = some_images(sum(sizes), seed=3)
    parts = np.split(images, np.cumsum(sizes)[:-1])
    got = list(network.predictor(policy, **OPTIONS).stream(iter(parts), max_wait=None))
    expected = EarlyExitPredictor(stages, EXAMPLE, policy, **OPTIONS)(images)
    assert [p.exit_index for p in got] == expected.exit_index.tolist()
    assert [p.predicted for p in got] == expected.predicted.tolist()
    np.testing.assert_allclose([p.confidence for p in got], expected.confidence, atol=1e-5)
    for k, image in enumerate(images[:3]):  # one at a time
        alone = network.predictor(policy, **OPTIONS)(image[None])
        assert alone.exit_index[0] == expected.exit_index[k]


@pytest.mark.parametrize("ensemble", [None, "mean", "product"])
def test_anytime_answers(directory, stages, ensemble):
    network, images = load_exported(directory, format="onnx"), some_images(9)
    options = {"ensemble": ensemble, "monotone": True}
    got = list(AnytimePredictor(network.stages, **options)(images))
    for ours, theirs in zip(got, AnytimePredictor(stages, **options)(images), strict=True):
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)


def test_pixels_and_logits_that_are_not_finite():
    class Broken:
        names = ("x",)
        carry = (EXAMPLE,)

        def __call__(self, carry):
            return (), np.full((len(carry[0]), 3), np.nan, np.float32)

    predictor = EarlyExitPredictor(OnnxStages([Broken()]), EXAMPLE, batch_size=4)
    reason = "the network's answer is not a finite number"
    assert predictor(some_images(2)).errors == {0: reason, 1: reason}


WITHOUT_JAX = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        known = ("jax", "jaxlib", "flax", "scipy", "safetensors", "absl", "onnx", "ml_collections")
        if name.partition(".")[0] in known:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refused())
import numpy as np
from dfs_jax import load_exported
from dfs_jax.inference import AnytimePredictor, classify
network = load_exported(sys.argv[1])
images = np.load(sys.argv[2])
predictor = network.predictor(batch_size=11, fall_back=False)
print(predictor(images).predicted.tolist())
print([p.predicted for p in predictor.stream([images[:4], images[4:]])])
print(len(list(AnytimePredictor(network.stages)(images))))
print(classify.main([sys.argv[1], sys.argv[3]]))
"""


def test_it_runs_without_jax(directory, stages, tmp_path):
    from PIL import Image

    images = some_images(11)
    np.save(tmp_path / "images.npy", images)
    Image.fromarray(images[0]).save(tmp_path / "one.png")
    paths = [directory, tmp_path / "images.npy", tmp_path / "one.png"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = EarlyExitPredictor(stages, EXAMPLE, half_leaves(stages), **OPTIONS)(images)
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1] == str(expected.predicted.tolist())
    assert lines[2] == "2"
    assert LABELS[expected.predicted[0]] in lines[3]
    assert lines[4] == "0"


def test_formats(directory, stages, tmp_path):
    assert isinstance(load_exported(directory).stages, OnnxStages)
    assert not isinstance(load_exported(directory, format="stablehlo").stages, OnnxStages)
    export_network(tmp_path, stages, EXAMPLE, labels=LABELS)
    assert not isinstance(load_exported(tmp_path).stages, OnnxStages)
    with pytest.raises(UserError, match="holds stablehlo, not onnx: export again with --format"):
        load_exported(tmp_path, format="onnx")
    with pytest.raises(UserError, match="format must be 'stablehlo' or 'onnx', got 'tflite'"):
        load_exported(tmp_path, format="tflite")
    with pytest.raises(UserError, match="formats must be some of stablehlo, onnx, got"):
        export_network(tmp_path, stages, EXAMPLE, labels=LABELS, formats=["tflite"])


def test_providers_that_are_not_there(directory):
    with pytest.raises(UserError, match=r"this onnxruntime has no NoSuchProvider: it has .*CPU"):
        load_exported(directory, format="onnx", providers=["NoSuchProvider"])
    with pytest.raises(UserError, match="ONNX Runtime's, this export is StableHLO"):
        load_exported(directory, format="stablehlo", providers=["CPUExecutionProvider"])


def changed(field):
    def change(manifest):
        manifest.pop(field)

    return change


def with_name(name):
    def change(manifest):
        manifest["formats"]["onnx"]["stages"][0]["file"] = name
        manifest["sha256"][name] = "0" * 64

    return change


def unlisted(manifest):
    del manifest["sha256"]["stage2.onnx"]


MANIFESTS = {
    "no checksums": (changed("sha256"), 'its field "sha256" is missing or wrong: export again'),
    "no labels": (changed("labels"), 'its field "labels" is missing or wrong'),
    "no image": (changed("image"), 'its field "image" is missing or wrong'),
    "no type": (
        lambda m: m["image"].update(dtype="colour"),
        'its field "image" is missing or wrong',
    ),
    "no formats": (changed("formats"), 'its field "formats" is missing or wrong'),
    "unlisted": (unlisted, "it has no checksum of stage2.onnx"),
    "outside": (with_name("../stage1.onnx"), r"it names '../stage1.onnx', which is no file of"),
    "absolute": (with_name("/etc/passwd"), "it names '/etc/passwd', which is no file of"),
    "backslash": (with_name("..\\stage1.onnx"), "which is no file of its directory"),
    "no stages": (lambda m: m["formats"]["onnx"].update(stages=[]), '"formats" is missing or'),
    "newer": (lambda m: m.update(version=3), '"version" is 3, this program reads 1 to 2'),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_cannot_be_trusted(directory, tmp_path, name):
    change, message = MANIFESTS[name]
    target = copied(directory, tmp_path / "copy")
    manifest = json.loads((target / MANIFEST).read_text())
    change(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        load_exported(target)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["stage2.onnx", "network.onnx"])
def test_damage_is_told(directory, tmp_path, name, damage):
    target = copied(directory, tmp_path / "copy")
    content = bytearray((target / name).read_bytes())
    content[len(content) // 2] ^= 1
    (target / name).write_bytes(content if damage == "flipped" else content[:-7])
    if damage == "gone":
        (target / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*(damaged|No such file)"):
        load_exported(target)


def test_a_file_of_another_network(directory, tmp_path, stages):
    """With checksums that fit: ONNX Runtime refuses it, or its shapes do not follow."""
    import hashlib

    for content, message in (
        (b"no model", "ONNX Runtime does not accept the model"),
        ((directory / "stage1.onnx").read_bytes(), "the files are of different networks"),
    ):
        target = copied(directory, tmp_path / "copy")
        (target / "stage2.onnx").write_bytes(content)
        manifest = json.loads((target / MANIFEST).read_text())
        manifest["sha256"]["stage2.onnx"] = hashlib.sha256(content).hexdigest()
        (target / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=message):
            load_exported(target, format="onnx").predictor()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage1.stablehlo", "stage1.stablehlo is no program that this version of jax reads"),
        ("weights.safetensors", "weights.safetensors holds no weights"),
    ],
)
def test_stablehlo_that_is_none(directory, tmp_path, name, message):
    """With checksums that fit."""
    import hashlib

    target = copied(directory, tmp_path / "copy")
    (target / name).write_bytes(b"something else")
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["sha256"][name] = hashlib.sha256(b"something else").hexdigest()
    (target / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        load_exported(target, format="stablehlo")


def test_weights_that_a_stage_lacks(directory, tmp_path):
    target = copied(directory, tmp_path / "copy")
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["formats"]["stablehlo"]["stages"][0]["weights"].append("params/none")
    (target / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"stage1.stablehlo reads weights that are not there"):
        load_exported(target, format="stablehlo")


def test_an_export_of_the_first_version(directory, tmp_path, stages):
    target = copied(directory, tmp_path / "copy")
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["version"], formats = 1, manifest.pop("formats")
    manifest["stages"] = formats["stablehlo"]["stages"]
    (target / MANIFEST).write_text(json.dumps(manifest))
    got = load_exported(target).predictor(**OPTIONS)(some_images(5))
    expected = EarlyExitPredictor(stages, EXAMPLE, half_leaves(stages), **OPTIONS)(some_images(5))
    np.testing.assert_array_equal(got.predicted, expected.predicted)


def test_a_session_of_ones_own_beside_it(directory):
    """The default leaves other sessions of the process alone."""
    import onnxruntime

    load_exported(directory, format="onnx").predictor(batch_size=4)(some_images(4))
    model = (directory / "stage1.onnx").read_bytes()
    onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


SHARED = """
import sys, numpy as np
from dfs_jax import load_exported
networks = [load_exported(sys.argv[1], share_threads=s, format="onnx") for s in (True, False)]
for network in networks:
    print(network.predictor(batch_size=4, fall_back=False)(np.load(sys.argv[2])).predicted.tolist())
"""


def test_threads_that_are_shared(directory, tmp_path):
    np.save(tmp_path / "images.npy", some_images(9))
    done = subprocess.run(
        [sys.executable, "-c", SHARED, directory, tmp_path / "images.npy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.splitlines()
    assert one == other


def test_int8_has_weights_and_ranges_of_its_own():
    stages = network_stages("vgg7")
    contents, about = onnx_models.written(stages, EXAMPLE)
    images = some_images(40)
    quantised, described = quantize.quantized(contents, about, images)
    assert set(quantised) == set(contents)
    assert described["precision"] == "int8"
    assert described["fingerprint"] != about["fingerprint"]
    int8 = quantize.opened(quantised, described)
    assert {x.dtype for stage in int8 for x in stage.carry} == {np.dtype(np.uint8)}
    got = recorded_logits(int8, [(images, np.ones(40, bool))])
    expected = np.asarray(run_stages(stages, images))
    spread = expected.std(axis=(1, 2), keepdims=True)
    assert not np.array_equal(got, expected)
    assert np.abs((got - expected) / spread).mean() < 0.1
    np.testing.assert_allclose(int8.last_logits(images), got[-1], atol=0.2 * spread[-1].max())
    # The last layer of a head is in float, everything that convolves is not.
    onnx = pytest.importorskip("onnx")
    ops = [node.op_type for node in onnx.load_from_string(quantised["stage2.onnx"]).graph.node]
    assert "BatchNormalization" not in ops
    assert "QuantizeLinear" in ops
    for stage in int8:
        assert isinstance(stage, OnnxStage)
