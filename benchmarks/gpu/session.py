"""Context of a stage: its directories, earlier records, time limit, and card."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.accuracy.results import (
    DIRECTORY,
    FAILED,
    FINISHED,
    Record,
    Results,
    read_records,
)
from benchmarks.accuracy.runner import hardware, versions
from benchmarks.gpu.clock import Clock
from dfs_jax.program import say

FULL, REHEARSAL = "full", "rehearsal"  # in place of the hash of a config in other suites


class Unit(NamedTuple):
    """A piece of work with its own record."""

    name: str


class Session(NamedTuple):
    """One stage's run.

    Attributes:
      stage: name of the stage.
      output: directory of the results: few files, each small.
      work: directory of files that stay on this machine: caches, unfinished runs, traces.
      data: directory of the packed set.
      carried: directory of earlier sessions' results, or None.
      clock: time limit of the stage.
      rehearses: whether sizes are tiny.
      again: whether to repeat merged measurements, as after a change.
    """

    stage: str
    output: Path
    work: Path
    data: Path
    carried: Path | None
    clock: Clock
    rehearses: bool
    again: bool = False

    @property
    def results(self) -> Results:
        """The stage's results file."""
        return Results(self.output / f"{self.stage}.json", self.work / "locks")

    @property
    def size(self) -> str:
        """Size of this session's records: full or a rehearsal."""
        return REHEARSAL if self.rehearses else FULL

    def unit(self, name: str) -> Unit:
        """Returns a piece of work on this card."""
        return Unit(f"{card()}/{name}")

    def known(self, unit: Unit) -> Record | None:
        """Returns the complete record of a unit, of this or an earlier session, or None."""
        places = [self.output / f"{self.stage}.json"]
        if not self.again:
            places.append(DIRECTORY / merged_name(self.stage))
        if self.carried is not None:
            places.append(self.carried / f"{self.stage}.json")
        for path in places:
            record = read_records(path).get(unit.name, {})
            done = record.get("status") == FINISHED and record.get("complete", True)
            if done and record.get("config_hash") == self.size:
                return record
        return None

    def keep(self, unit: Unit, content: dict[str, Any]) -> None:
        """Writes a record at once, with the card and the versions.

        An incomplete record with more rows is kept until the new one is complete.
        """
        about = {"versions": versions(), "hardware": hardware()}
        there = self._here(unit)
        if there is None or worth(content) >= worth(there):
            self.results.record(unit, self.size, FINISHED, {**content, **about})

    def fail(self, unit: Unit, error: Exception) -> None:
        """Records the failure of a unit, unless it has a partial record; the stage continues."""
        reason = reason_of(error)
        say(f"{unit.name} failed: {reason}")
        if self._here(unit) is None:
            self.results.record(unit, self.size, FAILED, {"reason": reason, "hardware": hardware()})

    def _here(self, unit: Unit) -> Record | None:
        """Returns the record of a unit in the output directory, complete or not."""
        record = self.results.read().get(unit.name, {})
        counts = record.get("status") == FINISHED and record.get("config_hash") == self.size
        return record if counts else None


def worth(record: Mapping[str, Any]) -> tuple[bool, int]:
    """Orders records of one unit: complete ones are best, then those with more valid rows.

    >>> worth({"rows": [{}, {"failed": "out of memory"}], "complete": False})
    (False, 1)
    """
    rows = record.get("rows", ())
    return record.get("complete", True), sum("failed" not in row for row in rows)


@functools.cache
def card() -> str:
    """Returns the name of the default device.

    >>> "/" in card()
    False
    """
    return jax.devices()[0].device_kind.replace("/", "_")


def merged_name(stage: str) -> str:
    """Returns the file name of a stage's results in this repository.

    >>> merged_name("step"), merged_name("paper")
    ('gpu_step.json', 'paper.json')
    """
    return f"{stage}.json" if stage == "paper" else f"gpu_{stage}.json"


def reason_of(error: BaseException) -> str:
    """Returns the type of an error and the first line of its message, at most 300 characters."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:300]
