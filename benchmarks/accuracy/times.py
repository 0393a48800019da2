"""Times a training step of each method of a suite, by network and data set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from benchmarks.accuracy.cells import Cell, Suite, cell_config
from benchmarks.accuracy.results import Results
from benchmarks.accuracy.rows import current
from benchmarks.accuracy.runner import Datasets
from benchmarks.training_step.step_timing import compile_whole_step
from dfs_jax.program import say
from dfs_jax.stopwatch import median_seconds
from dfs_jax.training.experiment import build_experiment

ROUNDS = 15


def time_cells(
    suite: Suite,
    cells: Sequence[Cell],
    results: Results,
    *,
    data_dir: str | None = None,
    rounds: int = ROUNDS,
) -> int:
    """Adds `step_ms`, medians over rounds, to the records of finished cells; returns their number.

    The time of a step does not depend on seed and epochs: every method is timed once for a network
    and a data set. Programs of one batch size run in turn, so that ratios are more reliable than
    times.

    Args:
      suite: suite of the cells.
      cells: cells to time, if they are finished.
      results: results' file.
      data_dir: directory of the data; None for that of the configs.
      rounds: number of rounds that medians are taken over.
    """
    records, datasets = results.read(), Datasets()
    finished = [cell for cell in cells if current(suite, records, cell) is not None]
    for place, group in groupby(sorted(finished, key=_place), key=_place):
        alike: dict[str, list[Cell]] = {}
        for cell in group:
            alike.setdefault(cell.method, []).append(cell)
        programs = []
        for method, (cell, *_) in alike.items():
            say(f"preparing {'/'.join(place)}/{method}")
            config = cell_config(suite, cell, data_dir)
            experiment = build_experiment(config, datasets.of(config))
            programs.append(compile_whole_step(experiment).run)
        seconds = median_seconds(programs, rounds)
        for (method, same), taken in zip(alike.items(), seconds, strict=True):
            say(f"{'/'.join(place)}/{method}: {1e3 * taken:.1f} ms a step")
            for cell in same:
                results.add(cell, {"step_ms": round(1e3 * taken, 2)})
    return len(finished)


def _place(cell: Cell) -> tuple[str, str]:
    return cell.network, cell.data
