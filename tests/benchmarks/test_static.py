"""Static networks beside the benchmark's policies: which are compared, how, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.inference.benchmark import Runtime, benchmark
from benchmarks.inference.candidates import find_candidates
from benchmarks.inference.rows import table, to_json
from benchmarks.inference.speed_plots import plot_speed
from benchmarks.inference.static import (
    compared,
    is_policy,
    is_static,
    load_static,
    static_directories,
    static_table,
    verdict,
)
from dfs_jax.data.dataset import RawDataset, Split
from dfs_jax.inference.trained import load_staged
from dfs_jax.training.loop import train
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config, tiny_images

IMAGES = 13


def other_test_images() -> RawDataset:
    """The tiny images, but one pixel of one test image differs."""
    data: Any = tiny_images()
    images = data.test.images.copy()
    images[5, 0, 0, 0] ^= 1
    return data._replace(test=Split(images, data.test.labels))


def other_test_labels() -> RawDataset:
    data: Any = tiny_images()
    return data._replace(test=Split(data.test.images, (data.test.labels + 1) % 3))


def other_class_order() -> RawDataset:
    return tiny_images()._replace(class_names=tuple("bca"))


def larger_images() -> RawDataset:
    data: Any = tiny_images()
    splits = {
        part: Split(getattr(data, part).images.repeat(2, axis=1), getattr(data, part).labels)
        for part in ("train", "test")
    }
    return data._replace(**splits)


OTHER_DATA = {
    "other_test_images": "other test examples",
    "other_test_labels": "other test examples",
    "other_class_order": r"other classes \(3: b, c, a instead of 3: a, b, c\)",
    "larger_images": "images of 16x8x3 instead of 8x8x3",
}


def run_of(path, **changes):
    names = {"model.name": "tests.support.helpers:TinyNetwork", "epochs": 1}
    train(tiny_config(**names, **changes), path)
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "narrow", **{"model.width": 2})


@pytest.fixture(scope="module")
def staged(workdir):
    return load_staged(workdir)


def test_static_networks_are_timed_beside_the_policies(staged, narrow, tmp_path):
    images = staged.images("test", IMAGES)
    statics = load_static([narrow], staged, images)
    candidates = find_candidates(staged, None, "margin", IMAGES)
    rows = benchmark(
        [Runtime("jax", staged, candidates)], images, batch=4, rounds=2, statics=statics
    )
    static = rows[-1]
    assert [row["policy"] for row in rows] == [*(c.name for c in candidates), "static narrow"]
    logits, labels = load_staged(narrow).logits("test")
    assert static["accuracy"] == pytest.approx(np.mean(logits[-1].argmax(-1) == labels))
    # two 3x3 convolutions on 8x8 pixels, and the last head
    assert static["macs"] == 64 * 9 * (3 * 2 + 2 * 2) + 2 * 3
    assert static["ideal_speedup_by_macs"] == rows[0]["macs"] / static["macs"] > 1
    assert static["ideal_speedup"] is None
    assert static["speedup"] > 0
    assert static["p99_ms"] >= static["p50_ms"] > 0
    for row in filter(is_policy, rows):
        assert row["static"] == "static narrow"
        assert row["speedup_over_static"] == row["speedup"] / static["speedup"]
    *lines, _, limit = table(rows).splitlines()
    assert lines[-1].split()[:3] == ["jax", "static", "narrow"]
    assert limit.startswith("jax: an accuracy of ")
    written = json.loads(to_json(rows))
    assert written[-1]["ideal_speedup"] is None
    assert "static" not in written[0]
    assert written[2]["static"] == "static narrow"
    assert plot_speed(rows, tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_run_on_other_data_is_refused(staged, tmp_path, name):
    path = run_of(tmp_path / "other", **{"data.name": f"{__name__}:{name}"})
    with pytest.raises(UserError, match=f"other cannot be compared .* {OTHER_DATA[name]}"):
        load_static([path], staged, staged.images("test", IMAGES))


def test_paths_that_are_no_other_run_are_refused(staged, workdir, narrow, tmp_path):
    with pytest.raises(UserError, match=r"--static .* does not exist"):
        static_directories([tmp_path / "none"], workdir)
    link = tmp_path / "link"
    link.symlink_to(workdir)
    for same in (workdir, link):
        with pytest.raises(UserError, match="is the run of --workdir"):
            static_directories([narrow, same], workdir)
    with pytest.raises(UserError, match="is given twice"):
        static_directories([narrow, narrow.parent / ".." / narrow.parent.name / "narrow"], workdir)
    with pytest.raises(UserError, match="there is no run in"):
        load_static([tmp_path], staged, staged.images("test", IMAGES))


def test_runs_of_one_name_have_rows_of_their_own(staged, narrow, tmp_path):
    link = tmp_path / "narrow"
    link.symlink_to(narrow)
    statics = load_static([narrow, link], staged, staged.images("test", IMAGES))
    assert [s.name for s in statics] == [f"static {narrow}", f"static {link}"]


def row(policy, accuracy, speedup, runtime="onnx"):
    found = {"batch": 7, "runtime": runtime, "policy": policy}
    return {**found, "accuracy": accuracy, "speedup": speedup}


ROWS = [
    row("full", 0.9, 1.0),
    row("exit 1", 0.5, 9.0),
    row("2x", 0.88, 1.5),
    row("4x", 0.8, 3.0),
    row("static small", 0.75, 4.0),
    row("static middle", 0.85, 3.0),
    row("static slow", 0.85, 2.5),
]


def test_the_nearest_static_network_by_hand():
    """Of two equally near, the faster; exits for all have none beside them."""
    rows = {row["policy"]: row for row in compared(ROWS)}
    assert rows["2x"]["static"] == "static middle"
    assert rows["2x"]["speedup_over_static"] == pytest.approx(0.5)
    near = compared([row("2x", 0.75, 2.0), row("static a", 0.5, 1.0), row("static b", 1.0, 4.0)])
    assert (near[0]["static"], near[0]["speedup_over_static"]) == ("static b", 0.5)
    assert "static" not in rows["full"]
    assert "static" not in rows["exit 1"]
    assert "static" not in rows["static small"]
    assert compared(ROWS[:4]) == ROWS[:4]
    assert [is_static(row) for row in ROWS] == [False] * 4 + [True] * 3


def test_the_verdict_names_the_policies_that_a_static_network_beats():
    """`4x` is as fast as `middle`, which is more accurate, and no network beats it."""
    assert verdict(compared(ROWS)) == (
        "in batches of 7, no static network is faster than a policy at no less accuracy"
    )
    better = [*ROWS, row("static equal", 0.88, 1.6), row("static best", 0.88, 1.7)]
    assert verdict(compared(better)) == (
        "in batches of 7, a static network is faster at no less accuracy than 1 of 2 policies: "
        "2x (best)"
    )


def test_the_table_by_hand():
    lines = static_table(compared(ROWS)).splitlines()
    assert lines[1].split() == ["2x", "88.00", "%", "middle", "85.00", "%", "0.50"]
    assert lines[2].split()[0] == "4x"
    assert len(lines) == 4
    assert lines[-1].startswith("in batches of 7, no static network")


def test_policies_of_slower_runtimes_are_not_compared():
    """They have the same names, and other accuracies."""
    slower = [row("2x", 0.5, 0.5, "jax"), row("4x", 0.4, 0.6, "jax")]
    rows = compared([*ROWS[:4], *slower, *ROWS[4:]])
    assert ["static" in row for row in rows] == [False, False, True, True] + [False] * 5
    assert static_table(rows) == static_table(compared(ROWS))
