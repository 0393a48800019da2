"""What a combiner is, and what those have in common that need the exits' inner products alone."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.types import PyTree


class Combiner(Protocol):
    """Merges the gradients that the exits' losses give the trunk; heads are none of its business.

    `per_exit_grads` is shaped as `params`, the trunk's parameters, with an axis of exits first,
    shallow exit first: `[k, ...]` holds the last k exits, and those before them do not reach the
    parameter. Any state is a pytree of arrays of fixed shapes.
    """

    def init(self, params: PyTree) -> PyTree:
        """Returns the state before the first step."""
        ...

    def update(
        self, per_exit_grads: PyTree, state: PyTree, params: PyTree, *, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the gradients, shaped as `params`, and the next state; `key` is the step's."""
        ...


class GramCombiner:
    """Base of the methods that weigh whole gradients, and find the weights in the Gram matrix.

    A subclass defines `weights`. Exits whose gradient is zero, because nothing of the trunk learns
    from them, come to it as exits that are orthogonal to all others: what weight they get does not
    matter, and means are over the others (`count_gradients`).
    """

    def init(self, params: PyTree) -> PyTree:
        """Returns no state."""
        del params
        return ()

    def update(
        self, per_exit_grads: PyTree, state: PyTree, params: PyTree, *, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the weighted sum of the exits' gradients, and the state as it was."""
        del params
        weights = self.weights(gram_matrix(per_exit_grads), key)
        return combine(per_exit_grads, weights), state

    def weights(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weight of each exit's gradient, given their inner products.

        Args:
          gram: `[exits, exits]`, float32 or wider.
          key: a random key.
        """
        raise NotImplementedError


def gram_matrix(per_exit_grads: PyTree) -> jax.Array:
    """Returns the inner products of the exits' gradients over all parameters, `[exits, exits]`.

        G_ij = <g_i, g_j>

    Sums are kept in float32, or in float64 for such gradients, whatever the gradients' type.

    Args:
      per_exit_grads: arrays `[k, ...]` of the last k exits, see `Combiner`.

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
    """Returns the exits' gradients, each times its weight, added up: `sum_i w_i g_i`.

    Args:
      per_exit_grads: arrays `[k, ...]` of the last k exits, see `Combiner`.
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

    A gradient of zero has cosine 1 with itself and 0 with all others.

    Example:
      >>> norms_and_cosines(jnp.array([[4.0, -3.0], [-3.0, 9.0]]))[1]
      Array([[ 1. , -0.5],
             [-0.5,  1. ]], dtype=float32)
    """
    norms = jnp.sqrt(jnp.diag(gram))
    cosines = inverse_norms(norms)[:, None] * gram * inverse_norms(norms)
    return norms, jnp.fill_diagonal(cosines, 1, inplace=False)


def count_gradients(norms: jax.Array) -> jax.Array:
    """Returns how many of the exits have a gradient that is not zero, at least 1.

    >>> int(count_gradients(jnp.array([2.0, 0.0, 3.0])))
    2
    """
    return jnp.maximum(jnp.sum(norms != 0), 1)


def inverse_norms(norms: jax.Array) -> jax.Array:
    """Returns 1 / norms, and 0 where a norm is 0."""
    is_zero = norms == 0
    return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, norms))


def _inner_products(leaf: jax.Array) -> jax.Array:
    """Contracts all axes but the first where they lie: a sharded parameter stays sharded."""
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
