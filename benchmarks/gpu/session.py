"""What every stage is given: where it writes, what is known already, its clock, and the card."""

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

FULL, REHEARSAL = "full", "rehearsal"  # stands where other suites have the hash of a config


class Unit(NamedTuple):
    """A piece of work that has a record of its own."""

    name: str


class Session(NamedTuple):
    """One stage's run.

    Attributes:
      stage: its name.
      output: directory of what is to be kept: few files, each small.
      work: directory of what stays on this machine: compiled programs, runs under way, traces.
      data: directory of the packed set.
      carried: directory of what earlier sessions brought back, or None.
      clock: of the stage.
      rehearses: whether sizes are tiny.
      again: whether what was merged into this repository is measured again, as after a change.
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
        """What a record of this session is of: full size or a rehearsal."""
        return REHEARSAL if self.rehearses else FULL

    def unit(self, name: str) -> Unit:
        """Returns a piece of work on this card."""
        return Unit(f"{card()}/{name}")

    def known(self, unit: Unit) -> Record | None:
        """Returns the complete record of a unit, from here or from an earlier session, or None."""
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
        """Writes what was measured at once, with the card and the versions.

        Of an incomplete record here that has more rows, the more is kept until all are there.
        """
        about = {"versions": versions(), "hardware": hardware()}
        there = self._here(unit)
        if there is None or worth(content) >= worth(there):
            self.results.record(unit, self.size, FINISHED, {**content, **about})

    def fail(self, unit: Unit, error: Exception) -> None:
        """Writes that a unit failed, and why, unless some of it is there; the stage goes on."""
        reason = reason_of(error)
        say(f"{unit.name} failed: {reason}")
        if self._here(unit) is None:
            self.results.record(unit, self.size, FAILED, {"reason": reason, "hardware": hardware()})

    def _here(self, unit: Unit) -> Record | None:
        """Returns what this output directory has of a unit, complete or not."""
        record = self.results.read().get(unit.name, {})
        counts = record.get("status") == FINISHED and record.get("config_hash") == self.size
        return record if counts else None


def worth(record: Mapping[str, Any]) -> tuple[bool, int]:
    """Orders records of one unit: a complete one, then one with more rows that did not fail.

    >>> worth({"rows": [{}, {"failed": "out of memory"}], "complete": False})
    (False, 1)
    """
    rows = record.get("rows", ())
    return record.get("complete", True), sum("failed" not in row for row in rows)


@functools.cache
def card() -> str:
    """Returns the name of the device that everything runs on.

    >>> "/" in card()
    False
    """
    return jax.devices()[0].device_kind.replace("/", "_")


def merged_name(stage: str) -> str:
    """Returns what a stage's results are called in this repository.

    >>> merged_name("step"), merged_name("paper")
    ('gpu_step.json', 'paper.json')
    """
    return f"{stage}.json" if stage == "paper" else f"gpu_{stage}.json"


def reason_of(error: BaseException) -> str:
    """Returns the kind of error and the first line of what it says, at most 300 characters."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:300]
