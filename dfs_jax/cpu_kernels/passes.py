"""The three passes of a layer, and those of a convolution with this package's kernels in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.cpu_kernels.choice import Geometry, Kernel, choose_kernels


class Passes(NamedTuple):
    """The three passes of a layer y = forward(x, w), each linear in either argument.

    Attributes:
      forward: `(x, w) -> y`.
      weight_gradient: `(x, dy) -> dw`.
      input_gradient: `(dy, w) -> dx`; `w` may hold any of the input channels, `dx` has those.
    """

    forward: Kernel
    weight_gradient: Kernel
    input_gradient: Kernel


def fast_passes(plain: Passes, geometry: Geometry) -> Passes:
    """Returns the passes of a convolution, each with the faster kernel where it runs on a CPU.

    For `[batch, height, width, in]` images and `[height, width, in, out]` kernels of float32 or
    bfloat16 (computed in float32). They can be differentiated again, in either mode.

    Args:
      plain: the same passes by XLA's own convolution, for all other platforms and shapes.
      geometry: of the convolution.
    """

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        kernels = choose_kernels(geometry, *w.shape[2:])
        return _on_cpu(kernels.forward, plain.forward)(x, w)

    def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        kernels = choose_kernels(geometry, x.shape[3], dy.shape[3])
        return _on_cpu(kernels.weight_gradient, plain.weight_gradient)(x, dy)

    def input_gradient(dy: jax.Array, w: jax.Array) -> jax.Array:
        kernels = choose_kernels(geometry, *w.shape[2:])
        return _on_cpu(kernels.input_gradient, plain.input_gradient)(dy, w)

    return Passes(forward, weight_gradient, input_gradient)


def _on_cpu(kernel: Kernel | None, plain: Kernel) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns `plain`, of which a CPU runs `kernel` instead.

    The product rule is given: differentiating through the choice would keep what the CPU's kernel
    wants to reread on other platforms too.
    """
    if kernel is None:
        return plain

    def in_float32(a: jax.Array, b: jax.Array) -> jax.Array:
        return kernel(a.astype(jnp.float32), b.astype(jnp.float32)).astype(a.dtype)

    @jax.custom_jvp
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.platform_dependent(a, b, cpu=in_float32, default=plain)

    @product.defjvp
    def product_rule(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]):
        (a, b), (da, db) = primals, tangents
        return product(a, b), product(da, b) + product(a, db)

    return product
