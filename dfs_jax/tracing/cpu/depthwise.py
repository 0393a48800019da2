"""Depthwise convolutions as a sum of shifted and scaled images, one for each tap of the kernel.

Each channel has its own kernel, so there is no matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.tracing.cpu.chunks import sum_chunks
from dfs_jax.tracing.cpu.taps import add_strided

Pair = tuple[int, int]


def forward(x: jax.Array, w: jax.Array, stride: int, padding: Sequence[Pair]) -> jax.Array:
    """Returns the convolution of `x` `[batch, height, width, in]` with `w` `[k, k, 1, in]`.

    Args:
      x: images.
      w: kernels.
      stride: stride in both directions.
      padding: zeros before and after, vertically and horizontally; negative ones cut.
    """
    outputs = [
        (side + sum(pads) - k) // stride + 1
        for side, pads, k in zip(x.shape[1:3], padding, w.shape[:2], strict=True)
    ]
    low = [before for before, _ in padding]
    taps = w.reshape(-1, w.shape[-1])
    images = _shifts(x, w.shape[:2], stride, low, outputs)
    return functools.reduce(jnp.add, [image * tap for image, tap in zip(images, taps, strict=True)])


def weight_gradient(
    x: jax.Array, dy: jax.Array, kernel: Pair, stride: int, padding: Sequence[Pair]
) -> jax.Array:
    """Returns the kernel's gradient `[k, k, 1, in]`.

    The products of each tap are first summed over images, elementwise, and then over pixels, since
    XLA's reduction over pixels is many times slower than elementwise addition.
    """
    low = [before for before, _ in padding]

    def some_images(x: jax.Array, dy: jax.Array) -> jax.Array:
        images = _shifts(x, kernel, stride, low, dy.shape[1:3])
        return jnp.stack([(image * dy).sum(0) for image in images])

    return sum_chunks(some_images, x, dy, 1).sum((1, 2)).reshape(*kernel, 1, -1)


def input_gradient(
    dy: jax.Array, w: jax.Array, stride: int, padding: Sequence[Pair], sides: Pair
) -> jax.Array:
    """Returns the gradient of an input with these sides."""
    is_halved = stride == 2 and w.shape[:2] == (3, 3)
    if is_halved and all(before == 1 for before, _ in padding):
        return add_strided(dy[..., None, None, :] * w[:, :, 0], sides)
    if stride > 1:
        between = (0, 0, stride - 1)
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), between, between, (0, 0, 0)))
    around = [
        (k - 1 - before, side + before - size)
        for k, (before, _), side, size in zip(
            w.shape[:2], padding, sides, dy.shape[1:3], strict=True
        )
    ]
    return forward(dy, w[::-1, ::-1], 1, around)


def _shifts(
    x: jax.Array, kernel: Sequence[int], stride: int, low: Sequence[int], outputs: Sequence[int]
) -> list[jax.Array]:
    """Returns the images that the taps read, row by row, with these outputs' sides."""
    ends = [
        (k + stride * (size - 1)) - before - side
        for k, size, before, side in zip(kernel, outputs, low, x.shape[1:3], strict=True)
    ]
    pads = [
        (0, 0, 0),
        *((before, end, 0) for before, end in zip(low, ends, strict=True)),
        (0, 0, 0),
    ]
    padded = lax.pad(x, jnp.zeros((), x.dtype), pads)
    reach = [stride * (size - 1) + 1 for size in outputs]
    return [
        padded[:, i : i + reach[0] : stride, j : j + reach[1] : stride]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
