"""Plot of a run's classes: accuracies by exit, and the last exit's confusion matrix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_jax.reports.figures import (
    Axes,
    AxesImage,
    PercentFormatter,
    in_standard_style,
    new_figure,
    save_figure,
)
from dfs_jax.reports.report import Report, describe_evaluation, run_title

_DOTS_PER_INCH = 120
_COLORS = "cividis"
_MOST_NAMED = 30  # classes whose names fit next to the axes
_MOST_NUMBERED = 20  # classes whose cells have space for a number
_LONGEST_NAME = 16


@in_standard_style
def plot_confusion(report: Report, path: str | os.PathLike[str]) -> Path:
    """Draws the accuracy of every exit by class, and the confusion matrix of the last exit.

    Args:
      report: report with a section `classes` that holds the matrices (at most 100 classes).
      path: path of the PNG.

    Returns:
      The path.
    """
    section = report["classes"]
    names = [_shortened(name) for name in section["names"]]
    matrix = np.array(section["confusion"][-1]["counts"], float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    by_exit = np.array([row["by_class"] for row in section["accuracy"]], float).T

    figure = new_figure((12.5, 7.5), _DOTS_PER_INCH)
    widths = [max(0.08 * by_exit.shape[1], 0.25), 1]
    left, right = figure.subplots(1, 2, width_ratios=widths)
    title = f"{run_title(report['run'])}\n{describe_evaluation(report['run'])}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)

    _draw(left, by_exit, names, [str(row["exit"]) for row in section["accuracy"]])
    _write_numbers(left, by_exit, 100 * by_exit)
    left.set(title="accuracy (%) by class", xlabel="exit", ylabel="class")
    image = _draw(right, shares, names, names)
    _write_numbers(right, shares, matrix)
    right.set(title="last exit: images of each class by answer", xlabel="answer")
    colorbar = figure.colorbar(image, ax=right, format=PercentFormatter(xmax=1), fraction=0.04)
    colorbar.set_label("share of the class")
    return save_figure(figure, path)


def _draw(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> AxesImage:
    image = axes.imshow(values, vmin=0, vmax=1, cmap=_COLORS, aspect="auto")
    if len(rows) <= _MOST_NAMED:
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
    if len(columns) <= _MOST_NAMED:
        turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        style = turned if max(map(len, columns)) > 3 else {}
        axes.set_xticks(range(len(columns)), columns, parse_math=False, **style)
    return image


def _write_numbers(axes: Axes, shares: np.ndarray, numbers: np.ndarray) -> None:
    """Writes the non-zero numbers into the cells, if there is space for them."""
    if len(shares) > _MOST_NUMBERED:
        return
    for (row, column), number in np.ndenumerate(numbers):
        if np.isfinite(number) and round(number):
            color = "black" if shares[row, column] > 0.5 else "white"
            axes.text(column, row, f"{number:.0f}", ha="center", va="center", color=color, size=8)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
