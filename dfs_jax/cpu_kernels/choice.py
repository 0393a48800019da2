"""Which kernels compute which convolution: one rule, from measurements.

XLA's time over the kernel's, processor time, medians, batches of 64 and 128, 4x4 to 32x32 pixels:

    kernel               channels   forward      weight gradient  input gradient
    3x3, even sides      32 - 512   1.2 ... 1.9  (below)          1.2 ... 1.9     `winograd`
    3x3                  3 - 512                 1.0 ... 2.3                      `taps`
    3x3, stride 2        16 - 512   0.9 ... 1.4  1.2 ... 2.1      1.0 ... 2.0     `taps`
    1x1                  16 - 256   0.9 ... 2.9  2.6 ... 3.6      1.0 ... 2.2     `pointwise`
    3x3, depthwise       64 - 256   10 ... 20    3 ... 12         27 ... 42       `depthwise`

Where nothing is said, and below the least channels here, XLA's is about as fast. Winograd's weight
gradient would be a fifth faster than that by taps, but less exact than XLA's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from dfs_jax.cpu_kernels import depthwise, pointwise, taps, winograd

Kernel = Callable[[jax.Array, jax.Array], jax.Array]

# The fewer and the more of input and output channels.
LEAST_FOR_WINOGRAD = (32, 64)
LEAST_FOR_STRIDED = (16, 32)
LEAST_FOR_STRIDED_FORWARD = (64, 64)
# Pixels: what one larger image unfolds leaves the cache, and XLA is faster again.
LARGEST_FOR_WINOGRAD = 64 * 64
LARGEST_FOR_TAPS = 128 * 128


class Geometry(NamedTuple):
    """What a two-dimensional, undilated convolution is, but for its channels.

    Attributes:
      kernel: its height and width.
      strides: down and across.
      padding: zeros before and after, down and across.
      sides: the image's height and width.
      is_depthwise: whether each channel has a kernel of its own; else every output reads every one.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    sides: tuple[int, int]
    is_depthwise: bool = False

    @property
    def pixels(self) -> int:
        """How many the image has."""
        return math.prod(self.sides)


class Kernels(NamedTuple):
    """The kernels of the three passes, as in `Passes`; None where XLA's own is as good."""

    forward: Kernel | None = None
    weight_gradient: Kernel | None = None
    input_gradient: Kernel | None = None


def choose_kernels(geometry: Geometry, channels: int, features: int) -> Kernels:
    """Returns the kernels for so many input and output channels.

    Example:
      >>> stem = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)), sides=(32, 32))
      >>> [kernel is not None for kernel in choose_kernels(stem, channels=3, features=64)]
      [False, True, False]
    """
    widths = min(channels, features), max(channels, features)
    if geometry.kernel == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return Kernels() if geometry.is_depthwise else _pointwise(geometry)
    if geometry.kernel != (3, 3) or geometry.padding != ((1, 1), (1, 1)):
        return Kernels()
    if geometry.is_depthwise:
        return _depthwise(geometry) if geometry.strides in ((1, 1), (2, 2)) else Kernels()
    if geometry.pixels > LARGEST_FOR_TAPS:
        return Kernels()
    if geometry.strides == (1, 1):
        return _plain(geometry, widths)
    return _strided(geometry, widths) if geometry.strides == (2, 2) else Kernels()


def _plain(geometry: Geometry, widths: tuple[int, int]) -> Kernels:
    tiled = (
        all(side % 2 == 0 for side in geometry.sides) and geometry.pixels <= LARGEST_FOR_WINOGRAD
    )
    if not tiled or not _at_least(widths, LEAST_FOR_WINOGRAD):
        return Kernels(weight_gradient=taps.weight_gradient)
    return Kernels(winograd.forward, taps.weight_gradient, winograd.input_gradient)


def _pointwise(geometry: Geometry) -> Kernels:
    strides, sides = geometry.strides, geometry.sides
    return Kernels(
        functools.partial(pointwise.forward, strides=strides),
        functools.partial(pointwise.weight_gradient, strides=strides),
        functools.partial(pointwise.input_gradient, strides=strides, sides=sides),
    )


def _depthwise(geometry: Geometry) -> Kernels:
    stride, sides = geometry.strides[0], geometry.sides
    return Kernels(
        functools.partial(depthwise.forward, stride=stride),
        functools.partial(depthwise.weight_gradient, stride=stride),
        functools.partial(depthwise.input_gradient, stride=stride, sides=sides),
    )


def _strided(geometry: Geometry, widths: tuple[int, int]) -> Kernels:
    if not _at_least(widths, LEAST_FOR_STRIDED):
        return Kernels()
    return Kernels(
        taps.strided_forward if _at_least(widths, LEAST_FOR_STRIDED_FORWARD) else None,
        taps.strided_weight_gradient,
        functools.partial(taps.strided_input_gradient, sides=geometry.sides),
    )


def _at_least(widths: tuple[int, int], least: tuple[int, int]) -> bool:
    return all(width >= bound for width, bound in zip(widths, least, strict=True))
