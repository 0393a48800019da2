"""Plot of `dfs_jax.reports.placement`: accuracy of subsets of exits at a mean cost.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfs_jax.reports.figures import (
    MaxNLocator,
    PercentFormatter,
    in_standard_style,
    new_figure,
    save_figure,
)
from dfs_jax.reports.placement import best_of_each_size, said

_SIZE_INCHES, _DOTS_PER_INCH = (8, 5.5), 110
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756")


@in_standard_style
def plot_placement(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plots the accuracy of every subset against its number of exits, a colour for each cost.

    A line joins the best subset of each size, which is labelled with its exits.

    Args:
      rows: rows of `dfs_jax.reports.placement.find_places`, for any costs.
      path: path of the PNG.

    Returns:
      The path.
    """
    figure = new_figure(_SIZE_INCHES, _DOTS_PER_INCH)
    axes = figure.subplots()
    speedups = list(dict.fromkeys(row["speedup"] for row in rows))
    for speedup, color in zip(speedups, _COLORS * len(speedups), strict=False):
        some = [dict(row) for row in rows if row["speedup"] == speedup]
        sizes, accuracies = [len(row["exits"]) for row in some], [row["accuracy"] for row in some]
        axes.plot(sizes, accuracies, ".", color=color, alpha=0.4)
        best = best_of_each_size(some)
        axes.plot(
            [len(row["exits"]) for row in best],
            [row["accuracy"] for row in best],
            "-o",
            color=color,
            label=said(best[0]),
        )
        for row in best:
            axes.annotate(
                ", ".join(map(str, row["exits"])),
                (len(row["exits"]), row["accuracy"]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=color,
            )
    axes.set_xlabel("number of exits")
    axes.set_ylabel("accuracy on validation data")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_title("Where to put exits", loc="left", fontweight="bold")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return save_figure(figure, path)
