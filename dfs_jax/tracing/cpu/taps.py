"""Convolutions as matrix products of shifted images, in chunks: exact, for any size.

A 3x3 kernel has nine taps, each a product with the image shifted by one of three columns and one of
three rows. Shifted both ways, the unfolded image has nine times the size; with columns shifted on
one side of the product and rows on the other, each has three times, and one product has all taps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.tracing.cpu.chunks import chunk_size, map_chunks, sum_chunks


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the gradient `[3, 3, in, out]` of a kernel of stride 1 and padding 1.

    With X the three column shifts of `x` and G the three row shifts of `dy`, X'G has all taps.
    """

    def some_images(x: jax.Array, dy: jax.Array) -> jax.Array:
        height, padded = dy.shape[1], _pad(dy, axis=1)
        rows = jnp.concatenate([padded[:, i : i + height] for i in (2, 1, 0)], axis=-1)
        return contract_pixels(_columns(x), rows)

    channels, features = x.shape[-1], dy.shape[-1]
    taps = sum_chunks(some_images, x, dy, _chunk_size(x, 3 * (channels + features)))
    return taps.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)


def strided_weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the gradient `[3, 3, in, out]` of a kernel of stride 2 and padding 1."""
    channels, features = x.shape[-1], dy.shape[-1]

    def some_images(x: jax.Array, dy: jax.Array) -> jax.Array:
        return contract_pixels(jnp.concatenate(shifts(x, 2), axis=-1), dy)

    total = sum_chunks(some_images, x, dy, _chunk_size(x, 3 * channels))
    return total.reshape(3, 3, channels, features)


def strided_input_gradient(dy: jax.Array, w: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Returns the gradient of an input with these sides, for stride 2 and padding 1.

    One matrix product gives each output's contributions to its nine inputs.
    """
    channels = w.shape[2]
    matrix = w.transpose(3, 0, 1, 2).reshape(w.shape[3], -1)

    def some_images(dy: jax.Array) -> jax.Array:
        return add_strided((dy @ matrix).reshape(*dy.shape[:3], 3, 3, channels), sides)

    return map_chunks(some_images, dy, _chunk_size(dy, 9 * channels))


def add_strided(owed: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Sums the contributions of outputs to inputs, `[batch, height, width, 3, 3, in]`, stride 2.

    In each direction, inputs at even positions are read by one output, through the middle of the
    kernel; those at odd positions are read by two.
    """
    rows = _interleave(owed[..., 1, :, :], owed[..., 2, :, :], owed[..., 0, :, :], axis=1)
    dx = _interleave(rows[..., 1, :], rows[..., 2, :], rows[..., 0, :], axis=2)
    return dx[:, : sides[0], : sides[1]]


def shifts(x: jax.Array, stride: int) -> list[jax.Array]:
    """Returns the nine shifted images that the taps read, row by row, for padding 1."""
    height, width, padded = x.shape[1], x.shape[2], _pad(_pad(x, axis=1), axis=2)
    return [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]


def _interleave(even: jax.Array, here: jax.Array, after: jax.Array, *, axis: int) -> jax.Array:
    """Returns even[0], here[0] + after[1], even[1], here[1] + after[2], ... along an axis."""
    size = even.shape[axis]
    shifted = lax.slice_in_dim(_pad(after, axis), 2, size + 2, axis=axis)
    both = jnp.stack([even, here + shifted], axis=axis + 1)
    return both.reshape(*even.shape[:axis], 2 * size, *even.shape[axis + 1 :])


def _columns(x: jax.Array) -> jax.Array:
    """Returns the three shifts along the width, concatenated: `[pixels, 3 * channels]`."""
    width, padded = x.shape[2], _pad(x, axis=2)
    shifts = [padded[:, :, j : j + width] for j in range(3)]
    return jnp.concatenate(shifts, axis=-1).reshape(-1, 3 * x.shape[3])


def contract_pixels(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns products of all channels of `x` with all channels of `y`, summed over the rest."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def _pad(x: jax.Array, axis: int) -> jax.Array:
    """Pads an axis with one zero at both ends."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (1, 1)
    return jnp.pad(x, widths)


def _chunk_size(x: jax.Array, unfolded_channels: int) -> int:
    batch, height, width, _ = x.shape
    return chunk_size(batch, height * width * unfolded_channels * x.dtype.itemsize)
