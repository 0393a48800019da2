"""The picture of `training_cost`: where a step's time goes, and images/s against beta.

Imported where it is drawn, since it imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dfs_jax.analysis.cost_table import CostRow
from dfs_jax.analysis.plots import save_figure

_WIDTH_INCHES, _DOTS_PER_INCH = 13, 110
_BAR_INCHES, _LEAST_INCHES, _FRAME_INCHES = 0.3, 3.0, 1.2
_PARTS = (("forward", "#4c78a8"), ("backward", "#f58518"), ("other", "#9aa5b1"))
_COLORS = ("#4c78a8", "#b279a2", "#54a24b", "#e45756")
_NAMES = {
    "dsn": "DSN",
    "byot": "BYOT",
    "dfs": "DFS",
    "dfs_byot": "DFS + BYOT",
    "dfs_naive": "DFS, naive graph",
    "dfs_flax": "DFS, plain Flax",
}


def plot_training_cost(rows: Sequence[CostRow], path: Path) -> Path:
    """Draws two panels for each batch size: step time by method, and images/s against beta.

    As in figures 4 and 5 (right) of Gong et al., ECCV 2024.

    Args:
      rows: of `dfs_jax.analysis.training_cost.measure_training_cost`.
      path: of the PNG.

    Returns:
      The path.
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    by_batch = [[row for row in rows if row["batch"] == batch] for batch in batches]
    heights = [max(_BAR_INCHES * len(some), _LEAST_INCHES) + _FRAME_INCHES for some in by_batch]
    figure = Figure((_WIDTH_INCHES, sum(heights)), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(batches), 2, squeeze=False, width_ratios=[3, 2], height_ratios=heights
    )
    for (times, speeds), batch, some in zip(panels, batches, by_batch, strict=True):
        _draw_times(times, some)
        _draw_speeds(speeds, some)
        title = f"{some[0]['model']}, batch {batch}"
        times.set_title(f"{title}: one step", loc="left", fontweight="bold", parse_math=False)
        speeds.set_title(f"{title}: DFS by beta", loc="left", fontweight="bold", parse_math=False)
    return save_figure(figure, path)


def _draw_times(axes: Axes, rows: Sequence[CostRow]) -> None:
    """Draws a stacked bar for each row, the first row on top."""
    places = range(len(rows))
    starts = [0.0] * len(rows)
    for part, color in _PARTS:
        # A difference of two medians can fall below zero by noise.
        lengths = [max(row[f"{part}_ms"], 0.0) for row in rows]
        axes.barh(places, lengths, left=starts, color=color, label=part, height=0.75)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for place, end, row in zip(places, starts, rows, strict=True):
        axes.annotate(
            f"{row['step_ms']:,.0f} ms",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=True)


def _draw_speeds(axes: Axes, rows: Sequence[CostRow]) -> None:
    """Draws images/s of DFS against beta, with DSN's and BYOT's as levels."""
    places = list(dict.fromkeys((row["framework"], row["layout"]) for row in rows))
    for (framework, layout), color in zip(places, _COLORS, strict=False):
        some = [r for r in rows if (r["framework"], r["layout"]) == (framework, layout)]
        curve = sorted(
            (r["partition_ratio"], r["images_per_second"]) for r in some if r["method"] == "dfs"
        )
        name = _place(framework, layout)
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", color=color, label=f"DFS, {name}")
        for method, style in (("dsn", "--"), ("byot", ":")):
            for row in some:
                if row["method"] == method:
                    axes.axhline(
                        row["images_per_second"],
                        color=color,
                        linestyle=style,
                        label=f"{_NAMES[method]}, {name}",
                    )
    axes.set_xlabel("beta: fraction of channels that deeper exits train")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)


def _label(row: CostRow) -> str:
    beta = row["partition_ratio"]
    name = _NAMES[row["method"]] + ("" if beta is None else f" {beta:g}")
    return f"{name}, {_place(row['framework'], row['layout'])}"


def _place(framework: str, layout: str) -> str:
    return "ours" if framework == "jax" else f"{framework} {layout.replace('_', ' ')}"
