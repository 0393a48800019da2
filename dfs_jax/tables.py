"""Text tables: aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any


def aligned(rows: Iterable[Sequence[Any]], *, left: Collection[int] = ()) -> str:
    """Returns rows whose columns are aligned to the right, without a newline at the end.

    Args:
      rows: cells of each row, titles first; the last rows may have fewer.
      left: indices of the columns that are aligned to the left.

    Example:
      >>> print(aligned([("exit", "accuracy"), ("1", "71.25"), ("ensemble", "7.5")], left=(0,)))
      exit      accuracy
      1            71.25
      ensemble       7.5
    """
    cells = [list(map(str, row)) for row in rows]
    columns = range(max(map(len, cells)))
    widths = [max(len(row[k]) for row in cells if k < len(row)) for k in columns]

    def line(row: Sequence[str]) -> str:
        placed = (
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        return "  ".join(placed).rstrip()

    return "\n".join(map(line, cells))


def markdown(titles: Sequence[Any], rows: Iterable[Sequence[Any]], *, rule: str = "---") -> str:
    """Returns a table of Markdown, without a newline at the end.

    Args:
      titles: title of each column.
      rows: cells of each row.
      rule: line under a title; "---:" aligns columns to the right.

    Example:
      >>> print(markdown(["a", "b"], [["1", "2"]]))
      | a | b |
      |---|---|
      | 1 | 2 |
    """
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (titles, *rows)]
    lines.insert(1, "|" + f"{rule}|" * len(titles))
    return "\n".join(lines)
