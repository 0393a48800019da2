"""Plots of methods: panels of curves with shared colors.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.reports.figures import (
    Axes,
    MaxNLocator,
    PercentFormatter,
    ScalarFormatter,
    colormaps,
    in_standard_style,
    new_figure,
    save_figure,
)

_PANEL_INCHES = (5.6, 4.2)
_LEGEND_INCHES = 0.8
_DOTS_PER_INCH = 100
_MARKERS = "osD^vPX*<>hp"
_MOST_MARKED = 20  # on longer curves the markers would merge


class Curve(NamedTuple):
    """One line of a panel.

    Attributes:
      name: name in the legend; curves with equal names look alike in all panels.
      x: horizontal positions.
      y: fractions, drawn as percent.
      half_widths: half widths of the intervals around `y`; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half_widths: Sequence[float] = ()


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
      title: title above the axes.
      x_label: label of the horizontal axis.
      y_label: label of the vertical axis.
      curves: curves, in the order of the legend.
      levels: heights of dashed lines, by the name of the curve whose color they have.
      whole: whether `x` holds integers, each with a tick.
      logarithmic: whether the horizontal axis is logarithmic.
      are_points: whether `y` holds differences, in percentage points around a line at 0.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    levels: Mapping[str, float] = MappingProxyType({})
    whole: bool = False
    logarithmic: bool = False
    are_points: bool = False


@in_standard_style
def plot_panels(
    rows: Sequence[Sequence[Panel]],
    path: Path,
    *,
    emphasised: Sequence[str] = (),
    ordered: bool = False,
) -> Path:
    """Draws rows of panels with one legend below them.

    Args:
      rows: rows with equal numbers of panels.
      path: path of the PNG.
      emphasised: names of curves drawn thick and black, such as the reference.
      ordered: whether to color the others light to dark, like exits from shallow to deep.

    Returns:
      The path.

    Raises:
      ValueError: there is no curve.
    """
    names = list(dict.fromkeys(c.name for row in rows for panel in row for c in panel.curves))
    if not names:
        raise ValueError("there is nothing to draw: no panel has a curve")
    width, height = _PANEL_INCHES
    size = (width * len(rows[0]), height * len(rows) + _LEGEND_INCHES)
    figure = new_figure(size, _DOTS_PER_INCH)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    styles = _styles(names, emphasised, ordered)
    for panels, row in zip(rows, grid, strict=True):
        for panel, axes in zip(panels, row, strict=True):
            _draw(axes, panel, styles)
    handles = {}
    for axes in figure.axes:
        handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [name for name in names if name in handles]
    columns = min(len(shown), 3 * len(rows[0]))
    figure.legend(
        [handles[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    return save_figure(figure, path)


def _styles(names: Sequence[str], emphasised: Sequence[str], ordered: bool) -> dict[str, Any]:
    others = [name for name in names if name not in emphasised]
    places = np.linspace(0.2, 1, max(len(others), 1))
    colors = colormaps["viridis_r"](places) if ordered else _distinct(len(others))
    looks = zip(others, colors, _MARKERS * len(others), strict=False)
    styles: dict[str, Any] = {
        # Curves with repeated colors differ by their line style.
        name: {"color": color, "marker": marker, "linewidth": 1.4, "linestyle": ("-", "-.")[i > 9]}
        for i, (name, color, marker) in enumerate(looks)
    }
    for name in emphasised:
        styles[name] = {"color": "black", "marker": "", "linewidth": 2.6, "zorder": 5}
    return styles


def _distinct(count: int) -> list[Any]:
    colormap = colormaps["tab10"]
    return [colormap(i % 10) for i in range(count)]


def _draw(axes: Axes, panel: Panel, styles: dict[str, Any]) -> None:
    if panel.are_points:
        axes.axhline(0, color="black", linewidth=1)
    for i, curve in enumerate(panel.curves):
        x = np.array(curve.x, float)
        if curve.half_widths:
            shift = 0.05 * (i - (len(panel.curves) - 1) / 2)  # separates the error bars
            style = {**styles[curve.name], "markersize": 4, "capsize": 2, "elinewidth": 0.9}
            axes.errorbar(x + shift, curve.y, curve.half_widths, label=curve.name, **style)
        else:
            style = styles[curve.name]
            if len(curve.x) > _MOST_MARKED:
                style = {**style, "marker": ""}
            axes.plot(x, curve.y, label=curve.name, markersize=4, **style)
    for name, level in panel.levels.items():
        axes.axhline(level, color=styles[name]["color"], linestyle="--", linewidth=0.9)
    axes.set_title(panel.title, loc="left", fontweight="bold", fontsize=10, parse_math=False)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    symbol = "" if panel.are_points else " %"
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None, symbol=symbol))
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.set_xticks(sorted({place for curve in panel.curves for place in curve.x}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
    elif panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
