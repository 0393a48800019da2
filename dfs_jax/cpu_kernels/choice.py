"""Which kernel computes which pass of which convolution: one rule, from measurements.

Medians on two cores at batches of 64 and 128, 3 to 512 channels, 4x4 to 32x32 pixels, XLA's time
over the kernel's, where a kernel is chosen:

    3x3                     forward      weight gradient   input gradient
    Winograd, 32+ channels  1.2 ... 2.0  1.6 ... 3.9       1.2 ... 2.3
    all taps, fewer                      1.2 ... 1.5
    stride 2, 16+ channels  1.0 ... 1.4  1.2 ... 2.1       1.4 ... 1.9
    1x1                     1.3 ... 2.9  1.6 ... 2.7       1.6 ... 2.2

Everything else is XLA's: it is as fast at forward passes of few channels, and at depthwise ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from dfs_jax.cpu_kernels import pointwise, taps, winograd

Kernel = Callable[[jax.Array, jax.Array], jax.Array]

WINOGRAD_CHANNELS = 32
STRIDED_CHANNELS = 16


class Geometry(NamedTuple):
    """What a convolution is but for its channels; two-dimensional, undilated, one group.

    Attributes:
      kernel: its height and width.
      strides: down and across.
      padding: zeros before and after, down and across.
      sides: the image's height and width.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    sides: tuple[int, int]

    @property
    def is_plain_3x3(self) -> bool:
        """Whether the kernel is 3x3, of stride 1 and padding 1."""
        return self._is_3x3 and self.strides == (1, 1)

    @property
    def is_strided_3x3(self) -> bool:
        """Whether the kernel is 3x3, of stride 2 and padding 1."""
        return self._is_3x3 and self.strides == (2, 2)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1 without padding, of any stride."""
        return self.kernel == (1, 1) and self.padding == ((0, 0), (0, 0))

    @property
    def _is_3x3(self) -> bool:
        return self.kernel == (3, 3) and self.padding == ((1, 1), (1, 1))

    def suits_winograd(self, channels: int, features: int) -> bool:
        """Whether tiles of 2x2 outputs cover the image and its channels are worth the transform."""
        even = all(side % 2 == 0 for side in self.sides)
        return self.is_plain_3x3 and even and min(channels, features) >= WINOGRAD_CHANNELS


def forward_kernel(geometry: Geometry, channels: int, features: int) -> Kernel | None:
    """Returns `(x, w) -> y` for so many input and output channels; None where XLA's is as good."""
    if geometry.suits_winograd(channels, features):
        return winograd.forward
    if geometry.is_strided_3x3 and min(channels, features) >= STRIDED_CHANNELS:
        return taps.strided_forward
    if geometry.is_pointwise:
        return lambda x, w: pointwise.forward(x, w, geometry.strides)
    return None


def weight_gradient_kernel(geometry: Geometry, channels: int, features: int) -> Kernel | None:
    """Returns `(x, dy) -> dw`, or None."""
    if geometry.is_plain_3x3:
        return taps.weight_gradient
    if geometry.is_strided_3x3 and min(channels, features) >= STRIDED_CHANNELS:
        return taps.strided_weight_gradient
    if geometry.is_pointwise:
        return lambda x, dy: pointwise.weight_gradient(x, dy, geometry.strides)
    return None


def input_gradient_kernel(geometry: Geometry, channels: int, features: int) -> Kernel | None:
    """Returns `(dy, w) -> dx`, or None; `channels` are those whose gradient is asked for."""
    if geometry.suits_winograd(channels, features):
        return winograd.input_gradient
    if geometry.is_strided_3x3 and min(channels, features) >= STRIDED_CHANNELS:
        return lambda dy, w: taps.strided_input_gradient(dy, w, geometry.sides)
    if geometry.is_pointwise:
        return lambda dy, w: pointwise.input_gradient(dy, w, geometry.strides, geometry.sides)
    return None
