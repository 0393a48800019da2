"""Compares methods on real images, with one command that can be interrupted and resumed.

    python -m benchmarks.accuracy --suite=small --workers=2 --data_dir=DIR
    python -m benchmarks.accuracy --suite=small --list           cells, minutes, status
    python -m benchmarks.accuracy --suite=small --times --data_dir=DIR    steps, on an idle machine
    python -m benchmarks.accuracy --render                       docs/results.md from results so far

Each finished cell is written at once to benchmarks/results/SUITE.json; the same command continues
with cells that are missing, failed or of another config. Several processes, on one machine or with
`--workers`, share a suite's cells. Run `search` before `small`: it chooses, on validation data.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.accuracy.cells import Cell, Suite, cell_config, choose, config_hash
from benchmarks.accuracy.results import DIRECTORY, FAILED, Record, Results, finished_record
from benchmarks.accuracy.suites import create_suite
from dfs_jax import program
from dfs_jax.paths import input_directory
from dfs_jax.types import UserError, check_whole

REPOSITORY = DIRECTORY.parent.parent


def main() -> None:
    """Runs the program."""
    suite = flags.DEFINE_string("suite", "small", "small, search or paper.")
    methods = flags.DEFINE_list("methods", [], "Methods to run; default: all.")
    seeds = flags.DEFINE_integer("seeds", None, "Number of paired seeds; default: the suite's.")
    pattern = flags.DEFINE_string("cells", "*", "Pattern of cells' names: */tiny_*/3ep/dfs*.")
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of TFDS sets; default: TFDS's own.")
    minutes = flags.DEFINE_float("minutes", None, "Start no cell that would end later.")
    workers = flags.DEFINE_integer("workers", 1, "Number of processes that share the cores.")
    times = flags.DEFINE_bool("times", False, "Only time the steps of finished cells.")
    listed = flags.DEFINE_bool("list", False, "Only list the cells.")
    render = flags.DEFINE_bool("render", False, "Only write the page, from existing results.")
    page = flags.DEFINE_bool("page", True, "Write the page at the end.")

    def run() -> int | None:
        if render.value:
            return _render()
        chosen = create_suite(suite.value, seeds.value)
        cells = choose(chosen.cells, pattern.value, methods.value)
        results = open_results(chosen.name)
        if listed.value:
            program.say(listing(chosen, cells, results.read()))
            return None
        check_whole("workers", workers.value)
        if data_dir.value is not None:
            input_directory(data_dir.value, "--data_dir")
        if times.value:
            status = _time(chosen, cells, results, data_dir.value)
        elif workers.value > 1:
            status = share_cores(sys.argv[1:], workers.value)
        else:
            options = {"data_dir": data_dir.value, "minutes": minutes.value}
            status = _fill(chosen, cells, results, options)
        if page.value:
            _render()
        return status

    program.run(run)


def open_results(suite: str) -> Results:
    """Returns the results of a suite of this repository."""
    return Results(DIRECTORY / f"{suite}.json", runs_of(suite) / "locks")


def runs_of(suite: str) -> Path:
    """Returns the directory of a suite's unfinished runs."""
    return REPOSITORY / "runs" / "accuracy" / suite


def listing(suite: Suite, cells: Sequence[Cell], records: dict[str, Record]) -> str:
    """Returns a line per cell: its name, its time on one core, and its status."""
    lines, total, left = [], 0.0, 0.0
    for cell in cells:
        minutes = (suite.seconds_of(cell) or 0.0) / 60
        state = _state(suite, cell, records)
        total, left = total + minutes, left + minutes * (state != "finished")
        shown = f"{minutes:6.1f} min" if minutes else "not measured"
        lines.append(f"{cell.name:60} {shown}  {state}")
    return "\n".join(
        [*lines, f"{len(cells)} cells, {total:.0f} minutes of one core, {left:.0f} left"]
    )


def _state(suite: Suite, cell: Cell, records: dict[str, Record]) -> str:
    record = records.get(cell.name)
    if record is None:
        return "not run yet"
    if record["status"] == FAILED:
        return f"failed: {record['reason']}"
    current = finished_record(records, cell, config_hash(cell_config(suite, cell)))
    return "finished" if current else "of another config: to be run again"


def share_cores(arguments: Sequence[str], workers: int) -> int:
    """Starts the program once for each part of the cores and waits; returns the largest status.

    Narrow networks use one core and gain little from a second.

    Raises:
      UserError: more workers than cores, or a system that cannot pin processes.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("workers need Linux, where a process can be kept on some of the cores")
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise UserError(f"{workers} workers need as many cores, there are {len(cores)}")
    passed = [a for a in arguments if not a.lstrip("-").startswith(("workers", "page", "nopage"))]
    command = [sys.executable, "-m", "benchmarks.accuracy", *passed, "--workers=1", "--nopage"]
    with _Passing() as passing:
        for i in range(workers):
            passing.start(command, set(cores[i::workers]))
        return passing.wait()


class _Passing:
    """Child processes that receive this process's signals; they save and end by themselves."""

    def __init__(self):
        self._children: list[subprocess.Popen] = []

    def __enter__(self) -> _Passing:
        # Ctrl-C reaches the children from the terminal; here it must not interrupt the waiting.
        handlers = {signal.SIGTERM: self._pass, signal.SIGINT: lambda *_: None}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            handlers[signal.SIGHUP] = self._pass
        self._before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], cores: set[int]) -> None:
        """Starts a child on some cores."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # a child inherits it
        try:
            self._children.append(subprocess.Popen(command, cwd=REPOSITORY))
        finally:
            os.sched_setaffinity(0, before)

    def wait(self) -> int:
        """Returns the largest of the children's statuses; a signal counts as 1."""
        return max(status if status >= 0 else 1 for status in [c.wait() for c in self._children])

    def _pass(self, number: int, frame: object) -> None:
        del frame
        for child in self._children:
            child.send_signal(number)


def _fill(
    suite: Suite,
    cells: Sequence[Cell],
    results: Results,
    options: Mapping[str, Any],
) -> int:
    program.use_compilation_cache()
    from benchmarks.accuracy.runner import run_cells  # jax starts on this process's cores

    outcome = run_cells(suite, cells, results, runs_of(suite.name), **options)
    program.say(f"{outcome.finished} cells finished, {outcome.failed} failed")
    if outcome.stopped:
        program.say(f"stopped ({outcome.stopped}): the same command continues")
    return 1 if outcome.failed else 0


def _time(suite: Suite, cells: Sequence[Cell], results: Results, data_dir: str | None) -> None:
    program.use_compilation_cache()
    from benchmarks.accuracy.times import time_cells

    count = time_cells(suite, cells, results, data_dir=data_dir)
    program.say(f"{count} cells timed" if count else "no cell is finished: there is none to time")


def _render() -> None:
    from benchmarks.accuracy.page import render_page

    for path in render_page(REPOSITORY / "docs", DIRECTORY):
        program.say(f"wrote {path}")


if __name__ == "__main__":
    main()
