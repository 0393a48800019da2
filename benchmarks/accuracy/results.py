"""Results' file: one line per cell, written atomically, shared by several processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from dfs_jax.files import write_whole
from dfs_jax.types import UserError

FINISHED, FAILED = "finished", "failed"
DIRECTORY = Path(__file__).resolve().parent.parent / "results"

Record = dict[str, Any]


class Named(Protocol):
    """Subject of a record, such as a `Cell`."""

    @property
    def name(self) -> str: ...


class Results:
    """Results of a suite's cells.

    Args:
      path: path of the JSON file, which need not exist.
      locks: directory for the locks of processes that work on the same suite.
    """

    def __init__(self, path: Path, locks: Path):
        self.path, self._locks = path, locks

    def read(self) -> dict[str, Record]:
        """Returns all records by the cells' names; see `read_records`."""
        return read_records(self.path)

    def finished(self, cell: Named, config_hash: str) -> Record | None:
        """Returns the cell's record, or None if it has not finished with this config."""
        return finished_record(self.read(), cell, config_hash)

    def failed_since(self, cell: Named, moment: float) -> bool:
        """Returns whether the cell failed after that moment, in seconds since the epoch."""
        record = self.read().get(cell.name, {})
        return record.get("status") == FAILED and record["at"] >= moment

    def record(self, cell: Named, config_hash: str, status: str, content: Record) -> None:
        """Writes a cell's record, replacing an older one."""
        head = {"status": status, "config_hash": config_hash, "at": time.time()}
        with _locked(self._locks / "results.lock", wait=True):
            cells = {**self.read(), cell.name: {**head, **content}}
            write_records(self.path, cells)

    def add(self, cell: Named, content: Record) -> None:
        """Adds or replaces entries of a cell's record."""
        with _locked(self._locks / "results.lock", wait=True):
            cells = self.read()
            cells[cell.name] |= content
            write_records(self.path, cells)

    @contextlib.contextmanager
    def claim(self, cell: Named) -> Iterator[bool]:
        """Yields whether this process got the cell's lock; a killed process releases it."""
        with _locked(self._locks / f"{cell.name.replace('/', '__')}.lock", wait=False) as mine:
            yield mine


def finished_record(records: dict[str, Record], cell: Named, config_hash: str) -> Record | None:
    """Returns the record of a cell that finished with this config, or None."""
    record = records.get(cell.name, {})
    current = record.get("status") == FINISHED and record.get("config_hash") == config_hash
    return record if current else None


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def read_records(path: Path) -> dict[str, Record]:
    """Returns the records of a results' file by the cells' names; empty if there is no file.

    Raises:
      UserError: the file is not a results' file.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["cells"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a results' file: restore or delete it") from error


def write_records(path: Path, cells: Mapping[str, Record]) -> None:
    """Writes records one per line, so that a new cell changes one line of the file."""
    write_whole(path, _one_line_a_cell(cells))


def _one_line_a_cell(cells: Mapping[str, Record]) -> str:
    lines = [f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in cells.items()]
    return '{"cells": {\n' + ",\n".join(lines) + "\n}}\n"
