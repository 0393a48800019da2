"""Matplotlib without pyplot, independent of the user's backend and style.

This is the only module that imports matplotlib; programs import modules of plots where they draw.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from dfs_jax.files import write_whole
from dfs_jax.paths import UserPath, local_path


@contextlib.contextmanager
def _unset(variable: str) -> Iterator[None]:
    before = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before


# A backend that matplotlib does not know, such as one inherited from a notebook, makes its import
# fail. A backend that a notebook sets afterwards has no effect on these plots.
with _unset("MPLBACKEND"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, ScalarFormatter

colormaps = matplotlib.colormaps

__all__ = [
    "Axes",
    "AxesImage",
    "Figure",
    "LogLocator",
    "MaxNLocator",
    "Normalize",
    "Patch",
    "PercentFormatter",
    "Rectangle",
    "ScalarFormatter",
    "ScalarMappable",
    "colormaps",
    "in_standard_style",
    "new_figure",
    "save_figure",
    "withStroke",
]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def in_standard_style(draw: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns a function that draws in matplotlib's own style, not in that of a `matplotlibrc`.

    A user's style may need LaTeX or fonts that are not installed.
    """

    @functools.wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return draw(*args, **kwargs)

    return drawn


def new_figure(size: tuple[float, float], dots_per_inch: int) -> Figure:
    """Returns an empty figure of a size in inches, with its own backend."""
    figure = Figure(size, dpi=dots_per_inch, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: UserPath) -> Path:
    """Writes a figure as PNG, atomically, and returns the path."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return write_whole(local_path(path, "picture"), png.getvalue())
