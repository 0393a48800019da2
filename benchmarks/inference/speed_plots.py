"""Plot of `benchmarks.inference.benchmark`: speed-ups and latencies of early exits.

Import this module only where plots are drawn, since `figures` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfs_jax.reports.figures import (
    Axes,
    LogLocator,
    in_standard_style,
    new_figure,
    save_figure,
)

_SIZE_INCHES, _DOTS_PER_INCH = (13, 5.5), 110
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756")


@in_standard_style
def plot_speed(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plots speed-ups, measured and ideal, and latencies against the operations saved.

    Args:
      rows: rows of `benchmarks.inference.benchmark.benchmark`, for any batch sizes.
      path: path of the PNG.

    Returns:
      The path.
    """
    figure = new_figure(_SIZE_INCHES, _DOTS_PER_INCH)
    speeds, latencies = figure.subplots(1, 2)
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    most = max(row["ideal_speedup_by_macs"] for row in rows if not _is_fixed(row))
    for batch, color in zip(batches, _COLORS * len(batches), strict=False):
        some = [row for row in rows if row["batch"] == batch]
        early = sorted(
            (row for row in some if not _is_fixed(row)),
            key=lambda row: row["ideal_speedup_by_macs"],
        )
        # An exit that saves more than any policy would squeeze them into a corner.
        fixed = [r for r in some if _is_fixed(r) and r["ideal_speedup_by_macs"] <= 1.05 * most]
        _draw_speeds(speeds, early, fixed, batch, color)
        _draw_latencies(latencies, early, batch, color)
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
    for axes in (speeds, latencies):
        axes.set_xlabel("operations saved: whole network's over the policy's")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return save_figure(figure, path)


def _is_fixed(row: Mapping[str, Any]) -> bool:
    return row["policy"] == "full" or row["policy"].startswith("exit ")


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
