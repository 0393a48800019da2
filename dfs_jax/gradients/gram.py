"""Inner products of the exits' gradients, and sums of the gradients by weights.

`per_exit_grads` is shaped as the trunk's parameters, with an axis of exits first, shallow exit
first: `[k, ...]` holds the gradients of the last k exits; those before them do not reach the
parameter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.types import PyTree


def gram_matrix(per_exit_grads: PyTree) -> jax.Array:
    """Returns the inner products of the exits' gradients over all parameters, `[exits, exits]`.

        G_ij = <g_i, g_j>

    Sums are kept in float32, or in float64 for such gradients, whatever the gradients' type.

    Args:
      per_exit_grads: arrays `[k, ...]` of the last k exits, see the top of this module.

    Example:
      >>> gram_matrix({"block1": jnp.array([[1.0, 0.0], [1.0, 2.0]]), "block2": jnp.array([[3.0]])})
      Array([[ 1.,  1.],
             [ 1., 14.]], dtype=float32)
    """
    by_count: dict[int, jax.Array] = {}
    for leaf in jax.tree.leaves(per_exit_grads):
        products = _inner_products(leaf)
        by_count[len(leaf)] = by_count[len(leaf)] + products if len(leaf) in by_count else products
    exits = max(by_count)
    return sum(
        (jnp.pad(products, (exits - count, 0)) for count, products in by_count.items()),
        jnp.zeros((), jnp.float32),
    )


def combine(per_exit_grads: PyTree, weights: jax.Array) -> PyTree:
    """Returns the exits' gradients, weighted and summed: `sum_i w_i g_i`.

    Args:
      per_exit_grads: arrays `[k, ...]` of the last k exits, see the top of this module.
      weights: `[exits]`.

    Example:
      >>> combine({"block2": jnp.array([[3.0, 5.0]])}, jnp.array([7.0, 2.0]))
      {'block2': Array([ 6., 10.], dtype=float32)}
    """

    def one(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(_wide(leaf))
        own = weights[len(weights) - len(leaf) :].astype(wide.dtype)
        return jnp.tensordot(own, wide, axes=1, precision=lax.Precision.HIGHEST).astype(leaf.dtype)

    return jax.tree.map(one, per_exit_grads)


def norms_and_cosines(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients' norms `[exits]` and the cosines between them `[exits, exits]`.

    A zero gradient has cosine 1 with itself and 0 with all others.

    Example:
      >>> norms_and_cosines(jnp.array([[4.0, -3.0], [-3.0, 9.0]]))[1]
      Array([[ 1. , -0.5],
             [-0.5,  1. ]], dtype=float32)
    """
    norms = jnp.sqrt(jnp.diag(gram))
    cosines = inverse_norms(norms)[:, None] * gram * inverse_norms(norms)
    return norms, jnp.fill_diagonal(cosines, 1, inplace=False)


def count_gradients(norms: jax.Array) -> jax.Array:
    """Returns the number of exits whose gradient is not zero, at least 1.

    >>> int(count_gradients(jnp.array([2.0, 0.0, 3.0])))
    2
    """
    return jnp.maximum(jnp.sum(norms != 0), 1)


def inverse_norms(norms: jax.Array) -> jax.Array:
    """Returns 1 / norms, and 0 where a norm is 0."""
    is_zero = norms == 0
    return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, norms))


def _inner_products(leaf: jax.Array) -> jax.Array:
    """Contracts all axes but the first without a reshape: a sharded parameter stays sharded."""
    axes = tuple(range(1, leaf.ndim))
    return lax.dot_general(
        leaf,
        leaf,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=_wide(leaf),
    )


def _wide(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
