"""Rows of each figure of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.accuracy.plots import Curve, Panel, plot_panels
from benchmarks.accuracy.rows import (
    REFERENCE,
    Row,
    Value,
    budget_accuracy,
    difference,
    exit_accuracy,
    mean,
    mean_accuracy,
    num_exits,
)
from benchmarks.accuracy.tables import title

_REFERENCE_TITLE = title(REFERENCE)


def draw_by_exit(by_set: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draws accuracies by exit, and below them the differences from DSN with their intervals."""
    above, below = [], []
    for name, rows in by_set.items():
        present, places = _present(rows), range(1, num_exits(rows) + 1)
        values = [exit_accuracy(i - 1) for i in places]
        curves = [
            Curve(title(row.method), list(places), [mean(row, v) for v in values])
            for row in present
        ]
        above.append(Panel(name, "exit", "test accuracy", curves, whole=True))
        others = _differences(present, list(places), values)
        below.append(
            Panel(f"{name}, less DSN's", "exit", "points", others, whole=True, are_points=True)
        )
    return plot_panels([above, below], path, emphasised=[_REFERENCE_TITLE])


def draw_budget(by_set: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draws budgeted classification: accuracy against operations, and differences from DSN."""
    above, below = [], []
    for name, rows in by_set.items():
        curves = []
        for row in _present(rows):
            budgets = [sorted(record["budget"]) for record in row.runs.values()]
            macs, accuracies = (
                [
                    sum(point[k] for point in points) / len(points)
                    for points in zip(*budgets, strict=True)
                ]
                for k in (0, 1)
            )
            curves.append(Curve(title(row.method), [m / 1e6 for m in macs], accuracies))
        above.append(Panel(name, "mean M MACs for one image", "test accuracy", curves))
        shares = [k / 20 for k in range(2, 21)]
        values = [budget_accuracy(share) for share in shares]
        others = [c._replace(half_widths=()) for c in _differences(_present(rows), shares, values)]
        text, across = f"{name}, less DSN's", "share of the last exit's operations"
        below.append(Panel(text, across, "points", others, are_points=True))
    return plot_panels([above, below], path, emphasised=[_REFERENCE_TITLE])


def draw_betas(
    by_referencing: Mapping[str, Mapping[float, Row]], path: Path, *, reference: Row
) -> Path:
    """Draws the accuracy of every exit, and their mean, against beta; DSN's are dashed."""
    panels = []
    for name, by_beta in by_referencing.items():
        present = {beta: row for beta, row in sorted(by_beta.items()) if row.runs}
        curves = [
            Curve(label, list(present), [mean(row, value) for row in present.values()])
            for label, value in _exits_and_mean(list(present.values()))
        ]
        levels = {label: mean(reference, value) for label, value in _exits_and_mean([reference])}
        panels.append(Panel(name, "beta", "test accuracy", curves, levels if curves else {}))
    return plot_panels([panels], path, emphasised=["mean of the exits"], ordered=True)


def draw_conflict(by_set: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draws the fraction of conflicting pairs in the trunk over the training steps."""
    panels = []
    for name, rows in by_set.items():
        curves = []
        for row in _present(rows):
            probes = [record["conflict"] for record in row.runs.values()]
            steps = [probe["step"] for probe in probes[0]]
            shares = [
                sum(probe["pairs"]["trunk"] or 0.0 for probe in at_step) / len(at_step)
                for at_step in zip(*probes, strict=True)
            ]
            curves.append(Curve(title(row.method), steps, shares))
        panels.append(Panel(name, "training steps", "conflicting pairs of exits", curves))
    return plot_panels([panels], path, emphasised=[_REFERENCE_TITLE])


def draw_epochs(by_set: Mapping[str, Mapping[int, Sequence[Row]]], path: Path) -> Path:
    """Draws differences from DSN against epochs: for the first exit, the mean, and the last."""
    panels = []
    for name, by_epochs in by_set.items():
        exits = max(num_exits(rows) for rows in by_epochs.values())
        for label, value in (
            ("first exit", exit_accuracy(0)),
            ("mean of the exits", mean_accuracy),
            ("last exit", exit_accuracy(exits - 1)),
        ):
            curves = _by_epochs(by_epochs, value)
            text = f"{name}, {label}"
            panels.append(
                Panel(text, "epochs", "points above DSN", curves, logarithmic=True, are_points=True)
            )
    return plot_panels([panels[i : i + 3] for i in range(0, len(panels), 3)], path)


def _by_epochs(by_epochs: Mapping[int, Sequence[Row]], value: Value) -> list[Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for epochs, rows in sorted(by_epochs.items()):
        reference = next(row for row in rows if row.method == REFERENCE)
        for row in rows:
            found = difference(row, reference, value)
            if row is not reference and found is not None:
                points.setdefault(title(row.method), []).append((epochs, found.mean))
    return [Curve(name, *zip(*found, strict=True)) for name, found in points.items()]


def _differences(
    rows: Sequence[Row], places: Sequence[float], values: Sequence[Value]
) -> list[Curve]:
    reference = next((row for row in rows if row.method == REFERENCE), None)
    curves = []
    for row in rows:
        if reference is None or row is reference:
            continue
        found = [difference(row, reference, value) for value in values]
        known = [d for d in found if d is not None]
        if len(known) == len(found):
            widths = [d.half_width for d in known if d.half_width is not None]
            curves.append(Curve(title(row.method), places, [d.mean for d in known], widths))
    return curves


def _exits_and_mean(rows: Sequence[Row]) -> list[tuple[str, Value]]:
    exits = [(f"exit {i + 1}", exit_accuracy(i)) for i in range(num_exits(rows))]
    return [*exits, ("mean of the exits", mean_accuracy)] if exits else []


def _present(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.runs]
