"""3x3 convolutions of stride 1 and padding 1 by Winograd's F(2x2, 3x3).

    y = A' [(G w G') * (B' x B)] A          for each tile of 2x2 outputs, 4x4 inputs

* multiplies element by element and sums over input channels: 16 matrix products take the place of
36, and each of their sums is nine times shorter. Both sides of the image must be even.

Every transform runs in one direction, then in the other, and what lies between is kept: fused into
one, XLA would compile and compute each sum up to four times.

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.cpu_kernels.chunks import chunk_size, map_chunks, sum_chunks


def forward(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the convolution of `x` `[batch, height, width, in]` with `w` `[3, 3, in, out]`."""
    transformed = _kernel_tiles(w)

    def some_images(x: jax.Array) -> jax.Array:
        products = lax.dot_general(_input_tiles(x), transformed, (((2,), (1,)), ((0,), (0,))))
        return _output(products, x.shape)

    return map_chunks(some_images, x, _chunk_size(x, *w.shape[2:]))


def input_gradient(dy: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the input's gradient: the convolution of `dy` with the kernel turned by 180 degrees.

    Args:
      dy: the output's gradient, `[batch, height, width, out]`.
      w: the kernel, `[3, 3, in, out]`.
    """
    return forward(dy, w[::-1, ::-1].swapaxes(2, 3))


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the kernel's gradient `[3, 3, in, out]`: the steps of `forward`, transposed."""

    def some_images(x: jax.Array, dy: jax.Array) -> jax.Array:
        return lax.dot_general(_input_tiles(x), _gradient_tiles(dy), (((1,), (1,)), ((0,), (0,))))

    channels = x.shape[-1], dy.shape[-1]
    tiles = sum_chunks(some_images, x, dy, _chunk_size(x, *channels))
    rows = _kernel_transposed(tiles.reshape(4, 4, *channels))
    return _kernel_transposed(rows.swapaxes(0, 1)).swapaxes(0, 1)


def _chunk_size(x: jax.Array, *channels: int) -> int:
    batch, height, width, _ = x.shape
    return chunk_size(batch, 4 * height * width * max(channels) * x.dtype.itemsize)


def _input_tiles(x: jax.Array) -> jax.Array:
    """Returns B' x B for the tiles of `[batch, height, width, in]`: `[16, tiles, in]`."""
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    d = [padded[:, i : i + height - 1 : 2] for i in range(4)]
    rows = _materialised(jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]))
    d = [rows[:, :, :, j : j + width - 1 : 2] for j in range(4)]
    tiles = jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], axis=1)
    return tiles.reshape(16, -1, channels)


def _gradient_tiles(dy: jax.Array) -> jax.Array:
    """Returns A dy A' for the tiles of `[batch, height, width, out]`: `[16, tiles, out]`."""
    batch, height, width, channels = dy.shape
    y = dy.reshape(batch, height // 2, 2, width // 2, 2, channels)
    y0, y1 = y[:, :, 0], y[:, :, 1]
    rows = _materialised(jnp.stack([y0, y0 + y1, y0 - y1, -y1]))
    y0, y1 = rows[..., 0, :], rows[..., 1, :]
    return jnp.stack([y0, y0 + y1, y0 - y1, -y1], axis=1).reshape(16, -1, channels)


def _output(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns A' m A for the products `[16, tiles, out]` of images of that shape."""
    batch, height, width, _ = shape
    m = products.reshape(4, 4, batch, height // 2, width // 2, -1)
    rows = _materialised(jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]]))
    m = [rows[:, j] for j in range(4)]
    y = _materialised(jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis=4))
    return y.transpose(1, 2, 0, 3, 4, 5).reshape(batch, height, width, -1)


def _kernel_tiles(w: jax.Array) -> jax.Array:
    """Returns G w G' for `[3, 3, in, out]`: `[16, in, out]`."""
    tiles = _kernel(_kernel(w).swapaxes(0, 1)).swapaxes(0, 1)
    return tiles.reshape(16, *w.shape[2:])


def _kernel(w: jax.Array) -> jax.Array:
    outer, middle = w[0] + w[2], w[1]
    return jnp.stack([w[0], (outer + middle) / 2, (outer - middle) / 2, w[2]])


def _kernel_transposed(u: jax.Array) -> jax.Array:
    outer, middle = (u[1] + u[2]) / 2, (u[1] - u[2]) / 2
    return jnp.stack([u[0] + outer, middle, outer + u[3]])


def _materialised(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)
