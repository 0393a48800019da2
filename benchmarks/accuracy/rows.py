"""A method's runs over seeds: means, and paired differences from a reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.accuracy.cells import Cell, Suite, cell_config, config_hash
from benchmarks.accuracy.results import Record, finished_record

CONFIDENCE = 0.95
REFERENCE = "dsn"


class Row(NamedTuple):
    """Results of a method on one network and data set.

    Attributes:
      method: name of the method in the suite.
      runs: records of finished cells, by seed.
      asked: number of cells in the suite.
    """

    method: str
    runs: Mapping[int, Record]
    asked: int


class Difference(NamedTuple):
    """Difference from the reference, over common seeds.

    Attributes:
      mean: mean of the differences.
      half_width: half width of the 95 % interval by Student's t; None for fewer than two seeds.
    """

    mean: float
    half_width: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


Value = Callable[[Record], float]


def select(
    suite: Suite,
    records: Mapping[str, Record],
    network: str,
    data: str,
    epochs: int,
    methods: Sequence[str],
) -> list[Row]:
    """Returns the rows of a table, including methods without finished runs."""
    rows = []
    for method in methods:
        wanted = (network, data, method, epochs)
        cells = [c for c in suite.cells if (c.network, c.data, c.method, c.epochs) == wanted]
        found = {cell.seed: current(suite, records, cell) for cell in cells}
        runs = {seed: record for seed, record in found.items() if record is not None}
        rows.append(Row(method, runs, len(cells)))
    return rows


def current(suite: Suite, records: Mapping[str, Record], cell: Cell) -> Record | None:
    """Returns a cell's record, or None if it has not finished with the suite's config."""
    if cell.name not in records:
        return None
    return finished_record(dict(records), cell, config_hash(cell_config(suite, cell)))


def mean(row: Row, value: Value) -> float:
    """Returns the mean of a value over a row's runs."""
    return statistics.fmean(value(record) for record in row.runs.values())


def difference(row: Row, reference: Row, value: Value) -> Difference | None:
    """Returns a row's difference from the reference by seed; None without a common seed.

    >>> runs = [{0: {"x": 1.0}, 1: {"x": 2.0}}, {0: {"x": 0.0}, 1: {"x": 2.0}, 2: {"x": 9.0}}]
    >>> ours, theirs = (Row("", run, 3) for run in runs)
    >>> difference(ours, theirs, lambda record: record["x"])
    Difference(mean=0.5, half_width=6.35...)
    """
    common = sorted(row.runs.keys() & reference.runs)
    if not common:
        return None
    found = [value(row.runs[seed]) - value(reference.runs[seed]) for seed in common]
    return Difference(statistics.fmean(found), half_width(found))


def half_width(values: Sequence[float]) -> float | None:
    """Returns the half width of the mean's 95 % interval, `t s / sqrt(n)`; None if n < 2.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    n = len(values)
    if n < 2:
        return None
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return t * statistics.stdev(values) / math.sqrt(n)


def exit_accuracy(i: int) -> Value:
    """Returns a function from a record to the accuracy of exit i, 0-based."""
    return lambda record: record["exits"][i]


def mean_accuracy(record: Record) -> float:
    """Returns the mean accuracy over the exits."""
    return statistics.fmean(record["exits"])


def ensemble_accuracy(record: Record) -> float:
    """Returns the ensemble's accuracy."""
    return record["ensemble"]


def budget_accuracy(share: float) -> Value:
    """Returns a function from a record to budgeted accuracy at a fraction of all operations.

    It interpolates between budgets, and is constant beyond the last one.
    """

    def value(record: Record) -> float:
        macs, accuracies = zip(*sorted(record["budget"]), strict=True)
        return float(np.interp(share * record["macs"][-1], macs, accuracies))

    return value


def num_exits(rows: Sequence[Row]) -> int:
    """Returns the number of exits of the rows' network; 0 if nothing was run yet."""
    return next((len(r["exits"]) for row in rows for r in row.runs.values()), 0)
