"""Every stage of the GPU benchmark, run as on the day: from a packed set to merged results."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.accuracy.results import DIRECTORY, FINISHED, read_records
from benchmarks.gpu import merge
from benchmarks.gpu.packed import pack
from dfs_jax.data.dataset import RawDataset, Split


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories of the packed set, of what is kept, and of what stays."""
    root = tmp_path_factory.mktemp("gpu")
    draw = np.random.default_rng(0)

    def split(count):
        images = draw.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        return Split(images, draw.integers(0, 100, count).astype(np.int32))

    raw = RawDataset(split(320), split(120), tuple(map(str, range(100))))
    pack(raw, "cifar100", root / "packed")
    return root


def rehearse(root, stage, *flags, minutes=10):
    command = [sys.executable, "-m", "benchmarks.gpu", f"--stage={stage}", "--rehearse"]
    command += [f"--minutes={minutes}", f"--output={root / 'out'}", f"--work={root / 'work'}"]
    command += [f"--data={root / 'packed'}", *flags]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=DIRECTORY.parent.parent)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.mark.slow
def test_check(places):
    said = rehearse(places, "check")
    records = read_records(places / "out" / "check.json")
    assert len(records) == 3
    assert all(record["passes"] for record in records.values())
    assert said.count("  ok\n") == 3


@pytest.mark.slow
def test_train_then_infer(places):
    cells = "--cells=cifar100_vgg7/*"
    rehearse(places, "train", cells)
    records = read_records(places / "out" / "paper.json")
    dsn = records["cifar100_vgg7/cifar100/2ep/dsn/seed0"]
    static = records["cifar100_vgg7/cifar100/2ep/static_w32/seed0"]
    assert (len(dsn["exits"]), len(static["exits"])) == (6, 1)
    assert [probe["step"] for probe in dsn["conflict"]] == [dsn["steps"]]
    assert dsn["sessions"] == [{"card": dsn["hardware"]["kind"]}]
    assert "0 of 2 cells are not finished" in rehearse(places, "train", cells)
    rehearse(places, "infer", minutes=3)
    rows = read_records(places / "out" / "infer.json")
    assert any("vgg7/batch8/random" in name for name in rows)
    # None of it is a result.
    lines = merge.merge([places / "out"], places / "results")
    assert all("left out, of another config or a rehearsal" in line for line in lines)


@pytest.mark.slow
def test_step(places):
    said = rehearse(places, "step", minutes=20)
    records = read_records(places / "out" / "step.json")
    cell = next(record for name, record in records.items() if "/vgg7/batch8/bfloat16" in name)
    assert cell["status"] == FINISHED, said
    ours = [row for row in cell["rows"] if row["framework"] == "jax"]
    assert [row["method"] for row in ours] == ["dfs", "dsn", "dfs_naive", "byot"]
    by_method = {row["method"]: row for row in ours}
    assert by_method["dfs"]["flops"] < by_method["dfs_naive"]["flops"]
    assert all(row["step_ms"] > 0 and row["bytes"] > 0 for row in ours)
    assert cell["profile"]["steps"] == cell["profile"]["traced_steps"] == 8
    assert sum(cell["profile"]["kinds"].values()) == pytest.approx(1, abs=0.01)
    json.dumps(cell, allow_nan=False)
    trace = places / "out" / "profile-vgg7.trace.json.gz"
    assert trace.stat().st_size > 0
