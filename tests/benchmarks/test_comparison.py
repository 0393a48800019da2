"""Methods side by side: configs by method, runs by seed, the table and the file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import comparison
from benchmarks.comparison import Accuracies, compare, method_configs, summaries, table
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits_vgg7.py"
NETWORK = "tests.support.helpers:TinyNetwork"
RUNS = [Accuracies((0.5, 0.8), 0.9), Accuracies((0.7, 0.9), 0.9), Accuracies((0.6, 0.7), 0.6)]


def test_each_method_has_its_own_config_and_all_have_the_overrides():
    configs = method_configs(DIGITS, ["dsn", "dfs"], {"epochs": 3, "model.width": 4})
    assert [c.fork.name for c in configs.values()] == ["plain", "dfs"]
    assert [(c.epochs, c.model.width) for c in configs.values()] == [(3, 4)] * 2


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["dsn", "dsn"], "each once, got dsn,dsn"),
        ([], "each once, got none"),
        (["dsn", "sgd"], "unknown method 'sgd'"),
    ],
)
def test_methods_that_cannot_be_compared(methods, message):
    with pytest.raises(UserError, match=message):
        method_configs(DIGITS, methods, {})


def test_summaries_are_means_and_sample_deviations():
    first, second, mean, ensemble = summaries(RUNS)
    assert first == (pytest.approx(0.6), pytest.approx(0.1))
    assert second == (pytest.approx(0.8), pytest.approx(0.1))
    assert mean == (pytest.approx(0.7), pytest.approx(math.sqrt(0.015 / 2)))
    assert ensemble == (pytest.approx(0.8), pytest.approx(math.sqrt(0.06 / 2)))
    assert summaries(RUNS[:1])[0] == (0.5, None)


def test_the_table_has_a_row_a_method():
    lines = table({"dsn": RUNS[:1], "gradient_equilibrium": RUNS[1:2]}).splitlines()
    assert lines[0] == "Test accuracy (%), one seed."
    assert lines[1].split() == ["exit", "1", "exit", "2", "mean", "ensemble"]
    assert lines[2].split() == ["dsn", "50.00", "80.00", "65.00", "90.00"]
    assert lines[3].split() == ["gradient_equilibrium", "70.00", "90.00", "80.00", "90.00"]
    assert len({len(line) for line in lines[1:]}) == 1


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("comparison")
    configs = {
        name: tiny_config(epochs=1, **{"model.name": NETWORK, "fork.name": fork})
        for name, fork in (("dsn", "plain"), ("dfs", "dfs"))
    }
    return workdir, configs, compare(configs, (3, 5), workdir)


def test_every_run_lies_in_its_place_and_is_reported(compared):
    workdir, _, found = compared
    for method, runs in found.items():
        for seed, accuracies in zip((3, 5), runs, strict=True):
            run = workdir / method / f"seed_{seed}"
            assert json.loads((run / "config.json").read_text())["seed"] == seed
            report = json.loads((run / "report.json").read_text())
            assert accuracies.exits == tuple(row["accuracy"] for row in report["anytime"])
            assert accuracies.ensemble == report["ensemble"]["accuracy"]


def test_finished_runs_are_not_trained_again(compared):
    workdir, configs, found = compared
    before = {path: path.read_bytes() for path in workdir.rglob("metrics.jsonl")}
    assert compare(configs, (3, 5), workdir) == found
    assert len(before) == 4
    assert before == {path: path.read_bytes() for path in workdir.rglob("metrics.jsonl")}


def test_a_stopped_run_stops_the_comparison(compared, monkeypatch):
    workdir, configs, _ = compared
    real = comparison.train
    monkeypatch.setattr(comparison, "train", lambda *a: real(*a)._replace(stopped_by=15))
    assert compare(configs, (3, 5), workdir) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=1,x"], "seeds must be whole numbers, got 1,x"),
        (["--methods=dsn,sgd"], "unknown method 'sgd'"),
    ],
)
def test_the_program_answers_mistakes_in_a_sentence(flags, message):
    command = [sys.executable, "-m", "benchmarks.comparison", f"--config={DIGITS}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=DIGITS.parent.parent)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert message in ended.stderr
