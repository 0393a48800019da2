"""Choice of the kernel for each convolution, from measurements.

XLA's time divided by the kernel's, medians, batches of 64 and 128 on two cores, XLA compiled with
`compiler_options`:

    kernel           channels   sides    forward      weights      inputs
    3x3, even sides  32 - 256   8 - 32   1.0 ... 1.9  (below)      1.3 ... 1.9  `winograd`
    3x3              3 - 64     32                    1.0 ... 1.9               `taps`
    3x3, stride 2    32 - 512   8 - 32                0.9 ... 1.2  1.0 ... 2.8  `taps`
    1x1              64 - 512   8 - 32                1.0 ... 3.0               `pointwise`
    3x3, depthwise   64 - 256   8 - 32   10 ... 20    3 ... 12     27 ... 42    `depthwise`

The depthwise kernels also take other paddings, and 5x5: the forward pass of EfficientNet-Lite0 on
128x128 pixels is 17 times as fast with them, in batches of 1 and of 64.

Elsewhere in the table, and for fewer channels, XLA's kernel is about as fast or faster. Winograd's
weight gradient would be a fifth faster than that by taps, but less exact than XLA's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from dfs_jax.tracing.cpu import depthwise, pointwise, taps, winograd

Kernel = Callable[[jax.Array, jax.Array], jax.Array]

# Bounds for the smaller and the larger of input and output channels, and for an image's pixels. The
# unfolded form of a larger image exceeds the cache; for a smaller image the transform of the
# weights outweighs the product.
LEAST_FOR_WINOGRAD = (32, 64)
# Larger numbers were not measured, and every 128 channels add another part to compile.
MOST_FOR_WINOGRAD = 1024
PIXELS_FOR_WINOGRAD = range(8 * 8, 64 * 64 + 1)
# XLA's own weight gradient is good at few pixels and many channels.
PIXELS_FOR_TAPS = range(24 * 24, 128 * 128 + 1)
LEAST_FOR_STRIDED = 16


class Geometry(NamedTuple):
    """Geometry of a two-dimensional, undilated convolution, without its channels.

    Attributes:
      kernel: height and width of the kernel.
      strides: vertical and horizontal stride.
      padding: zeros before and after, vertically and horizontally.
      sides: height and width of the image.
      is_depthwise: whether each channel has its own kernel; else each output reads all channels.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    sides: tuple[int, int]
    is_depthwise: bool = False

    @property
    def pixels(self) -> int:
        """Number of pixels of the image."""
        return math.prod(self.sides)


class Kernels(NamedTuple):
    """Kernels of the three passes; None where XLA's own is as good."""

    forward: Kernel | None = None
    weight_gradient: Kernel | None = None
    input_gradient: Kernel | None = None


def choose_kernels(geometry: Geometry, channels: int, features: int) -> Kernels:
    """Returns the kernels for these numbers of input and output channels.

    Example:
      >>> stem = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)), sides=(32, 32))
      >>> [kernel is not None for kernel in choose_kernels(stem, channels=3, features=64)]
      [False, True, False]
    """
    widths = min(channels, features), max(channels, features)
    if geometry.kernel == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return Kernels() if geometry.is_depthwise else _pointwise(geometry)
    if geometry.is_depthwise:
        small = geometry.kernel in ((3, 3), (5, 5)) and geometry.strides in ((1, 1), (2, 2))
        return _depthwise(geometry) if small else Kernels()
    if geometry.kernel != (3, 3) or geometry.padding != ((1, 1), (1, 1)):
        return Kernels()
    if geometry.strides == (1, 1):
        return _plain(geometry, widths)
    return _strided(geometry, widths) if geometry.strides == (2, 2) else Kernels()


def _plain(geometry: Geometry, widths: tuple[int, int]) -> Kernels:
    even = all(side % 2 == 0 for side in geometry.sides)
    wide = all(width >= least for width, least in zip(widths, LEAST_FOR_WINOGRAD, strict=True))
    tiled = (
        even and wide and widths[1] <= MOST_FOR_WINOGRAD and geometry.pixels in PIXELS_FOR_WINOGRAD
    )
    return Kernels(
        winograd.forward if tiled else None,
        taps.weight_gradient if geometry.pixels in PIXELS_FOR_TAPS else None,
        winograd.input_gradient if tiled else None,
    )


def _pointwise(geometry: Geometry) -> Kernels:
    kernel = functools.partial(pointwise.weight_gradient, strides=geometry.strides)
    return Kernels(weight_gradient=kernel)


def _depthwise(geometry: Geometry) -> Kernels:
    how = {"stride": geometry.strides[0], "padding": geometry.padding}
    return Kernels(
        functools.partial(depthwise.forward, **how),
        functools.partial(depthwise.weight_gradient, kernel=geometry.kernel, **how),
        functools.partial(depthwise.input_gradient, sides=geometry.sides, **how),
    )


def _strided(geometry: Geometry, widths: tuple[int, int]) -> Kernels:
    if widths[0] < LEAST_FOR_STRIDED or geometry.pixels > PIXELS_FOR_TAPS[-1]:
        return Kernels()
    kernel = functools.partial(taps.strided_input_gradient, sides=geometry.sides)
    return Kernels(weight_gradient=taps.strided_weight_gradient, input_gradient=kernel)
