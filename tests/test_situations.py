"""Programs where their authors never ran them: odd paths, configs, terminals and environments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.forked import run_forked
from tests.test_programs import TINY, environment

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/common.py"
# A small network of two exits, one epoch: 6 steps.
SMALL = [*TINY, "--config.model.name=tests.support.helpers:TinyNetwork", "--config.epochs=1"]
# Every program, with its flags and arguments for paths; {} stands for one.
PATHS = [
    ("train.py", CONFIG, "--workdir={}"),
    ("train.py", CONFIG, "--workdir={tmp}/run", "--config.data.data_dir={}"),
    ("train.py", CONFIG, "--workdir={tmp}/run", "--config.init_from={}"),
    ("train.py", CONFIG, "--dry_run", "--output={}"),
    ("eval.py", "--workdir={}"),
    ("eval.py", "--workdir={tmp}", "--output={}"),
    ("dfs_jax.inference.choose", "--p=1", "--workdir={}"),
    ("dfs_jax.inference.choose", "--p=1", "--workdir={tmp}", "--output={}"),
    ("dfs_jax.inference.export", "--output={tmp}/exported", "--workdir={}"),
    ("dfs_jax.inference.export", "--workdir={tmp}", "--output={}"),
    ("dfs_jax.inference.export", "--output={tmp}/exported", "--workdir={tmp}", "--policy={}"),
    ("benchmarks.inference.benchmark", "--workdir={}"),
    ("benchmarks.inference.benchmark", "--workdir={tmp}", "--output={}"),
    ("benchmarks.inference.benchmark", "--workdir={tmp}", "--static={}"),
    ("dfs_jax.inference.classify", "{}", "image.png"),
    ("dfs_jax.interop", "check", "{}"),
    ("dfs_jax.data.prepare", "cifar10", "--data_dir={}"),
    ("dfs_jax.reports.cost_report", CONFIG, "--output={}"),
    ("benchmarks.training_step.training_cost", CONFIG, "--output={}"),
    ("dfs_jax.reports.gradient_conflict", "--workdir={}"),
    ("dfs_jax.reports.gradient_conflict", "--workdirs={},{}"),
    ("dfs_jax.reports.gradient_conflict", "--workdir={tmp}", "--output={}"),
    ("dfs_jax.reports.placement", "--workdir={}"),
    ("dfs_jax.reports.placement", "--workdir={tmp}", "--output={}"),
    ("benchmarks.comparison", CONFIG, "--workdir={}"),
    ("benchmarks.guarantee", "--epsilon=0.4", "--workdir={}"),
    ("benchmarks.accuracy", "--nopage", "--data_dir={}"),
]
# What the programs above import, and none of them itself.
MODULES = (
    "dfs_jax.training.loop",
    "dfs_jax.inference.trained",
    "dfs_jax.reports.run_report",
    "benchmarks.training_step.step_timing",
    "dfs_jax.interop.golden",
    "tensorflow_datasets",
)
CONFIGS = {  # what a file holds, and what is said of it
    "syntax": ("def get_config(:", "is not Python, see line 1: invalid syntax"),
    "empty": ("", "defines no function get_config"),
    "none": ("def get_config(): pass", "must return an ml_collections.ConfigDict, got NoneType"),
    "dict": ("def get_config(): return {}", "ConfigDict, got dict"),
    "fails": ("def get_config():\n  return 1 / 0", "at line 2: ZeroDivisionError division by zero"),
    "says": ("def get_config():\n  raise ValueError('a\\nb')", "at line 2: ValueError a b"),
    "imports": ("import no_such_module", "at line 1: ModuleNotFoundError No module named"),
    "missing": ("def get_config():\n  open('none.txt')", "at line 2: FileNotFoundError"),
}


def is_one_sentence(result):
    lines = result["err"].splitlines()
    return result["status"] == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def test_every_path_of_every_program_refuses_addresses(tmp_path):
    """Nothing is made before, neither `./gs:` nor `./~` nor a run."""

    def filled(argument, path):
        return argument.replace("{tmp}", str(tmp_path)).replace("{}", path)

    bad = ("gs://bucket/run", "", "~nobody_of_that_name/run")
    rows = [(row, path) for i, row in enumerate(PATHS) for path in (bad if not i else bad[:1])]
    cases = [
        {"program": row[0], "arguments": [filled(a, path) for a in row[1:]]} for row, path in rows
    ]
    before = {p.name for p in REPOSITORY.iterdir()}
    results = run_forked(cases, environment(), MODULES)
    for case, (_, path), result in zip(cases, rows, results, strict=True):
        assert is_one_sentence(result), (case, result)
        said = {"": "is empty", "gs://bucket/run": "is an address"}
        assert said.get(path, "no such home directory") in result["err"], (case, result)
    assert list(tmp_path.iterdir()) == []
    assert {p.name for p in REPOSITORY.iterdir()} <= before | {".cache"}


def test_config_files_and_flags(tmp_path):
    expected = []
    (tmp_path / "directory.py").mkdir()
    for name, (content, said) in CONFIGS.items():
        (tmp_path / f"{name}.py").write_text(content)
        expected.append(([f"--config={tmp_path / name}.py"], said))
    expected += [
        (["--config", "nofile.py"], "there is no config file nofile.py"),
        (["-config", "nofile.py"], "there is no config file nofile.py"),
        (["-config=nofile.py:dfs"], "there is no config file nofile.py"),
        (["--config="], "--config is empty"),
        ([f"--config={tmp_path}"], "there is no config file"),
        ([f"--config={tmp_path / 'directory.py'}"], "is a directory: name a file"),
        ([f"{CONFIG}:luck"], "unknown method 'luck'"),
        ([CONFIG, "--config.model.wdth=3"], "no such field: 'wdth'"),
        ([CONFIG, "--nosuch"], "Unknown command line flag 'nosuch'"),
        (["--flagfile=/nowhere", CONFIG], "Unable to open flagfile"),
        ([CONFIG, "--config.epochs"], "Missing value for flag --config.epochs"),
        ([CONFIG, "--config.epochs=1", "--config.epochs=many"], "epochs=many"),
    ]
    cases = [{"program": "train.py", "arguments": row[0]} for row in expected]
    results = run_forked(cases, environment())
    for (arguments, said), result in zip(expected, results, strict=True):
        assert is_one_sentence(result), (arguments, result)
        assert said in result["err"], (arguments, result)


def test_a_run_in_a_strange_place(tmp_path):
    """Everything at once: another directory, a home, a notebook's backend, a strict terminal, JAX.

    Then nobody reads: another run stops and is saved, the report of the first ends quietly.
    """
    own = tmp_path / "own.py"
    own.write_text("from configs.common import get_config\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    strange = {
        "HOME": str(tmp_path),
        "MPLBACKEND": "nonsense",
        "TERM": "dumb",
        "TZ": "Nowhere/Land",
        "LC_ALL": "C",
    }
    arguments = [a for a in SMALL if a != CONFIG]
    first = {
        "program": "train.py",
        "arguments": ["--config", "~/own.py", *arguments, "--workdir=~/rün"],
        "cwd": str(tmp_path),
        "environment": strange,
        "encoding": "ascii",
    }
    run = tmp_path / "rün"
    shown = {"program": "eval.py", "arguments": [f"--workdir={run}"], "environment": strange}
    stopped = [CONFIG, *arguments, "--config.epochs=3", f"--workdir={tmp_path / 'stopped'}"]
    results = run_forked(
        [
            first,
            {**shown, "stdout": "closed pipe"},
            {"program": "train.py", "arguments": ["--help"], "stdout": "closed pipe"},
            {"program": "train.py", "arguments": stopped, "stdout": "closed pipe"},
        ],
        {
            **environment(),
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
        },
    )
    trained, piped, helped, stopped = results
    assert (trained["status"], trained["err"]) == (0, "")
    assert f"wrote {tmp_path}/r\\xfcn/report.json" in trained["out"]
    assert {"report.json", "accuracy_over_time.png"} <= {p.name for p in run.iterdir()}
    assert not (run / ".lock").exists()
    assert (piped["status"], piped["err"]) == (141, "")
    assert (helped["status"], helped["err"]) == (141, "")
    assert (stopped["status"], stopped["err"]) == (141, "")
    saved = [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir() if p.name.isdigit()]
    assert 0 < max(map(int, saved)) < 18


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("JAX_ENABLE_X64", "1", None),
        ("JAX_DEBUG_NANS", "1", None),
        ("JAX_COMPILATION_CACHE_DIR", "/proc/nowhere", None),
        ("JAX_PLATFORMS", "nonsense", "error: Unable to initialize backend 'nonsense'"),
        ("XLA_FLAGS", "--xla_nonsense=1", "Unknown flag in XLA_FLAGS: --xla_nonsense=1"),
    ],
)
def test_what_jax_is_told_by_its_environment(tmp_path, variable, value, says):
    case = {"program": "train.py", "arguments": [*SMALL, f"--workdir={tmp_path}"]}
    changed = {**environment(), variable: value}
    if says is None:
        (result,) = run_forked([case], changed)
        assert (result["status"], result["err"]) == (0, "")
    else:
        (result,) = run_forked([case], changed)
        assert result["status"] != 0
        assert says in result["err"]
        assert "Traceback" not in result["err"]
        assert not os.path.exists(tmp_path / "report.json")
