"""Depthwise 3x3 convolutions with padding 1, as a sum of nine shifted and scaled images.

Each channel has its own kernel, so there is no matrix product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dfs_jax.tracing.cpu.chunks import sum_chunks
from dfs_jax.tracing.cpu.taps import add_strided, shifts


def forward(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution of `x` `[batch, height, width, in]` with `w` `[3, 3, 1, in]`."""
    products = [image * tap for image, tap in zip(shifts(x, stride), w.reshape(9, -1), strict=True)]
    return functools.reduce(jnp.add, products)


def weight_gradient(x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    """Returns the kernel's gradient `[3, 3, 1, in]`.

    The products of each tap are first summed over images, elementwise, and then over pixels, since
    XLA's reduction over pixels is many times slower than elementwise addition.
    """

    def some_images(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.stack([(image * dy).sum(0) for image in shifts(x, stride)])

    return sum_chunks(some_images, x, dy, 1).sum((1, 2)).reshape(3, 3, 1, -1)


def input_gradient(dy: jax.Array, w: jax.Array, stride: int, sides: tuple[int, int]) -> jax.Array:
    """Returns the gradient of an input with these sides."""
    if stride == 1:
        return forward(dy, w[::-1, ::-1], 1)
    return add_strided(dy[..., None, None, :] * w[:, :, 0], sides)
