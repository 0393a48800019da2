"""3x3 convolutions of stride 1 and padding 1 by Winograd's F(2x2, 3x3).

    y = A' [(G w G') * (B' x B)] A          for each tile of 2x2 outputs, 4x4 inputs

* multiplies element by element and sums over input channels: 16 matrix products replace 36. Both
sides of the image must be even. The sums begin with differences of inputs, which costs accuracy,
but are nine times shorter, which improves it; split into short sums, they are as exact as XLA's.
The weight gradient would not be (its sums run over pixels, 1.6 times XLA's error): see `taps`.

Each transform is applied along one axis, then along the other, with the intermediate result stored:
if they were fused, XLA would compile and compute each sum up to four times.

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.tracing.cpu.chunks import chunk_size, map_chunks

# Sums of at least twice as many products are split into parts, which are added at the end.
LONGEST_SUM = 128


def forward(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the convolution of `x` `[batch, height, width, in]` with `w` `[3, 3, in, out]`."""
    channels, features = w.shape[2:]
    parts = max(1, channels // LONGEST_SUM)
    cuts = [channels * part // parts for part in range(parts + 1)]
    runs = list(itertools.pairwise(cuts))
    kernels = [_kernel_tiles(w[:, :, start:stop]) for start, stop in runs]

    def some_images(x: jax.Array) -> jax.Array:
        tiles = [_input_tiles(x[..., start:stop]) for start, stop in runs]
        products = [
            lax.dot_general(tile, kernel, (((2,), (1,)), ((0,), (0,))))
            for tile, kernel in zip(tiles, kernels, strict=True)
        ]
        return _output(sum(products[1:], products[0]), x.shape)

    batch, height, width, _ = x.shape
    per_image = 4 * height * width * max(channels, features) * x.dtype.itemsize
    return map_chunks(some_images, x, chunk_size(batch, per_image))


def input_gradient(dy: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the input's gradient: the convolution of `dy` with the kernel rotated by 180 degrees.

    Args:
      dy: gradient of the output, `[batch, height, width, out]`.
      w: kernel, `[3, 3, in, out]`.
    """
    return forward(dy, w[::-1, ::-1].swapaxes(2, 3))


def _input_tiles(x: jax.Array) -> jax.Array:
    """Returns B' x B for the tiles of `[batch, height, width, in]`: `[16, tiles, in]`."""
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    d = [padded[:, i : i + height - 1 : 2] for i in range(4)]
    rows = _materialised(jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]))
    d = [rows[:, :, :, j : j + width - 1 : 2] for j in range(4)]
    tiles = jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], axis=1)
    return tiles.reshape(16, -1, channels)


def _output(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns A' m A for the products `[16, tiles, out]` of images with this shape."""
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


def _materialised(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)
