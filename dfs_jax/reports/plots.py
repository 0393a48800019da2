"""Plots of a run: accuracies of its exits over time, and against operations.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dfs_jax.reports.figures import (
    Axes,
    Figure,
    MaxNLocator,
    PercentFormatter,
    colormaps,
    in_standard_style,
    new_figure,
    save_figure,
    withStroke,
)
from dfs_jax.reports.report import Report, describe_evaluation, run_title

_SIZE_INCHES, _DOTS_PER_INCH = (10, 6.5), 120  # 1200 x 780 pixels
_ENSEMBLE_COLOR = "#c2185b"
_CURVE_COLOR = "#6b7280"
_LABEL_GAP = 0.033  # a line of text, as a fraction of the axis
_MOST_MARKED_EPOCHS = 40  # on longer curves the markers would merge


@in_standard_style
def plot_accuracy_over_time(
    lines: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Plots the validation accuracy of every exit and of the ensemble against the epoch.

    If a run held no data out, its training accuracy is drawn instead, and labelled so.

    Args:
      lines: lines of `metrics.jsonl`: `epoch`, `split`, `exit1/accuracy`, ...
      path: path of the PNG.
      title: name of the run.

    Returns:
      The path.

    Raises:
      ValueError: no line has an accuracy.
    """
    split = "validation" if any(line["split"] == "validation" for line in lines) else "train"
    chosen = [line for line in lines if line["split"] == split and "exit1/accuracy" in line]
    if not chosen:
        raise ValueError("there is no accuracy to plot: the run was not evaluated yet")
    num_exits = sum(name.startswith("exit") and name.endswith("/accuracy") for name in chosen[0])
    epochs = [line["epoch"] for line in chosen]
    marker = "o" if len(epochs) <= _MOST_MARKED_EPOCHS else None
    style = {"marker": marker, "markersize": 4, "linewidth": 1.4, "clip_on": False}

    figure, axes = _new_figure(title or "Accuracy over time")
    curves = [
        (f"exit {i}", color, "-", [line[f"exit{i}/accuracy"] for line in chosen])
        for i, color in enumerate(_exit_colors(num_exits), start=1)
    ]
    if "ensemble/accuracy" in chosen[0]:
        values = [line["ensemble/accuracy"] for line in chosen]
        curves.append(("ensemble", _ENSEMBLE_COLOR, "--", values))
    for _, color, linestyle, values in curves:
        axes.plot(epochs, values, color=color, linestyle=linestyle, **style)

    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{'training' if split == 'train' else split} accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    margin = 0 if len(set(epochs)) > 1 else 0.5
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    _use_percent(axes, [value for *_, values in curves for value in values])
    _label_line_ends(axes, [(values[-1], name, color) for name, color, _, values in curves])
    return save_figure(figure, path)


@in_standard_style
def plot_accuracy_against_operations(report: Report, path: str | os.PathLike[str]) -> Path:
    """Plots accuracy against multiply-adds: each exit, the budgeted curve, the ensemble's level.

    Args:
      report: report of `build_report`.
      path: path of the PNG.

    Returns:
      The path.
    """
    anytime, points = report["anytime"], report["budgeted"]
    figure, axes = _new_figure(run_title(report["run"]), describe_evaluation(report["run"]))
    level = report["ensemble"]["accuracy"]
    axes.axhline(level, color=_ENSEMBLE_COLOR, linestyle="--", label="ensemble of all exits")
    if points:
        axes.plot(
            [point["macs"] / 1e6 for point in points],
            [point["accuracy"] for point in points],
            color=_CURVE_COLOR,
            marker=".",
            label="budgeted batch: mean over images",
        )
    operations = [row["macs"] / 1e6 for row in anytime]
    accuracies = [row["accuracy"] for row in anytime]
    colors = _exit_colors(len(anytime))
    axes.plot(operations, accuracies, color=_CURVE_COLOR, linewidth=0.8, linestyle=":")
    axes.scatter(
        operations,
        accuracies,
        c=colors,
        s=90,
        edgecolors="black",
        zorder=3,
        label="anytime: one exit for every image",
    )
    for row, x, y in zip(anytime, operations, accuracies, strict=True):
        axes.annotate(
            f"exit {row['exit']}",
            (x, y),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.set_xlabel("M MACs for one image (1 MAC = 2 FLOPs)")
    axes.set_ylabel(f"{report['run']['split']} accuracy")
    axes.set_xlim(left=0)
    _use_percent(axes, [level, *accuracies, *(point["accuracy"] for point in points)])
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return save_figure(figure, path)


def _new_figure(title: str, subtitle: str = "") -> tuple[Figure, Axes]:
    figure = new_figure(_SIZE_INCHES, _DOTS_PER_INCH)
    axes = figure.add_subplot()
    pad = 24 if subtitle else 10
    axes.set_title(title, loc="left", fontweight="bold", pad=pad, parse_math=False)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=_CURVE_COLOR)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _exit_colors(num_exits: int) -> list[Any]:
    """Returns a color for each exit, light (shallow) to dark (deep)."""
    colormap = colormaps["viridis_r"]
    # The palest fifth is hard to see on white.
    return [colormap(0.2 + 0.8 * i / max(num_exits - 1, 1)) for i in range(num_exits)]


def _use_percent(axes: Axes, values: Sequence[float]) -> None:
    """Formats the vertical axis in percent, with a margin around the values within 0 to 100 %."""
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), 0.02)
    axes.set_ylim(max(low - room, 0), min(high + room, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None, symbol=" %"))


def _label_line_ends(axes: Axes, named: Sequence[tuple[float, str, Any]]) -> None:
    """Writes each line's name and last value at its right end, moved apart to avoid overlaps."""
    low, high = axes.get_ylim()
    ordered = sorted(named, key=lambda item: item[0])
    heights = _move_apart([value for value, *_ in ordered], _LABEL_GAP * (high - low), low, high)
    for (value, name, color), height in zip(ordered, heights, strict=True):
        axes.annotate(
            f"{name}  {100 * value:.1f} %",
            (1.015, height),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            annotation_clip=False,
        )


def _move_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns the heights nearest to ascending values that are `gap` apart and within the limits.

    Labels that would overlap form a group around the mean of their values (isotonic regression of
    `value - rank * gap`, by pooling neighbours that are out of order).

    >>> _move_apart([0.0, 5.0, 5.0, 9.0], 1.0, 0.0, 9.0)
    [0.0, 4.5, 5.5, 9.0]
    """
    groups: list[list[float]] = []
    for rank, value in enumerate(values):
        groups.append([value - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    pooled = [fmean(group) for group in groups for _ in group]
    top = high - (len(pooled) - 1) * gap
    return [max(min(height, top), low) + rank * gap for rank, height in enumerate(pooled)]
