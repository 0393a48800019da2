"""Panels of curves that share a legend."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import plots
from benchmarks.accuracy.plots import Curve, Panel, plot_panels


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots,
        "save_figure",
        lambda figure, path: figures.append(figure) or save(figure, path),
    )
    return figures


def test_panels_share_one_legend_and_their_colors(tmp_path, drawn):
    plain = Panel("one", "exit", "accuracy", [Curve("a", [1, 2], [0.3, 0.5])], {"a": 0.4}, True)
    points = [Curve("b", [3, 9, 27], [0.1, 0.0, -0.1]), Curve("a", [3], [0.2], [0.05])]
    other = Panel("two", "epochs", "points", points, logarithmic=True, are_points=True)
    path = plot_panels([[plain, other]], tmp_path / "panels.png", emphasised=["a"])
    with Image.open(path) as image:
        assert image.size == (1120, 500)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    left, right = drawn[0].axes
    curve, level = left.lines
    np.testing.assert_allclose(curve.get_ydata(), [0.3, 0.5])
    assert list(level.get_ydata()) == [0.4, 0.4]
    assert curve.get_color() == level.get_color() == right.lines[-1].get_color() == "black"
    assert [tick for tick in right.get_xticks() if tick] == [3, 9, 27]
    assert [axes.yaxis.get_major_formatter().symbol for axes in (left, right)] == [" %", ""]


def test_nothing_to_draw_raises(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_panels([[Panel("", "", "", [])]], tmp_path / "panels.png")
