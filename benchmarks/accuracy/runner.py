"""Trains the cells of a suite with the library's own training loop, one after another."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

import dfs_jax
from benchmarks.accuracy.cells import Cell, Suite, cell_config, config_hash
from benchmarks.accuracy.results import FAILED, FINISHED, Record, Results
from dfs_jax.costs.step_operations import traced_step_cost
from dfs_jax.data import Dataset
from dfs_jax.exits.confidence import anytime_accuracy, ensemble_accuracy
from dfs_jax.program import say
from dfs_jax.reports.run_report import report_evaluation
from dfs_jax.training.conflict import SPLIT as PROBE
from dfs_jax.training.evaluate import RunEvaluation, evaluate_run
from dfs_jax.training.experiment import Experiment
from dfs_jax.training.input_config import dataset_from_config
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.types import Config

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_DIGITS = 5  # of fractions, finer than one image in 10,000


class Datasets:
    """Data sets in memory, each read once for all cells that share it."""

    def __init__(self):
        self._read: dict[str, Dataset] = {}

    def of(self, config: Config) -> Dataset:
        """Returns the data set of a config."""
        key = json.dumps(config.data.to_dict(), sort_keys=True)
        if key not in self._read:
            self._read[key] = self.load(config)
        return self._read[key]

    def load(self, config: Config) -> Dataset:
        """Reads the data set of a config."""
        return dataset_from_config(config.data)


class Outcome(NamedTuple):
    """Result of a process.

    Attributes:
      finished: number of cells that it finished.
      failed: number of cells that raised.
      stopped: reason why it ended before the last cell, or None.
    """

    finished: int
    failed: int
    stopped: str | None


def run_cells(
    suite: Suite,
    cells: Sequence[Cell],
    results: Results,
    runs: Path,
    *,
    data_dir: str | None = None,
    minutes: float | None = None,
    datasets: Datasets | None = None,
    dispose: Callable[[Cell, Path], None] | None = None,
) -> Outcome:
    """Trains and evaluates every cell that is not finished and that no other process has.

    A cell that fails is recorded with its reason, and tried again at the next start; the other
    cells continue.

    Args:
      suite: suite of the cells.
      cells: cells in order.
      results: results' file.
      runs: directory of unfinished runs; that of a finished run is removed.
      data_dir: directory of the data; None for that of the configs.
      minutes: time limit, which no cell may exceed by its expected time; None for no limit.
      datasets: source of data sets; None reads them as the configs say.
      dispose: function for the directory of a finished run; None removes it.
    """
    began, finished, failed, datasets = time.time(), 0, 0, datasets or Datasets()
    dispose = dispose or (lambda _, run: shutil.rmtree(run, ignore_errors=True))
    for cell in cells:
        config = cell_config(suite, cell, data_dir)
        known_as = config_hash(config)
        with results.claim(cell) as mine:
            is_done = results.finished(cell, known_as) or results.failed_since(cell, began)
            if not mine or is_done:
                continue
            if _late(began, minutes, suite.seconds_of(cell)):
                return Outcome(finished, failed, f"{minutes:g} minutes are over")
            say(f"--- {cell.name}")
            run = run_directory(runs, cell, known_as)
            try:
                record = fill(config, run, datasets, split=suite.reported_split)
            except Exception as error:
                results.record(cell, known_as, FAILED, {"reason": _reason(error)})
                say(f"--- {cell.name} failed: {_reason(error)}")
                failed += 1
                continue
            finally:
                jax.clear_caches()  # compiled programs of a cell are of no use to the next one
            if record is None:
                return Outcome(finished, failed, "stopped by a signal")
            results.record(cell, known_as, FINISHED, record)
            dispose(cell, run)
            finished += 1
            say(f"--- {cell.name}: {record['seconds']:.0f} s, {_percents(record['exits'])}")
    return Outcome(finished, failed, None)


def run_directory(runs: Path, cell: Cell, known_as: str) -> Path:
    """Returns the directory in which a cell with this config hash is trained."""
    return runs / f"{cell.name.replace('/', '__')}-{known_as}"


def fill(config: Config, run: Path, datasets: Datasets, *, split: str) -> Record | None:
    """Trains or resumes in the directory `run`, and evaluates; None after a signal.

    The checkpoint with the best mean accuracy over the exits on validation data is reported on
    `split`, once. Accuracies are fractions, operations multiply-adds of one image:

        exits, ensemble   [exit], number; on the split
        validation        [exit], of the same checkpoint
        budget            [[mean operations, accuracy]], thresholds from validation data
        macs, params      [exit], up to and including each
        training_macs     forward and backward pass of a step; null with separate passes by exit
        step_ms           null until `time_cells` has measured it
        history           [[epoch, [exit]]], on validation data
        conflict          [{"step", "pairs": {"trunk", "block1", ...}, "norms": [exit], "cosines":
                          [pair]}]; pairs are fractions of conflicting ones, cosines those of exits
                          1 and 2, 1 and 3, ...
    """
    began = time.perf_counter()
    result = train(config, run, datasets.of(config))
    if result.stopped_by is not None:
        return None
    evaluation = evaluate_run(run, result.experiment, split=split)
    lines = read_metrics(run)
    return {
        "split": split,
        **_accuracies(evaluation),
        **_costs(result.experiment),
        "history": _history(lines),
        "conflict": _conflict(lines),
        "step": evaluation.step,
        "steps": result.step,
        # Time of this process only, without that before a restart.
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of this library and of packages that affect its numbers."""
    installed = {name: metadata.version(name) for name in _PACKAGES}
    return {"dfs_jax": dfs_jax.__version__, "python": platform.python_version(), **installed}


def hardware() -> dict[str, Any]:
    """Returns the devices, the processor's name and the number of cores this process may use."""
    device = jax.devices()[0]
    return {
        "devices": len(jax.devices()),
        "kind": device.device_kind,
        "processor": _processor(),
        "cores": _cores(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accuracies(evaluation: RunEvaluation) -> Record:
    report = report_evaluation(evaluation)
    assert evaluation.fitting is not None, "validation data are in memory"
    return {
        "exits": [round(row["accuracy"], _DIGITS) for row in report["anytime"]],
        "ensemble": round(float(ensemble_accuracy(evaluation.reported)), _DIGITS),
        "validation": _rounded(anytime_accuracy(evaluation.fitting)),
        "budget": [[round(p["macs"]), round(p["accuracy"], _DIGITS)] for p in report["budgeted"]],
        "macs": [row["macs"] for row in report["anytime"]],
        "params": [row["params"] for row in report["anytime"]],
    }


def _costs(experiment: Experiment) -> Record:
    e = experiment
    macs = None
    if e.rule.is_plain_sum:
        macs = traced_step_cost(e.model, e.fork, e.loss, e.dataset.image_shape).total
    return {"training_macs": macs, "step_ms": None, "batch_size": e.config.batch_size}


def _history(lines: Sequence[dict[str, Any]]) -> list[list[Any]]:
    chosen = [line for line in lines if line["split"] == "validation"]
    return [[line["epoch"], _rounded(_by_exit(line, "accuracy"))] for line in chosen]


def _conflict(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "step": line["step"],
            "pairs": _ending_in(line, "/conflicting_pairs"),
            "norms": list(_ending_in(line, "/gradient_norm").values()),
            "cosines": list(_ending_in(line, "/cosine").values()),
        }
        for line in lines
        if line["split"] == PROBE
    ]


def _ending_in(line: dict[str, Any], ending: str) -> dict[str, float | None]:
    return {
        name.removesuffix(ending): None if value is None else float(f"{value:.4g}")
        for name, value in line.items()
        if name.endswith(ending)
    }


def _by_exit(line: dict[str, Any], what: str) -> list[float]:
    names = [name for name in line if name.startswith("exit") and name.endswith(f"/{what}")]
    return [line[name] for name in names]


def _rounded(values: Any) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]


def _late(began: float, minutes: float | None, seconds: float | None) -> bool:
    return minutes is not None and time.time() - began + (seconds or 0) > 60 * minutes


def _reason(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _percents(fractions: Sequence[float]) -> str:
    return json.dumps([round(100 * fraction, 1) for fraction in fractions])
