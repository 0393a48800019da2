"""choose, export, classify and benchmark, on a tiny run, as their programs call them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.inference.benchmark import Runtime, benchmark
from benchmarks.inference.candidates import find_candidates
from dfs_jax.inference import load_exported, read_policy
from dfs_jax.inference.choose import TARGETS, choose_policy, describe
from dfs_jax.inference.export import export_run
from dfs_jax.inference.policy import FILE
from dfs_jax.training.evaluate import evaluate_run
from dfs_jax.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES = {
    "p": 0.5,
    "speedup": 1.5,
    "mmacs": 0.01,
    "latency_ms": 1e4,
    "throughput": 1e-3,
    "epsilon": 0.95,
}


def test_the_stages_are_the_run(tiny_run, staged):
    """Recorded logits give what evaluation says of the same checkpoint."""
    logits, labels = staged.logits("test")
    evaluated = evaluate_run(tiny_run, staged.experiment).reported
    np.testing.assert_array_equal(labels, evaluated.labels)
    np.testing.assert_array_equal(logits.argmax(-1), evaluated.predicted)
    assert staged.images("test", 5).shape == (5, 8, 8, 3)
    assert len(staged.images("test", 500)) == len(labels)
    assert staged.about()["model"] == "tests.support.helpers:TinyNetwork"


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(staged, target):
    fitted = choose_policy(staged, target, VALUES[target], batch_size=7)
    about = fitted.policy.fitted_on
    assert about["target"] == {target: VALUES[target]}
    assert about["split"] == "validation"
    assert about["step"] == staged.step
    assert fitted.policy.exit_shares == pytest.approx(fitted.point.exit_shares)
    lines = describe(staged, fitted).splitlines()
    assert lines[0].startswith("test split: accuracy ")
    assert len(lines) == (3 if target == "epsilon" else 2)


def test_mistakes(staged):
    with pytest.raises(UserError, match="--speedup must be above 0 and finite, got -1"):
        choose_policy(staged, "speedup", -1.0)
    with pytest.raises(UserError, match="cannot be met: the first exit alone costs"):
        choose_policy(staged, "mmacs", 1e-6)
    with pytest.raises(UserError, match="batches of 7 need as many examples: there are 3"):
        benchmark([Runtime("jax", staged, [])], np.zeros((3, 8, 8, 3), np.uint8), batch=7, rounds=1)


def test_a_run_exported_says_the_same(tiny_run, staged, tmp_path):
    policy = choose_policy(staged, "speedup", 1.2).policy
    export_run(tiny_run, tmp_path / "alone")
    assert load_exported(tmp_path / "alone").policy.thresholds == (None,)
    policy.save(tiny_run / FILE)
    export_run(tiny_run, tmp_path / "with")
    network = load_exported(tmp_path / "with")
    assert network.policy == policy == read_policy(tiny_run / FILE)
    assert network.labels == ("a", "b", "c")
    assert [e["exit"] for e in network.manifest["about"]["exits"]] == [1, 2]
    images = staged.images("test", 13)
    logits, _ = staged.logits("test")
    predictor = network.predictor(batch_size=13, shapes=(1, 13), fall_back=False)
    got = predictor(images)
    np.testing.assert_array_equal(got.predicted, logits[got.exit_index, np.arange(13)].argmax(-1))


def test_benchmark_rows(tiny_run, staged):
    images = staged.images("test", 13)
    candidates = find_candidates(staged, None, "margin", len(images))
    names = [c.name for c in candidates]
    assert names[:3] == ["full", "exit 1", "no early exit"]
    rows = benchmark([Runtime("jax", staged, candidates)], images, batch=4, rounds=2)
    assert [row["policy"] for row in rows] == names
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    full, first, nobody = rows[:3]
    assert full["ideal_speedup_by_macs"] == 1
    assert first["macs"] < full["macs"] == nobody["macs"]
    assert nobody["accuracy"] == full["accuracy"]
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in rows)


def run_program(name, *arguments):
    module = name if "." in name else f"dfs_jax.inference.{name}"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "tests")}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_programs_in_a_row(tiny_run, tmp_path):
    status, out, err = run_program("choose", f"--workdir={tiny_run}", "--p=0.5", "--measure=margin")
    assert status == 0
    assert err.startswith("warning: the policy was fitted on 11 examples")
    assert len(err.splitlines()) == 1
    assert "times fewer" in out
    policy = read_policy(tiny_run / FILE)
    assert policy.measure == "margin"
    status, out, err = run_program("export", f"--workdir={tiny_run}", f"--output={tmp_path}")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'model.json'}"
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(image)
    status, out, err = run_program("classify", tmp_path, image, tmp_path / "none.png")
    assert (status, err) == (1, "")
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(image), "error"]
    how = ("--batch=1", "--batch=4", "--examples=13", "--rounds=1")
    status, out, err = run_program("benchmarks.inference", f"--workdir={tiny_run}", *how)
    assert (status, err) == (0, "")
    rows = json.loads((tiny_run / "benchmark.json").read_text())
    assert {row["batch"] for row in rows} == {1, 4}
    assert "policy.json" in {row["policy"] for row in rows}
    assert (tiny_run / "benchmark.png").exists()
    for arguments, message in (
        ([], "name one target of --p, --speedup"),
        (["--p=1", "--speedup=2"], "name one target of .*; got 2"),
        (["--p=1", "--measure=luck"], "unknown confidence measure 'luck'"),
    ):
        status, _, err = run_program("choose", f"--workdir={tiny_run}", *arguments)
        assert status == 2
        assert err.startswith("error: ")
        assert message.split(" .*")[0] in err
