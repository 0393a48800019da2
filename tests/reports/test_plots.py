"""Plots: what is drawn, from two exits to thirteen and from one epoch to hundreds."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dfs_jax.reports import plots
from dfs_jax.reports.plots import plot_accuracy_against_operations, plot_accuracy_over_time
from dfs_jax.types import UserError


def metrics(exits, epochs, splits=("train", "validation")):
    lines = []
    for epoch, split in itertools.product(range(1, epochs + 1), splits):
        accuracies = {f"exit{i + 1}/accuracy": 0.3 + 0.02 * i for i in range(exits)}
        line = {"step": 7 * epoch, "epoch": epoch, "split": split, "loss": 2.0, **accuracies}
        lines.append(line | {"ensemble/accuracy": 0.9} if split == "validation" else line)
    return lines


def report(exits):
    return {
        "run": {"split": "test", "examples": 31, "model": "vgg_$7$", "data": "digits"},
        "anytime": [
            {"exit": i + 1, "accuracy": 0.5 + 0.03 * i, "macs": 10**6 * (i + 1), "params": 7}
            for i in range(exits)
        ],
        "ensemble": {"accuracy": 0.95},
        "budgeted": [
            {"p": p / 20, "thresholds": [0.5] * exits, "accuracy": 0.6, "macs": 1e6 * (1 + p / 40)}
            for p in range(1, 41)
        ],
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, kept for inspection."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def texts(figure):
    axes = figure.axes[0]
    return [text.get_text() for text in axes.texts if text.get_text()]


@pytest.mark.parametrize(("exits", "epochs"), [(2, 1), (13, 300)])
def test_accuracy_over_time(exits, epochs, tmp_path, drawn):
    path = plot_accuracy_over_time(metrics(exits, epochs), tmp_path / "time.png", title="a run")
    with Image.open(path) as image:
        assert image.size == (1200, 780)
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "a run"
    assert axes.get_ylabel() == "validation accuracy"
    assert len(axes.lines) == exits + 1
    for i, line in enumerate(axes.lines[:-1]):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, epochs + 1))
        np.testing.assert_allclose(line.get_ydata(), 0.3 + 0.02 * i)
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), 0.9)
    assert len({line.get_color() for line in axes.lines}) == exits + 1
    assert sorted(texts(drawn[0])) == sorted(
        ["ensemble  90.0 %", *(f"exit {i + 1}  {30 + 2 * i:.1f} %" for i in range(exits))]
    )


def test_labels_do_not_overlap_and_stay_in_the_axes(tmp_path, drawn):
    lines = [line | {f"exit{i}/accuracy": 1.0 for i in range(1, 14)} for line in metrics(13, 3)]
    plot_accuracy_over_time(lines, tmp_path / "time.png")
    figure = drawn[0]
    boxes = sorted(
        (text.get_window_extent() for text in figure.axes[0].texts if text.get_text()),
        key=lambda box: box.y0,
    )
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))  # to a pixel
    assert boxes[0].y0 > 0
    assert boxes[-1].y1 < figure.bbox.height
    assert max(box.x1 for box in boxes) <= figure.bbox.width


def test_training_accuracy_where_nothing_is_held_out(tmp_path, drawn):
    plot_accuracy_over_time(metrics(3, 5, splits=("train",)), tmp_path / "time.png")
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "training accuracy"
    assert len(axes.lines) == 3


def test_nothing_to_plot_raises(tmp_path):
    with pytest.raises(ValueError, match="not evaluated yet"):
        plot_accuracy_over_time([], tmp_path / "time.png")


@pytest.mark.parametrize("exits", [2, 13])
def test_accuracy_against_operations(exits, tmp_path, drawn):
    path = plot_accuracy_against_operations(report(exits), tmp_path / "operations.png")
    with Image.open(path) as image:
        assert image.size == (1200, 780)
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "vgg_$7$ on digits"
    assert "M MACs" in axes.get_xlabel()
    assert texts(drawn[0]) == ["test split, 31 examples", *(f"exit {i + 1}" for i in range(exits))]
    (points,) = axes.collections
    expected = [(i + 1, 0.5 + 0.03 * i) for i in range(exits)]
    np.testing.assert_allclose(points.get_offsets(), expected)
    curves = {line.get_label(): line for line in axes.lines}
    budgeted = curves["budgeted batch: mean over images"]
    np.testing.assert_allclose(budgeted.get_xdata(), 1 + np.arange(1, 41) / 40)
    assert list(curves["ensemble of all exits"].get_ydata()) == [0.95, 0.95]
    low, high = axes.get_ylim()
    assert 0 <= low < 0.5
    assert 0.95 < high <= 1


def test_an_unwritable_place_is_the_users_to_know(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="could not be written"):
        plot_accuracy_against_operations(report(2), tmp_path / "file" / "plot.png")


def test_no_other_module_needs_matplotlib():
    modules = "dfs_jax.reports.report, dfs_jax.costs.flops, dfs_jax.inference.budgeted"
    program = f"import sys, {modules}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
