"""Table of the rows of `training_cost`, with ratios of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfs_jax.tables import aligned

CostRow = Mapping[str, Any]

_TITLES = [
    *("method", "beta", "framework", "layout"),
    *("forward", "backward", "other", "step", "data", "images/s"),
    *("/ dsn", "step / peer", "compile s", "MiB", "M MACs", "theory"),
]


def cost_table(rows: Sequence[CostRow]) -> str:
    """Returns the rows of one batch size as an aligned table with its legend.

    Args:
      rows: rows of `benchmarks.training_step.training_cost.measure_training_cost`.
    """
    table = aligned([_TITLES, *(_cells(row, rows) for row in rows)])
    return "\n".join([table, *_LEGEND, *_published_loops(rows)])


def _published_loops(rows: Sequence[CostRow]) -> list[str]:
    """Returns the costs of methods that look ahead, next to those of their published programs."""
    lines = []
    for row in rows:
        if row.get("published_loop") is not None:
            ratio = against_dsn(row, rows)
            ours = "" if ratio is None else f" {1 / ratio:.2f} steps of dsn a step;"
            lines.append(f"{row['method']}:{ours} published: {row['published_loop']}.")
    return lines


def against_dsn(row: CostRow, rows: Sequence[CostRow]) -> float | None:
    """Returns a row's images/s divided by those of DSN in the same framework and layout."""
    for other in rows:
        if other["method"] == "dsn" and _place(other) == _place(row):
            return row["images_per_second"] / other["images_per_second"]
    return None


def against_peer(row: CostRow, rows: Sequence[CostRow]) -> float | None:
    """Returns our step time over the peer's for the same method, in its faster layout.

    All variants of DFS are compared with the peer's one.
    """
    steps = [other["step_ms"] for other in rows if _is_its_peer(other, row)]
    return row["step_ms"] / min(steps) if steps else None


def _is_its_peer(other: CostRow, row: CostRow) -> bool:
    same = ("batch", "partition_ratio", "fork", "loss")
    is_other = other["framework"] != row["framework"] == "jax"
    return is_other and all(other[key] == row[key] for key in same)


def _place(row: CostRow) -> tuple[Any, ...]:
    return row["batch"], row["framework"], row["layout"]


def _cells(row: CostRow, rows: Sequence[CostRow]) -> list[str]:
    times = ("forward_ms", "backward_ms", "other_ms", "step_ms", "data_ms", "images_per_second")
    beta = row["partition_ratio"]
    return [
        row["method"],
        "" if beta is None else f"{beta:g}",
        row["framework"],
        row["layout"],
        *(f"{row[key]:,.1f}" for key in times),
        _text(against_dsn(row, rows), ".3f"),
        _text(against_peer(row, rows), ".3f"),
        _text(row["compile_s"], ".1f"),
        _text(row["peak_mib"], ",.0f"),
        _millions(row["macs"]),
        _millions(row["macs_theory"]),
    ]


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


_LEGEND = (
    "Milliseconds per batch: forward: losses in training mode; backward: additional time of their "
    "gradient; other:",
    "rest of the step; data: time to make the next batch, not included in step and images/s.",
    "/ dsn: images/s relative to DSN in the same framework and layout. step / peer: step time "
    "relative to the",
    "peer's for the same method, in its faster layout. compile: of the step, without cache. MiB: "
    "arguments,",
    "outputs and temporaries of the compiled step, as planned by the compiler. MACs per image: of "
    "the step as it runs, and in theory.",
)
