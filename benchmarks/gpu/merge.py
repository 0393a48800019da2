"""Merges results from a GPU into this repository's results.

    python -m benchmarks.gpu.merge [--again] DIR...

`DIR/paper.json` goes into benchmarks/results/paper.json, the results of the other stages into
benchmarks/results/gpu_STAGE.json. A present record is replaced only by a better one, or with
`--again`, after a change of the program, by one that is as complete. Rehearsals, failures and
records without a card are omitted. Prints the outcome for every record.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.accuracy.cells import Cell, Suite, cell_config, config_hash
from benchmarks.accuracy.results import (
    DIRECTORY,
    FINISHED,
    Record,
    read_records,
    write_records,
)
from benchmarks.accuracy.suites import paper
from benchmarks.gpu.session import FULL, merged_name, worth
from dfs_jax import program
from dfs_jax.types import UserError

STAGES = ("check", "step", "infer", "paper")


def merge(
    directories: Sequence[Path], results: Path = DIRECTORY, *, again: bool = False
) -> list[str]:
    """Merges the results' files of directories and returns a line for each record.

    Args:
      directories: directories with `check.json`, `step.json`, `infer.json` or `paper.json`.
      results: directory of the merged files.
      again: whether equally complete records replace present ones.

    Raises:
      UserError: a directory has none of these files, or one that is not a results' file.
    """
    lines = []
    for directory in directories:
        found = [stage for stage in STAGES if (directory / f"{stage}.json").is_file()]
        if not found:
            names = ", ".join(f"{stage}.json" for stage in STAGES)
            raise UserError(f"{directory} holds none of {names}: name a stage's output directory")
        for stage in found:
            source, target = directory / f"{stage}.json", results / merged_name(stage)
            lines += _merge_file(stage, source, target, again)
    return lines


def _merge_file(stage: str, source: Path, target: Path, again: bool) -> list[str]:
    merged, lines = read_records(target), []
    is_current = _current_cell if stage == "paper" else _is_full
    for name, record in read_records(source).items():
        there = merged.get(name)
        if there is not None and not _counts(name, there, is_current):
            there = None
        reason = _refusal(name, record, is_current) or _worse(record, there, again)
        if reason is None:
            merged[name] = record
        lines.append(f"{name}: {reason or 'merged, on ' + record['hardware']['kind']}")
    if merged:
        write_records(target, merged)
    return lines


Current = Callable[[str, Record], bool]


def _refusal(name: str, record: Record, is_current: Current) -> str | None:
    """Returns why a record is refused, whatever is present; None if it may be merged."""
    if record.get("status") != FINISHED:
        return f"left out, failed ({record.get('reason')})"
    if not record.get("hardware", {}).get("kind"):
        return "left out, names no card"
    if not is_current(name, record):
        return "left out, of another config or a rehearsal"
    return None


def _counts(name: str, there: Record, is_current: Current) -> bool:
    """Returns whether a present record is valid."""
    return there.get("status") == FINISHED and is_current(name, there)


def _worse(record: Record, there: Record | None, again: bool) -> str | None:
    """Returns why the present record is kept; None if it is replaced."""
    if there is None or worth(record) > worth(there):
        return None
    if again and worth(record) == worth(there):
        return None
    return "left out, there is one already"


def _is_full(name: str, record: Record) -> bool:
    del name
    return record.get("config_hash") == FULL


def _current_cell(name: str, record: Record) -> bool:
    """Returns whether a cell of `paper`, with any number of epochs, has the suite's config."""
    return record.get("config_hash") == _hash_of(paper(), name)


def _hash_of(suite: Suite, name: str) -> str | None:
    """Returns the hash of a cell's config by the cell's name; None if the suite lacks it."""
    network, data, epochs, method, seed = name.split("/")
    cell = Cell(network, data, method, int(epochs.removesuffix("ep")), int(seed[len("seed") :]))
    known = {(c.network, c.data, c.method) for c in suite.cells}
    if (network, data, method) not in known:
        return None
    return config_hash(cell_config(suite, cell))


def main(arguments: Sequence[str]) -> int:
    """Merges the given directories, and returns the exit status."""
    again, directories = "--again" in arguments, [a for a in arguments if a != "--again"]
    try:
        if not directories or any(argument.startswith("-") for argument in directories):
            raise UserError("name the directories that came back: merge [--again] DIR...")
        for line in merge([Path(argument) for argument in directories], again=again):
            program.say(line)
    except UserError as error:
        return program.fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
