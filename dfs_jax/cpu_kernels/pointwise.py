"""1x1 convolutions without padding, as matrix products over the pixels that the stride keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def forward(x: jax.Array, w: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Returns the convolution of `x` `[batch, height, width, in]` with `w` `[1, 1, in, out]`."""
    return _kept(x, strides) @ w[0, 0]


def weight_gradient(x: jax.Array, dy: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Returns the kernel's gradient `[1, 1, in, out]`."""
    pixels = ((0, 1, 2), (0, 1, 2))
    return lax.dot_general(_kept(x, strides), dy, (pixels, ((), ())))[None, None]


def input_gradient(
    dy: jax.Array, w: jax.Array, strides: tuple[int, int], sides: tuple[int, int]
) -> jax.Array:
    """Returns the input's gradient, zeros where the stride leaves an input out."""
    dx = lax.dot_general(dy, w[0, 0], (((3,), (1,)), ((), ())))
    if strides == (1, 1):
        return dx
    gaps = [
        (0, side - (kept - 1) * stride - 1, stride - 1)
        for side, kept, stride in zip(sides, dy.shape[1:3], strides, strict=True)
    ]
    return lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])


def _kept(x: jax.Array, strides: tuple[int, int]) -> jax.Array:
    return x[:, :: strides[0], :: strides[1]]
