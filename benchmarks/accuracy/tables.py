"""Rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from benchmarks.accuracy.published import Published
from benchmarks.accuracy.rows import (
    REFERENCE,
    Difference,
    Row,
    Value,
    budget_accuracy,
    difference,
    ensemble_accuracy,
    exit_accuracy,
    mean,
    mean_accuracy,
    num_exits,
)
from dfs_jax.tables import markdown

NOT_RUN = "not run yet"
_TITLES = {
    "dfs_trunk_only": "DFS trunk_only",
    "dfs_none": "DFS none",
    "dfs": "DFS symmetric",
    "dsn": "DSN",
    "byot": "BYOT",
    "ge": "GE",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "meta_gf": "Meta-GF",
    "wpn": "WPN",
    "nash_mtl": "Nash-MTL",
    "distillation": "distillation",
}


def title(method: str) -> str:
    """Returns a method's name in tables and figures.

    >>> title("dfs_trunk_only_beta0.3"), title("dsn_augmented"), title("dfs")
    ('DFS trunk_only, beta 0.3', 'DSN, augmented', 'DFS symmetric')
    """
    start = next((name for name in _TITLES if f"{method}_".startswith(f"{name}_")), None)
    if start is None:
        return method
    rest = method.removeprefix(start).replace("_beta", ", beta ").replace("_", ", ")
    return f"{_TITLES[start]}{rest}"


def accuracy_table(rows: Sequence[Row], reference: Row | None = None) -> str:
    """Returns accuracies in percent, means over seeds, and training costs over the reference's.

    Args:
      rows: rows of one network.
      reference: reference row; None for the first row of DSN.
    """
    reference = reference or _reference(rows)
    exits = num_exits(rows)
    header = [
        *_exit_titles(exits),
        "mean",
        "ensemble",
        "mean less DSN's",
        "operations",
        "time",
    ]
    lines = []
    for row in rows:
        if not row.runs:
            lines.append([title(row.method), _seeds(row), *[NOT_RUN], *[""] * (len(header) - 1)])
            continue
        lines.append(
            [
                title(row.method),
                _seeds(row),
                *(f"{100 * mean(row, value):.2f}" for value in _columns(exits)),
                _points(difference(row, reference, mean_accuracy)) if row != reference else "",
                _ratio(row, reference, _training_macs),
                _ratio(row, reference, _image_ms),
            ]
        )
    return markdown(["method", "seeds", *header], lines)


def difference_table(rows: Sequence[Row], reference: Row | None = None) -> str:
    """Returns differences from a reference with 95 % intervals over paired seeds, by exit.

    Differences whose interval excludes 0 are bold.

    Args:
      rows: rows of one network.
      reference: one of the rows; None for the row of DSN.
    """
    reference, exits = reference or _reference(rows), num_exits(rows)
    lines = [
        [title(row.method), *(_points(difference(row, reference, v)) for v in _columns(exits))]
        for row in rows
        if row != reference
    ]
    header = [f"less {title(reference.method)}'s", *_exit_titles(exits), "mean", "ensemble"]
    return markdown(header, lines)


def budget_table(rows: Sequence[Row], shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0)) -> str:
    """Returns accuracies of budgeted classification at fractions of the last exit's operations."""
    reference = _reference(rows)
    lines = []
    for row in rows:
        cells = [NOT_RUN, *[""] * (len(shares) - 1)]
        if row.runs:
            cells = [_with_difference(row, reference, budget_accuracy(s)) for s in shares]
        lines.append([title(row.method), _seeds(row), *cells])
    return markdown(["method", "seeds", *(f"{100 * share:g} %" for share in shares)], lines)


def conflict_table(rows: Sequence[Row]) -> str:
    """Returns fractions of conflicting pairs of exits, and the pairs' mean cosine in the trunk.

    Means are over a run's measurements and over seeds.
    """
    runs = [record for row in rows for record in row.runs.values()]
    places = list(runs[0]["conflict"][0]["pairs"]) if runs else ["trunk"]
    lines = []
    for row in rows:
        cells = [NOT_RUN, *[""] * len(places)]
        if row.runs:
            cells = [f"{100 * mean(row, _conflict_at(place)):.1f} %" for place in places]
            cells.append(f"{mean(row, _mean_cosine):.2f}")
        lines.append([title(row.method), _seeds(row), *cells])
    return markdown(["method", "seeds", *places, "mean cosine"], lines)


def published_table(rows: Sequence[Row], published: dict[str, Published]) -> str:
    """Returns our accuracies, each with the published ones below."""
    exits = max(num_exits(rows), *(len(row.exits) for row in published.values()))
    lines = []
    for row in rows:
        ours = [NOT_RUN, *[""] * exits]
        if row.runs:
            values = [*(exit_accuracy(i) for i in range(exits)), ensemble_accuracy]
            ours = [f"{100 * mean(row, value):.2f}" for value in values]
        # Its config has the referencing of the published code.
        name = title(row.method).replace(" symmetric", "")
        lines.append([f"{name}, here", _seeds(row), *ours])
        if row.method in published:
            known = (*published[row.method].exits, published[row.method].ensemble)
            cells = ["" if value is None else f"{value:g}" for value in known]
            lines.append([f"{name}, paper", "", *cells])
    return markdown(["method", "seeds", *_exit_titles(exits), "ensemble"], lines)


def _reference(rows: Sequence[Row]) -> Row:
    return next((row for row in rows if row.method == REFERENCE), rows[0])


def _columns(exits: int) -> list[Value]:
    return [*(exit_accuracy(i) for i in range(exits)), mean_accuracy, ensemble_accuracy]


def _exit_titles(exits: int) -> list[str]:
    return [f"exit {i}" for i in range(1, exits + 1)]


def _conflict_at(place: str) -> Value:
    def value(record: dict) -> float:
        shares = [probe["pairs"][place] or 0.0 for probe in record["conflict"]]
        return sum(shares) / len(shares)

    return value


def _mean_cosine(record: dict) -> float:
    """Returns the mean cosine of all pairs and probes, 0 for pairs without common parameters."""
    return fmean(cosine or 0.0 for probe in record["conflict"] for cosine in probe["cosines"])


def _seeds(row: Row) -> str:
    return str(row.asked) if len(row.runs) == row.asked else f"{len(row.runs)} of {row.asked}"


def _points(found: Difference | None) -> str:
    if found is None:
        return ""
    text = f"{100 * found.mean:+.2f}"
    if found.half_width is not None:
        text += f" ± {100 * found.half_width:.2f}"
    return f"**{text}**" if found.is_clear else text


def _with_difference(row: Row, reference: Row, value: Value) -> str:
    shown = f"{100 * mean(row, value):.2f}"
    return shown if row == reference else f"{shown} ({_points(difference(row, reference, value))})"


def _training_macs(record: dict) -> float | None:
    return record["training_macs"]


def _image_ms(record: dict) -> float | None:
    return None if record["step_ms"] is None else record["step_ms"] / record["batch_size"]


def _ratio(row: Row, reference: Row, cost: Callable[[dict], float | None]) -> str:
    """Returns a cost relative to the reference, over common seeds."""
    common = row.runs.keys() & reference.runs
    costs = [cost(r.runs[seed]) for r in (row, reference) for seed in common]
    known = [value for value in costs if value is not None]
    if not known or len(known) < len(costs):
        return ""
    return f"{sum(known[: len(common)]) / sum(known[len(common) :]):.2f}"
