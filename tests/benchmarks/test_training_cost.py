"""`python -m benchmarks.training_step`: what it times, counts, prints, draws and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.training_step import cost_plots, method_costs
from benchmarks.training_step.cost_plots import plot_training_cost
from benchmarks.training_step.cost_table import against_dsn, against_peer, cost_table
from benchmarks.training_step.method_costs import VARIANTS, measure_training_cost
from benchmarks.training_step.step_timing import StepPrograms, available_cores
from benchmarks.training_step.training_cost import check_output, write_training_cost
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.training.methods import method_parts
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
# The fields that other programs may rely on.
FIELDS = {
    *("model", "method", "partition_ratio", "batch", "framework", "layout"),
    *("forward_ms", "backward_ms", "step_ms", "images_per_second"),
    *("compile_s", "peak_mib", "macs"),
}
TINY_NETWORK = {"model.name": "tests.support.helpers:TinyNetwork", "model.width": 3}


def no_programs(experiment, layout=None):
    return StepPrograms(*[lambda: None] * 4, *((1.5, 2.5) if layout is None else (None, None)))


class FakePeer:
    """A framework that needs no time; a fork that it cannot run is named `none`."""

    name = "fake"
    layouts = ("rows", "columns")

    def compile_step(self, experiment, layout):
        if getattr(experiment.fork, "referencing", None) == "none":
            raise UserError("the fake peer has no such fork")
        return no_programs(experiment, layout)


FAKE_PEER = "tests.benchmarks.test_training_cost:FakePeer"


@pytest.fixture
def compiled(monkeypatch):
    """The experiments whose step was to be compiled; nothing is."""
    experiments = []

    def compile_step(experiment, plain_jit):
        assert plain_jit != getattr(experiment.model, "cpu_kernels", True)
        experiments.append(experiment)
        return no_programs(experiment)

    monkeypatch.setattr(method_costs, "compile_step", compile_step)
    return experiments


def test_rows_of_every_method_and_batch_size(compiled, capsys):
    config = tiny_config(**{"fork.referencing": "trunk_only"})
    rows = measure_training_cost(config, batch_sizes=[5, 2], partition_ratios=[0.7, 0.2, 0.5])
    expected = [("dsn", None), ("byot", None), ("dfs", 0.7), ("dfs", 0.2), ("dfs", 0.5)]
    expected += [("dfs_naive", 0.5), ("dfs_flax", 0.5)]
    assert [(row["method"], row["partition_ratio"]) for row in rows] == 2 * expected
    assert [row["batch"] for row in rows] == 7 * [5] + 7 * [2]
    assert all(row.keys() >= FIELDS for row in rows)
    assert {(row["framework"], row["layout"]) for row in rows} == {("jax", "channels_last")}
    assert {(row["compile_s"], row["peak_mib"]) for row in rows} == {(1.5, 2.5)}
    for row, experiment in zip(rows, compiled, strict=True):
        fork = method_parts(plain_name(row["method"])).fork
        loss = "byot" if row["method"] == "byot" else "deep_supervision"
        assert (row["fork"], row["loss"]) == (fork, loss)
        assert experiment.sampler.batch_size == row["batch"]
        if fork == "dfs":
            assert experiment.fork == FeatureSurgery((row["partition_ratio"],), "trunk_only")
        switches = experiment.model.partitioned_backward, experiment.model.cpu_kernels
        is_on = {"dfs_naive": (False, True), "dfs_flax": (False, False)}
        assert switches == is_on.get(row["method"], (True, True))
        assert experiment.model.adapt_features == (row["method"] == "byot")
        assert experiment.config.data.augmentation == "crop"
        assert experiment.dataset.image_shape == (8, 8, 3)
    out = capsys.readouterr().out
    assert "tests.support.helpers:ThreeStageVGG on 8x8 noise, batch 5" in out
    assert "augmentation: crop.\n" in out


def test_operations_are_those_of_each_row(compiled):
    rows = measure_training_cost(
        tiny_config(), methods=["dsn", "dfs", "dfs_naive"], partition_ratios=[0.5], peer=FAKE_PEER
    )
    macs = {(row["method"], row["framework"]): row["macs"] for row in rows}
    theory = {(row["method"], row["framework"]): row["macs_theory"] for row in rows}
    assert macs["dfs", "jax"] == pytest.approx(theory["dfs", "jax"], rel=0.01)
    assert macs["dfs_naive", "jax"] == macs["dfs", "fake"] > 1.05 * theory["dfs", "fake"]
    assert macs["dsn", "jax"] == macs["dsn", "fake"] == theory["dsn", "jax"]
    assert macs["dfs", "jax"] < macs["dsn", "jax"]


def test_combiners_have_rows_of_ours_alone(compiled, capsys):
    methods = ["dsn", "ge", "pcgrad", "pcgrad_scan", "dfs+pcgrad", "meta_gf", "dfs+wpn"]
    rows = measure_training_cost(
        tiny_config(**{"gradients.name": "cagrad", "gradients.radius": 0.2, "batch_size": 4}),
        methods=methods,
        partition_ratios=[0.4],
        peer=FAKE_PEER,
    )
    ours = [row for row in rows if row["framework"] == "jax"]
    assert [row["method"] for row in ours] == methods
    assert {row["method"] for row in rows if row["framework"] == "fake"} == {"dsn", "ge"}
    rules = [experiment.config.gradients for experiment in compiled]
    assert [rule.name for rule in rules] == ["sum"] * 2 + ["pcgrad"] * 3 + ["meta_gf", "wpn"]
    assert [rule.exits for rule in rules] == [None] * 3 + ["scan"] + [None] * 3
    assert [row["macs"] is None for row in ours] == [False] * 2 + [True] * 5
    assert [row["partition_ratio"] for row in ours] == [None] * 4 + [0.4, None, 0.4]
    printed = capsys.readouterr().out
    assert "pcgrad_scan" in printed
    assert re.search(r"meta_gf: \d\.\d\d steps of dsn a step; published: 4 passes", printed)
    assert re.search(r"dfs\+wpn: \d\.\d\d steps of dsn a step; published: 3 passes", printed)


def test_a_peer_runs_the_same_without_augmentation(compiled, capsys):
    rows = measure_training_cost(
        tiny_config(), methods=["dsn", "dfs", "dfs_flax"], partition_ratios=[0.4], peer=FAKE_PEER
    )
    theirs = [(r["layout"], r["method"]) for r in rows if r["framework"] == "fake"]
    assert theirs == [(layout, m) for layout in FakePeer.layouts for m in ("dsn", "dfs")]
    assert {row["compile_s"] for row in rows if row["framework"] == "fake"} == {None}
    assert {experiment.config.data.augmentation for experiment in compiled} == {"none"}
    assert "augmentation: none (always with fake)" in capsys.readouterr().out


def test_a_peer_refuses_before_anything_is_compiled(compiled):
    config = tiny_config(**{"fork.referencing": "none"})
    with pytest.raises(UserError, match="the fake peer has no such fork"):
        measure_training_cost(config, methods=["dsn", "dfs"], peer=FAKE_PEER)
    assert not compiled


def plain_name(name):
    return VARIANTS[name].method if name in VARIANTS else name


def made_up_row(method, framework, layout, step_ms, beta=None, batch=32, loss="deep_supervision"):
    times = {"forward_ms": 0.3 * step_ms, "backward_ms": 0.6 * step_ms, "other_ms": 0.1 * step_ms}
    return {
        **{"model": "vgg_$7$", "method": method, "partition_ratio": beta, "batch": batch},
        **{"framework": framework, "layout": layout, **times, "step_ms": step_ms, "data_ms": 0.5},
        **{"images_per_second": 1e3 * batch / step_ms, "compile_s": None, "peak_mib": None},
        **{"macs": 381_263_104, "macs_theory": 381_263_104},
        **{"fork": method_parts(plain_name(method)).fork, "loss": loss},
    }


ROWS = [
    made_up_row("dsn", "jax", "channels_last", 120.0),
    made_up_row("byot", "jax", "channels_last", 150.0, loss="byot"),
    made_up_row("dfs", "jax", "channels_last", 100.0, 0.5),
    made_up_row("dfs_flax", "jax", "channels_last", 400.0, 0.5),
    made_up_row("dfs", "jax", "channels_last", 90.0, 0.3),
    made_up_row("dsn", "torch", "channels_first", 160.0),
    made_up_row("dfs", "torch", "channels_first", 125.0, 0.5),
    made_up_row("dfs", "torch", "channels_last", 200.0, 0.5),
]


def test_ratios():
    speedups = [against_dsn(row, ROWS) for row in ROWS]
    # torch's channels_last has no DSN to compare with.
    assert speedups == [
        *(pytest.approx(120 / ms) for ms in (120, 150, 100, 400, 90)),
        1,
        1.28,
        None,
    ]
    against = [against_peer(row, ROWS) for row in ROWS]
    assert against == [120 / 160, None, 100 / 125, 400 / 125, None, None, None, None]


def test_table():
    first, *lines = [line.split() for line in cost_table(ROWS).splitlines()[: len(ROWS) + 1]]
    assert first[:4] == ["method", "beta", "framework", "layout"]
    dfs = "dfs 0.5 jax channels_last 30.0 60.0 10.0 100.0 0.5 320.0 1.200 0.800 381.3 381.3"
    assert lines[2] == dfs.split()
    assert len({len(line) for line in cost_table(ROWS).splitlines()[: len(ROWS) + 1]}) == 1


def test_picture(tmp_path, monkeypatch):
    figures = []
    save = cost_plots.save_figure
    monkeypatch.setattr(
        cost_plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    noisy = made_up_row("dsn", "jax", "channels_last", 80.0, batch=64)
    noisy |= {"forward_ms": 90.0, "backward_ms": -20.0, "other_ms": 10.0}
    path = plot_training_cost([*ROWS, noisy], tmp_path / "cost.png")
    with Image.open(path) as image:
        assert image.width == 1400
    (figure,) = figures
    times, speeds, times_64, _ = figure.axes
    assert [text.get_text() for text in times.get_yticklabels()][:4] == [
        *("DSN, ours", "BYOT, ours", "DFS β=0.5, ours", "plain Flax DFS β=0.5, ours"),
    ]
    # Bars of a part each: together as long as the step, whatever noise made of the differences.
    for axes, rows in ((times, ROWS), (times_64, [noisy])):
        lengths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
        assert (lengths >= 0).all()
        np.testing.assert_allclose(lengths.sum(axis=0), [row["step_ms"] for row in rows])
    curves = {line.get_label(): line for line in speeds.get_lines()}
    np.testing.assert_allclose(curves["DFS, ours"].get_xydata(), [(0.3, 32 / 0.09), (0.5, 320)])
    np.testing.assert_allclose(curves["DSN, ours"].get_ydata(), 32 / 0.12)
    assert "DFS, torch channels last" in curves


def test_files(tmp_path):
    path = tmp_path / "new" / "cost.json"
    write_training_cost(ROWS, check_output(path))
    assert json.loads(path.read_text()) == ROWS
    assert sorted(file.name for file in path.parent.iterdir()) == ["cost.json", "cost.png"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"methods": ["dsn", "dsm"]}, "unknown method 'dsm': choose from dfs, dsn, byot"),
        ({"batch_sizes": [4, 0]}, "each of batch_sizes must be .* at least 1, got 0"),
        ({"partition_ratios": [1.5]}, r"partition_ratio must lie in \[0, 1\], got 1.5"),
        ({"partition_ratios": []}, "partition_ratios must name at least one"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
        ({"peer": "torches"}, "unknown peer 'torches': choose one of torch"),
    ],
)
def test_mistakes(choices, message, compiled):
    with pytest.raises(UserError, match=message):
        measure_training_cost(tiny_config(), **choices)
    assert not compiled


def test_a_package_without_its_repository_has_no_peer(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    elsewhere = [path for path in sys.path if not (Path(path) / "benchmarks").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    with pytest.raises(UserError, match="the torch peer is not installed: run in this repository"):
        measure_training_cost(tiny_config(), peer="torch")


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.png").mkdir()
    for name, message in (
        ("cost.txt", "must end in .json"),
        ("file/cost.json", "which is a file: name another path"),
        ("taken.json", "taken.png is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "taken.png"]


# The tests' own, so that what they compiled is found again.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.training_step", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **CACHE},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_program(tmp_path):
    output = tmp_path / "cost.json"
    config = ["--config=configs/common.py", "--config.data.name=tests.support.helpers:tiny_images"]
    config += [f"--config.{key}={value}" for key, value in TINY_NETWORK.items()]
    choices = ["--methods=dfs", "--partition_ratios=0.4", "--batch_sizes=2", "--repeats=2"]
    done = run(*config, *choices, f"--output={output}")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"TinyNetwork on 8x8 noise, batch 2, {available_cores()} cores" in done.stdout
    (row,) = json.loads(output.read_text())
    assert (row["method"], row["batch"], row["partition_ratio"]) == ("dfs", 2, 0.4)
    assert min(row["step_ms"], row["images_per_second"], row["compile_s"], row["peak_mib"]) > 0
    assert output.with_suffix(".png").is_file()


def test_program_tells_mistakes_in_one_line():
    done = run("--config=configs/cifar100_vgg7.py", "--batch_sizes=64,many")
    message = "error: batch_sizes must be whole numbers with commas between, got '64,many'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
