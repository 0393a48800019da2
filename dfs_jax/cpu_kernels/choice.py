"""Which kernels compute which convolution: one rule, from measurements.

XLA's time over the kernel's, processor time, medians, batches of 64 and 128 on 4x4 to 32x32 pixels:

    kernel size          channels   forward      weight gradient  input gradient
    3x3, even sides      32 - 512   1.2 ... 2.0  (below)          1.2 ... 2.3     `winograd`
    3x3                  3 - 512                 1.2 ... 2.8                      `taps`
    3x3, stride 2        16 - 512   1.0 ... 1.4  1.2 ... 2.1      1.4 ... 1.9     `taps`
    1x1                  16 - 256   1.3 ... 2.9  1.6 ... 3.6      1.6 ... 2.2     `pointwise`
    3x3, depthwise       64 - 256   10 ... 20    3 ... 12         27 ... 42       `depthwise`

Where nothing is said XLA's is as fast (3x3 forward with few channels: 0.8 ... 1.3). Winograd's
weight gradient would be faster still, but less exact than XLA's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from dfs_jax.cpu_kernels import depthwise, pointwise, taps, winograd

Kernel = Callable[[jax.Array, jax.Array], jax.Array]

FEWEST_FOR_WINOGRAD = 32
FEWEST_FOR_STRIDED = 16


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
    fewest = min(channels, features)
    if geometry.kernel == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return Kernels() if geometry.is_depthwise else _pointwise(geometry)
    if geometry.kernel != (3, 3) or geometry.padding != ((1, 1), (1, 1)):
        return Kernels()
    if geometry.is_depthwise:
        return _depthwise(geometry) if geometry.strides in ((1, 1), (2, 2)) else Kernels()
    if geometry.strides == (2, 2) and fewest >= FEWEST_FOR_STRIDED:
        return _strided(geometry)
    if geometry.strides == (1, 1):
        even = all(side % 2 == 0 for side in geometry.sides)
        tiled = even and fewest >= FEWEST_FOR_WINOGRAD
        forward, input_gradient = winograd.forward, winograd.input_gradient
        return Kernels(
            forward if tiled else None, taps.weight_gradient, input_gradient if tiled else None
        )
    return Kernels()


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


def _strided(geometry: Geometry) -> Kernels:
    return Kernels(
        taps.strided_forward,
        taps.strided_weight_gradient,
        functools.partial(taps.strided_input_gradient, sides=geometry.sides),
    )
