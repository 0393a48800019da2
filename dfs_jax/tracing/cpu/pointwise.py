"""Weight gradient of a 1x1 convolution without padding: one matrix product over the pixels."""

from __future__ import annotations

import jax

from dfs_jax.tracing.cpu.taps import contract_pixels


def weight_gradient(x: jax.Array, dy: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Returns the kernel's gradient `[1, 1, in, out]`."""
    return contract_pixels(x[:, :: strides[0], :: strides[1]], dy)[None, None]
