"""Plots of `gradient_conflict`: which exits conflict in which layer, and how that changed.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_jax.reports.figures import (
    Axes,
    MaxNLocator,
    Normalize,
    Patch,
    PercentFormatter,
    Rectangle,
    ScalarMappable,
    colormaps,
    in_standard_style,
    new_figure,
    save_figure,
)

_DOTS_PER_INCH = 100
_PANEL_INCHES, _BARS_INCHES, _FRAME_INCHES = 1.8, 2.2, 1.4
_TIME_PANEL_INCHES = (6.5, 3.6)
_MOST_LAYERS = 10  # larger networks are drawn block by block
_MOST_NUMBERED_EXITS = 7  # with more exits, numbers in the cells would be too small to read
_UNREACHED_COLOR, _DISJOINT_COLOR = "#e5e7eb", "#ffffff"
_RUN_COLORS = ("#b45309", "#0f766e", "#6d28d9", "#be123c")
_TRUNK_COLOR = "black"
_TITLE = "How the gradients of two exits agree: deeper exit (down) against shallower exit (across)"
_DISJOINT = "cosine exactly 0: the two exits train different channels"


@in_standard_style
def plot_conflict(measurements: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plots the cosines between exits, with a column per layer and a row per run, and conflicts.

    Layers that only one exit trains are omitted; networks with many layers are drawn block by
    block.

    Args:
      measurements: results of `dfs_jax.reports.gradient_conflict`, of one network.
      path: path of the PNG.

    Returns:
      The path.

    Raises:
      ValueError: no two exits reach the same layer.
    """
    columns = _shown_columns(measurements)
    if not columns:
        raise ValueError("there is no conflict to draw: no two exits reach the same layer")
    exits = len(measurements[0]["trunk"]["norms"])
    heights = [_PANEL_INCHES] * len(measurements) + [_BARS_INCHES]
    size = (_PANEL_INCHES * max(len(columns), 4) + _FRAME_INCHES, sum(heights) + _FRAME_INCHES)
    figure = new_figure(size, _DOTS_PER_INCH)
    figure.suptitle(_TITLE, fontweight="bold", fontsize=12)
    grid = figure.add_gridspec(len(heights), len(columns), height_ratios=heights)
    for i, measurement in enumerate(measurements):
        for j, rows in enumerate(columns):
            axes = figure.add_subplot(grid[i, j])
            _draw_cosines(axes, np.array(rows[i]["cosines"], float))
            _name_exits(axes, exits, is_left=j == 0, is_last=i == len(measurements) - 1)
            if i == 0:
                axes.set_title(rows[i]["name"], fontsize=10, parse_math=False)
            if j == 0:
                axes.set_ylabel(_run_name(measurement), fontweight="bold")
    _draw_shares(figure.add_subplot(grid[-1, :]), measurements, columns)
    colors = ScalarMappable(Normalize(-1, 1), colormaps["RdBu"])
    panels = figure.axes[: len(columns) * len(measurements)]
    bar = figure.colorbar(colors, ax=panels, aspect=15 * len(measurements), pad=0.01)
    bar.set_label("cosine (red: conflict)")
    figure.legend(
        handles=[
            Patch(facecolor=_DISJOINT_COLOR, edgecolor="#9ca3af", hatch="////", label=_DISJOINT),
            Patch(facecolor=_UNREACHED_COLOR, label="an exit does not reach the layer"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return save_figure(figure, path)


@in_standard_style
def plot_conflict_over_time(
    probes: Sequence[Sequence[Mapping[str, Any]]], titles: Sequence[str], path: Path
) -> Path:
    """Plots conflicting pairs by block and gradient norms by exit over the steps, a column per run.

    Args:
      probes: lines of each run's `metrics.jsonl` whose split is "probe".
      titles: names of the runs.
      path: path of the PNG.

    Returns:
      The path.

    Raises:
      ValueError: a run without such lines.
    """
    if not all(probes):
        raise ValueError("there is no conflict over time: a run was trained without measuring it")
    width, height = _TIME_PANEL_INCHES
    figure = new_figure((width * len(probes), 2 * height), _DOTS_PER_INCH)
    panels = figure.subplots(2, len(probes), squeeze=False, sharex="col", sharey="row")
    for j, (lines, title) in enumerate(zip(probes, titles, strict=True)):
        shares, norms = panels[0, j], panels[1, j]
        _draw_curves(shares, lines, "/conflicting_pairs", first="trunk")
        _draw_curves(norms, lines, "/gradient_norm")
        shares.set_title(title, loc="left", fontweight="bold", parse_math=False)
        norms.set_xlabel("training steps")
        norms.set_yscale("log")
        norms.xaxis.set_major_locator(MaxNLocator(integer=True))
        if j == 0:
            shares.set_ylabel("conflicting pairs of exits")
            norms.set_ylabel("gradient norm by exit")
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None, symbol=" %"))
    return save_figure(figure, path)


def _shown_columns(measurements: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any]]]:
    """Returns the rows of each layer (or block) that two exits reach in any run, by run."""

    def columns(level: str) -> list[Any]:
        rows = zip(*(measurement[level] for measurement in measurements), strict=True)
        return [layer for layer in rows if any(row["pairs"] for row in layer)]

    layers = columns("layers")
    return layers if len(layers) <= _MOST_LAYERS else columns("blocks")


def _draw_cosines(axes: Axes, cosines: np.ndarray) -> None:
    """Draws the cosines of deeper exits (rows) against shallower ones (columns)."""
    exits = len(cosines)
    axes.set_xlim(-0.5, exits - 1.5)
    axes.set_ylim(exits - 0.5, 0.5)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    colormap = colormaps["RdBu"]
    for deep in range(1, exits):
        for shallow in range(deep):
            cosine = cosines[deep, shallow]
            style = _cell_style(cosine, colormap)
            axes.add_patch(Rectangle((shallow - 0.5, deep - 0.5), 1, 1, linewidth=0.8, **style))
            if exits <= _MOST_NUMBERED_EXITS and cosine and not np.isnan(cosine):
                color = "white" if abs(cosine) > 0.6 else "black"
                text = f"{cosine:.2f}".replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}")
                axes.text(shallow, deep, text, ha="center", va="center", fontsize=7, color=color)


def _cell_style(cosine: float, colormap: Any) -> dict[str, Any]:
    if np.isnan(cosine):
        return {"facecolor": _UNREACHED_COLOR, "edgecolor": "white"}
    if cosine == 0:
        return {"facecolor": _DISJOINT_COLOR, "edgecolor": "#9ca3af", "hatch": "////"}
    return {"facecolor": colormap((cosine + 1) / 2), "edgecolor": "white"}


def _name_exits(axes: Axes, exits: int, *, is_left: bool, is_last: bool) -> None:
    step = 1 if exits <= _MOST_NUMBERED_EXITS else 3
    shallow, deep = range(0, exits - 1, step), range(1, exits, step)
    axes.set_xticks(shallow, [str(i + 1) for i in shallow] if is_last else [])
    axes.set_yticks(deep, [str(i + 1) for i in deep] if is_left else [])
    if is_last:
        axes.set_xlabel("exit", fontsize=8)


def _draw_shares(
    axes: Axes, measurements: Sequence[Mapping[str, Any]], columns: Sequence[Any]
) -> None:
    """Draws the fraction of conflicting pairs by layer and for the trunk, with a bar per run."""
    groups = [*columns, tuple(measurement["trunk"] for measurement in measurements)]
    width = 0.8 / len(measurements)
    for i, measurement in enumerate(measurements):
        shares = [100 * (rows[i]["conflicting_pairs"] or 0) for rows in groups]
        places = np.arange(len(groups)) + (i - (len(measurements) - 1) / 2) * width
        color = _RUN_COLORS[i % len(_RUN_COLORS)]
        bars = axes.bar(places, shares, 0.92 * width, color=color, label=_run_name(measurement))
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=1)
    axes.axvline(len(groups) - 1.5, color="#9ca3af", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [rows[0]["name"] for rows in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.margins(y=0.15)
    axes.set_ylabel("conflicting pairs, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(measurements), loc="lower right", bbox_to_anchor=(1, 1))


def _draw_curves(
    axes: Axes, lines: Sequence[Mapping[str, Any]], ending: str, *, first: str | None = None
) -> None:
    """Draws all quantities with this ending, shallow (light) to deep (dark), `first` in black."""
    steps = [line["step"] for line in lines]
    names = [name.removesuffix(ending) for name in lines[0] if name.endswith(ending)]
    curves = {name: [line[f"{name}{ending}"] for line in lines] for name in names}
    shown = [name for name in curves if any(value is not None for value in curves[name])]
    others = [name for name in shown if name != first]
    colors = colormaps["viridis_r"](np.linspace(0.2, 1, max(len(others), 1)))
    for name, color in zip(others, colors, strict=False):
        axes.plot(steps, np.array(curves[name], float), color=color, label=name, linewidth=1.2)
    if first in shown:
        values = np.array(curves[first], float)
        axes.plot(steps, values, color=_TRUNK_COLOR, linewidth=2.4, label=first)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _run_name(measurement: Mapping[str, Any]) -> str:
    return str(measurement["run"]["workdir"])
