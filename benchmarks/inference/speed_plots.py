"""Plot of `benchmarks.inference.benchmark`: speed-ups and latencies of early exits.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inference.static import PREFIX, is_policy, is_static
from dfs_jax.reports.figures import (
    Axes,
    LogLocator,
    PercentFormatter,
    in_standard_style,
    new_figure,
    save_figure,
)

_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 6.5, 5.5, 110
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756")


@in_standard_style
def plot_speed(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plots speed-ups, measured and ideal, and latencies against the operations saved.

    If there are static networks, a third panel shows the accuracy of these and of the policies
    against their speed-ups.

    Args:
      rows: rows of `benchmarks.inference.benchmark.benchmark`, for any batch sizes.
      path: path of the PNG.

    Returns:
      The path.
    """
    panels = 3 if any(map(is_static, rows)) else 2
    figure = new_figure((_WIDTH_INCHES * panels, _HEIGHT_INCHES), _DOTS_PER_INCH)
    speeds, latencies, *accuracies = figure.subplots(1, panels)
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    most = max(row["ideal_speedup_by_macs"] for row in rows if is_policy(row))
    for batch, color in zip(batches, _COLORS * len(batches), strict=False):
        some = [row for row in rows if row["batch"] == batch]
        early = sorted(
            (row for row in some if is_policy(row)), key=lambda row: row["ideal_speedup_by_macs"]
        )
        static = [row for row in some if is_static(row)]
        # An exit that saves more than any policy would squeeze them into a corner.
        near = [r for r in some if r not in early and r["ideal_speedup_by_macs"] <= 1.05 * most]
        _draw_speeds(speeds, early, [r for r in near if not is_static(r)], batch, color)
        _draw_latencies(latencies, early, batch, color)
        for axes in accuracies:
            _draw_accuracies(axes, early, static, batch, color)
    speeds.plot([1, most], [1, most], color="#9aa5b1", linestyle=":", label="ideal by operations")
    speeds.set_xlim(0.9, 1.05 * most)
    speeds.set_ylabel("speed-up over the whole network as one program")
    speeds.set_title("Throughput", loc="left", fontweight="bold")
    latencies.set_yscale("log")
    latencies.yaxis.set_major_formatter("{x:g}")
    latencies.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    latencies.yaxis.set_minor_formatter("{x:g}")
    latencies.set_ylabel("ms from a call to an example's answer")
    latencies.set_title("Latency, batches that come alone", loc="left", fontweight="bold")
    for axes in accuracies:
        axes.set_xlabel("speed-up over the whole network as one program")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set_ylabel("accuracy on the test split")
        axes.set_title("Policies and static networks", loc="left", fontweight="bold")
    for axes in (speeds, latencies):
        axes.set_xlabel("operations saved: whole network's over the policy's")
    for axes in (speeds, latencies, *accuracies):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return save_figure(figure, path)


def _draw_speeds(
    axes: Axes,
    early: Sequence[Mapping[str, Any]],
    fixed: Sequence[Mapping[str, Any]],
    batch: int,
    color: str,
) -> None:
    saved = [row["ideal_speedup_by_macs"] for row in early]
    axes.plot(
        saved,
        [row["speedup"] for row in early],
        color=color,
        marker="o",
        label=f"batch {batch}, measured",
    )
    axes.plot(
        saved,
        [row["ideal_speedup"] for row in early],
        color=color,
        linestyle="--",
        label=f"batch {batch}, ideal by stage times",
    )
    axes.plot(
        [row["ideal_speedup_by_macs"] for row in fixed],
        [row["speedup"] for row in fixed],
        color=color,
        linestyle="",
        marker="x",
        label=f"batch {batch}, one exit for all",
    )


def _draw_latencies(axes: Axes, early: Sequence[Mapping[str, Any]], batch: int, color: str) -> None:
    saved = [row["ideal_speedup_by_macs"] for row in early]
    for name, style in (("p50", "-"), ("p99", ":")):
        values = [row[f"{name}_ms"] for row in early]
        label = f"batch {batch}, {name}"
        axes.plot(saved, values, color=color, linestyle=style, marker=".", label=label)


def _draw_accuracies(
    axes: Axes,
    early: Sequence[Mapping[str, Any]],
    static: Sequence[Mapping[str, Any]],
    batch: int,
    color: str,
) -> None:
    for some, style, name in ((early, "-o", "policies"), (static, "*", "static networks")):
        axes.plot(
            [row["speedup"] for row in some],
            [row["accuracy"] for row in some],
            style,
            color=color,
            markersize=12 if style == "*" else None,
            label=f"batch {batch}, {name}",
        )
    for row in static:
        axes.annotate(
            row["policy"].removeprefix(PREFIX),
            (row["speedup"], row["accuracy"]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=color,
        )
