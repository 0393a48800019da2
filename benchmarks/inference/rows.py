"""Rows of the inference benchmark, see `benchmarks.inference.benchmark`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.inference.candidates import Candidate
from benchmarks.inference.speed import Contender, EarlyExits, Speed
from benchmarks.inference.static import KEYS as STATIC_KEYS
from benchmarks.inference.static import StaticNetwork
from dfs_jax.inference.timing import StageTimes
from dfs_jax.tables import aligned

KEYS = (
    "batch",
    "runtime",
    "policy",
    "accuracy",
    "macs",
    "ideal_speedup",
    "ideal_speedup_by_macs",
    "speedup",
    "p50_ms",
    "p99_ms",
)

LIMITS = "limits"  # of rows of the whole network in a runtime with stages

Row = dict[str, Any]


def row_of(
    runtime: str,
    candidate: Candidate,
    contender: Contender,
    speed: Speed,
    *,
    ideal_speedup: float | None,
    batch: int,
    macs: Sequence[float],
) -> Row:
    """Returns the row of a policy, or of the network up to an exit."""
    early = contender.predictor if isinstance(contender, EarlyExits) else None
    result = candidate.result
    return {
        "batch": batch,
        "runtime": runtime,
        "policy": candidate.name,
        "accuracy": result.accuracy,
        "macs": result.cost,
        "ideal_speedup": ideal_speedup,
        "ideal_speedup_by_macs": macs[-1] / result.cost,
        **_measured(speed),
        "falls_back": early is not None and early.counts.whole > 0,
        "close": 0 if early is None else early.counts.close,
    }


def limits(
    oracles: Mapping[float, np.ndarray], times: StageTimes, whole: float, macs: Sequence[float]
) -> list[dict[str, float]]:
    """Returns the speed-ups of oracles: `loss` of accuracy, `by_macs` and `by_time`.

    Args:
      oracles: exits that each takes, by loss.
      times: times of the stages.
      whole: time that speed-ups are relative to, in seconds for each example.
      macs: multiply-adds of one image up to each exit.
    """
    found = []
    for loss, taken in oracles.items():
        shares = np.bincount(taken, minlength=len(macs)) / len(taken)
        by_macs, by_time = macs[-1] / float(shares @ macs), whole / times.staged(shares.tolist())
        found.append({"loss": loss, "by_macs": by_macs, "by_time": by_time})
    return found


def static_row(
    runtime: str, static: StaticNetwork, speed: Speed, *, batch: int, macs: float
) -> Row:
    """Returns the row of a static network."""
    return {
        "batch": batch,
        "runtime": runtime,
        "policy": static.name,
        "accuracy": static.accuracy,
        "macs": static.macs,
        "ideal_speedup": None,
        "ideal_speedup_by_macs": macs / static.macs,
        **_measured(speed),
        "falls_back": False,
        "close": 0,
    }


def _measured(speed: Speed) -> Row:
    return {
        "speedup": speed.speedup,
        "p50_ms": 1000 * speed.p50,
        "p99_ms": 1000 * speed.p99,
        "images_per_second": 1 / speed.seconds,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def to_json(rows: Sequence[Row]) -> str:
    """Returns the rows as JSON: the fields of `KEYS`, and others that readers know of."""
    kept = [
        {key: row[key] for key in (*KEYS, LIMITS, *STATIC_KEYS) if key in row or key in KEYS}
        for row in rows
    ]
    return json.dumps(kept, indent=2, allow_nan=False) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table for a terminal, without a final newline."""
    titles = (
        "runtime",
        "policy",
        "accuracy",
        "M MACs",
        "by MACs",
        "ideal",
        "real",
        "images/s",
        "p50 ms",
    )
    lines = [
        (
            str(row["runtime"]),
            str(row["policy"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['macs'] / 1e6:.3f}",
            *(_number(row[key]) for key in ("ideal_speedup_by_macs", "ideal_speedup", "speedup")),
            f"{row['images_per_second']:,.0f}",
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p99_ms")),
            str(row["close"]),
            "fell back" if row["falls_back"] else "",
        )
        for row in rows
    ]
    table = aligned([(*titles, "p99 ms", "close", ""), *lines])
    said = [
        f"{row['runtime']}: an accuracy of {100 * (row['accuracy'] - x['loss']):.2f} % allows at "
        f"most {x['by_macs']:.2f} times fewer operations, {x['by_time']:.2f} times less time "
        "in stages"
        for row in rows
        for x in row.get(LIMITS, ())
    ]
    return "\n".join([f"batch {rows[0]['batch']}", table, *said])
