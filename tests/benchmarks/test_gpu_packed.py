"""What travels to a machine without a network and back: the packed set, an unfinished run."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from benchmarks.gpu import pack as pack_program
from benchmarks.gpu import packed
from benchmarks.gpu.data import PackedDatasets
from benchmarks.gpu.packed import pack, unpack
from benchmarks.gpu.transport import read_run, restore_state, save_run
from dfs_jax.data.dataset import RawDataset, Split
from dfs_jax.data.sources import dataset_from_raw
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config


def noisy_set() -> RawDataset:
    """Noise, which no lossy encoding keeps: 53 training and 7 test images of 8x8."""
    draw = np.random.default_rng(0)

    def split(count):
        images = draw.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        return Split(images, draw.integers(0, 3, count).astype(np.int32))

    return RawDataset(split(53), split(7), ("a", "b", "c"))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_pixel_and_label_comes_back_in_order(tmp_path, parts):
    raw = noisy_set()
    paths = pack(raw, "noise", tmp_path, parts=parts)
    assert [path.name for path in paths] == [
        "noise.json",
        *(f"noise.part{i}.zip" for i in range(1, parts + 1)),
    ]
    found = unpack("noise", tmp_path)
    for split in ("train", "test"):
        for ours, theirs in zip(getattr(found, split), getattr(raw, split), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert found.class_names == raw.class_names


def test_parts_are_of_about_equal_size(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "IMAGES_A_STRIP", 4)
    _, first, second = pack(noisy_set(), "noise", tmp_path)
    assert 0.8 < first.stat().st_size / second.stat().st_size < 1.25


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_pixels(path):
    about = json.loads(path.read_text())
    about["pixels_sha256"]["test"] = "0" * 64
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("noise.part2.zip", damage, r"noise\.part2\.zip is damaged .*: copy it again$"),
        ("noise.part1.zip", lambda path: path.unlink(), r"part1\.zip is missing: copy every part"),
        ("noise.json", lambda path: path.write_text("{"), r"noise\.json is damaged .*: copy it"),
        ("noise.json", lambda path: path.write_text("[]"), r"noise\.json is damaged .*: copy it"),
        ("noise.json", lambda path: path.unlink(), r"there is no packed set .*gpu\.pack --output="),
        ("noise.json", other_pixels, "the images of noise test .* are not those that were packed"),
    ],
)
def test_what_was_damaged_on_the_way_is_one_sentence(tmp_path, name, spoil, message):
    pack(noisy_set(), "noise", tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(UserError, match=message):
        unpack("noise", tmp_path)


def test_no_parts():
    with pytest.raises(UserError, match="parts must be a whole number"):
        pack(noisy_set(), "noise", None, parts=0)  # type: ignore[arg-type]


def test_runs_get_the_set_that_a_config_describes(tmp_path):
    """Held out and normalised as where the set was read."""
    raw = noisy_set()
    pack(raw, "noise", tmp_path)
    config = tiny_config(**{"data.name": "noise", "data.validation_examples": 11})
    datasets = PackedDatasets(tmp_path)
    found = datasets.of(config)
    expected = dataset_from_raw("noise", raw, validation_examples=11)
    for split in ("train", "validation", "test"):
        for ours, theirs in zip(getattr(found, split), getattr(expected, split), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert (found.mean, found.std, found.name) == (expected.mean, expected.std, "noise")
    assert datasets.of(config) is found


def test_only_wheels_of_pure_python_are_fetched(tmp_path, monkeypatch):
    def download(made):
        def run(command, **options):
            (tmp_path / made).write_bytes(b"")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)

    version = importlib.metadata.version("absl-py")
    download(f"absl_py-{version}-py3-none-any.whl")
    assert pack_program.fetch_wheel("absl-py", tmp_path).name.startswith("absl_py-")
    version = importlib.metadata.version("numpy")
    download(f"numpy-{version}-cp311-cp311-linux.whl")
    with pytest.raises(UserError, match=r"no wheel of numpy==.*: it is not pure Python"):
        pack_program.fetch_wheel("numpy", tmp_path)
    with pytest.raises(UserError, match="no_such_package is not installed"):
        pack_program.fetch_wheel("no_such_package", tmp_path)


class State(NamedTuple):
    """Named as a run's state is."""

    params: Any
    opt_state: Any
    step: Any


def a_state() -> State:
    draw = np.random.default_rng(3)
    weights = draw.normal(size=(31, 7)).astype(np.float32)
    moments = draw.normal(size=(31, 7)).astype(np.float32)
    return State({"w": weights}, ({"w": moments}, np.int32(3)), np.uint32(12))


def target_of(state):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), state)


def saved(tmp_path, pieces_mib):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("lines\n")
    about = {"cell": "a/b/2ep/dfs/seed0", "step": 12}
    return save_run(
        run, a_state(), about, tmp_path / "out", piece_mib=300 / 2**20, pieces_mib=pieces_mib
    )


def test_a_run_travels_in_pieces_to_the_bit(tmp_path):
    manifest = saved(tmp_path, pieces_mib=1)
    sizes = [(tmp_path / "out" / name).stat().st_size for name in manifest["pieces"]]
    assert (max(sizes), len(sizes) > 1, manifest["rounded"]) == (300, True, False)
    found, content = read_run(tmp_path / "out")
    assert found == manifest
    assert found["files"] == {"metrics.jsonl": "lines\n"}
    restored = restore_state(found, content, target_of(a_state()))
    jax.tree.map(np.testing.assert_array_equal, restored, a_state())


def test_a_run_that_is_too_large_is_rounded(tmp_path):
    exact = sum(
        (tmp_path / "out" / n).stat().st_size for n in saved(tmp_path, pieces_mib=1)["pieces"]
    )
    manifest = saved(tmp_path, pieces_mib=(exact - 1) / 2**20)
    assert manifest["rounded"]
    found = restore_state(*read_run(tmp_path / "out"), target_of(a_state()))
    state = a_state()
    np.testing.assert_allclose(found.params["w"], state.params["w"], rtol=2**-16)
    np.testing.assert_allclose(found.opt_state[0]["w"], state.opt_state[0]["w"], rtol=2**-8)
    assert np.any(found.opt_state[0]["w"] != state.opt_state[0]["w"])
    assert (int(found.opt_state[1]), int(found.step)) == (3, 12)
    with pytest.raises(UserError, match=r"even when rounded.*raise --pieces_mib"):
        saved(tmp_path, pieces_mib=100 / 2**20)


def test_pieces_of_another_run_are_refused(tmp_path):
    assert read_run(tmp_path) is None
    saved(tmp_path, pieces_mib=1)
    found = read_run(tmp_path / "out")
    other = a_state()._replace(params={"w": np.zeros((31, 8), np.float32)})
    with pytest.raises(UserError, match="a/b/2ep/dfs/seed0 is of another network"):
        restore_state(*found, target_of(other))
    damage(tmp_path / "out" / "run.2")
    with pytest.raises(UserError, match=r"run\.2 is missing or damaged: copy it again"):
        read_run(tmp_path / "out")
