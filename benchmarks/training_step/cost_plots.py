"""Plot of `training_cost`: time of a step by part, and images per second against beta.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.training_step.cost_table import CostRow
from dfs_jax.reports.figures import Axes, in_standard_style, new_figure, save_figure

_WIDTH_INCHES, _DOTS_PER_INCH = 14, 100
_BAR_INCHES, _LEAST_INCHES, _FRAME_INCHES = 0.3, 2.7, 1.2
_GAP = 0.5  # between frameworks, in bars
_PARTS = (("forward", "#4c78a8"), ("backward", "#f58518"), ("other", "#9aa5b1"))
_COLORS = ("#4c78a8", "#b279a2", "#54a24b", "#e45756")
_NAMES = {
    "dsn": "DSN",
    "byot": "BYOT",
    "dfs": "DFS",
    "dfs+byot": "DFS + BYOT",
    "dfs_naive": "naive DFS",
    "dfs_flax": "plain Flax DFS",
}


@in_standard_style
def plot_training_cost(rows: Sequence[CostRow], path: Path) -> Path:
    """Plots two panels for each batch size: step time by method, and images/s against beta.

    These correspond to figures 4 and 5 (right) of Gong et al., ECCV 2024.

    Args:
      rows: rows of `benchmarks.training_step.training_cost.measure_training_cost`.
      path: path of the PNG.

    Returns:
      The path.
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    by_batch = [[row for row in rows if row["batch"] == batch] for batch in batches]
    heights = [max(_BAR_INCHES * len(some), _LEAST_INCHES) + _FRAME_INCHES for some in by_batch]
    figure = new_figure((_WIDTH_INCHES, sum(heights)), _DOTS_PER_INCH)
    panels = figure.subplots(
        len(batches), 2, squeeze=False, width_ratios=[3, 2], height_ratios=heights
    )
    for (times, speeds), batch, some in zip(panels, batches, by_batch, strict=True):
        _draw_times(times, some)
        _draw_speeds(speeds, some)
        title = f"{some[0]['model']}, batch {batch}"
        for axes, what in ((times, "one step"), (speeds, "speed by beta")):
            text = f"{title}: {what}"
            axes.set_title(text, loc="left", fontweight="bold", pad=26, parse_math=False)
            axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def _draw_times(axes: Axes, rows: Sequence[CostRow]) -> None:
    """Draws a stacked bar for each row, from the top, with a gap between frameworks."""
    places = _places(rows)
    starts = [0.0] * len(rows)
    for part, color in _PARTS:
        ends = [_end_of(part, row) for row in rows]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        axes.barh(places, lengths, left=starts, color=color, label=part, height=0.75)
        starts = ends
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            f"{row['step_ms']:,.0f} ms",
            (row["step_ms"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(row["step_ms"] for row in rows))
    axes.set_xlabel("ms for one batch")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_PARTS), frameon=False)


def _places(rows: Sequence[CostRow]) -> list[float]:
    """Returns the position of each bar, from the top, with a gap between frameworks."""
    groups = list(dict.fromkeys(map(_runner, rows)))
    return [i + _GAP * groups.index(_runner(row)) for i, row in enumerate(rows)]


def _end_of(part: str, row: CostRow) -> float:
    """Returns the end of a part's bar; noise can make a part longer than the whole step."""
    forward, step = min(row["forward_ms"], row["step_ms"]), row["step_ms"]
    both = min(max(forward, row["forward_ms"] + row["backward_ms"]), step)
    return {"forward": forward, "backward": both, "other": step}[part]


def _draw_speeds(axes: Axes, rows: Sequence[CostRow]) -> None:
    """Draws images/s of DFS against beta, with those of DSN and BYOT as horizontal lines."""
    for runner, color in zip(dict.fromkeys(map(_runner, rows)), _COLORS, strict=False):
        speeds = {method: [] for method in ("dfs", "dsn", "byot")}
        for row in rows:
            if _runner(row) == runner and row["method"] in speeds:
                speeds[row["method"]].append((row["partition_ratio"], row["images_per_second"]))
        if speeds["dfs"]:
            betas, values = zip(*sorted(speeds["dfs"]), strict=True)
            axes.plot(betas, values, color=color, marker="o", label=f"DFS, {runner}")
        for method, style in (("dsn", "--"), ("byot", ":")):
            for _, value in speeds[method]:
                name = f"{_NAMES[method]}, {runner}"
                axes.axhline(value, color=color, linestyle=style, label=name)
    axes.set_xlabel("beta: fraction of channels that deeper exits train")
    axes.set_ylabel("images/s")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _label(row: CostRow) -> str:
    beta = row["partition_ratio"]
    name = _NAMES.get(row["method"], row["method"])
    return f"{name}{'' if beta is None else f' β={beta:g}'}, {_runner(row)}"


def _runner(row: CostRow) -> str:
    """Returns the framework of a row, with its layout, as text."""
    if row["framework"] == "jax":
        return "ours"
    return f"{row['framework']} {row['layout'].replace('_', ' ')}"
