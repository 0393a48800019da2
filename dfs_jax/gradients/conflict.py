"""Conflicts between the exits' gradients: Gram matrices by tensor, cosines, counts of pairs.

Two exits that train the same tensor conflict if their gradients have a negative inner product: a
step that lowers the loss of one then raises that of the other.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dfs_jax.forks import Fork
from dfs_jax.gradients.exit_gradients import exit_gradients
from dfs_jax.gradients.gram import gram_matrix
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel, split_trunk_and_heads
from dfs_jax.types import PyTree

# The dropout mask is the same in every measurement, so that those of one batch can be compared.
_DROPOUT_SEED = 0


class PairCounts(NamedTuple):
    """Pairs of exits, counted over one tensor or several.

    Attributes:
      pairs: number of pairs whose exits both reach the tensor.
      conflicting: number of pairs with a negative cosine.
      disjoint: number of pairs with a cosine of exactly 0: no weight of the tensor learns from
        both exits.
    """

    pairs: int
    conflicting: int
    disjoint: int

    @property
    def conflicting_share(self) -> float:
        """The fraction of conflicting pairs; NaN where there is no pair."""
        return self.conflicting / self.pairs if self.pairs else float("nan")

    @property
    def disjoint_share(self) -> float:
        """The fraction of disjoint pairs; NaN where there is no pair."""
        return self.disjoint / self.pairs if self.pairs else float("nan")


def measure_gram(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """Returns the inner products of the exits' gradients for every trunk tensor, on one batch.

        G_tij = <g_ti, g_tj>,   g_ti = d loss_i / d tensor_t

    The forward pass is that of training (the batch's own statistics, dropout with a fixed mask);
    the new running statistics are discarded. The function is pure and can be compiled.

    Args:
      model: backbone whose parameters lie under `block1`.. and `head1`..
      fork: fork at each exit.
      loss: loss of the exits, including their weights.
      variables: variables of the model, `{"params": ..., "batch_stats": ...}`.
      images: normalised images, `[batch, height, width, channels]`.
      labels: integer labels, `[batch]`.

    Returns:
      `[tensors, exits, exits]`, with tensors in the order of `tensor_names`; NaN for exits that do
      not reach the tensor or whose gradient is zero.
    """
    key = jax.random.key(_DROPOUT_SEED)
    found = exit_gradients(model, fork, loss, variables, images, labels, key=key)
    return gram_by_tensor(found.trunk, model.num_exits)


def tensor_names(params: PyTree) -> tuple[str, ...]:
    """Returns the names of the trunk's tensors, shallow blocks first.

    >>> tensor_names({"block10": {"bias": 0}, "block2": {"conv": {"kernel": 0}}, "head1": 0})
    ('block2/conv/kernel', 'block10/bias')
    """
    trunk, _ = split_trunk_and_heads(params)
    return tuple(name for name, _ in _in_order(trunk))


def gram_by_tensor(per_exit_grads: PyTree, num_exits: int) -> jax.Array:
    """Returns `[tensors, exits, exits]` from gradients `[k, ...]` of the last k exits.

    Example: exit 1 does not reach block 2.
      >>> grads = {"block1": jnp.array([[1.0, 0.0], [-2.0, 3.0]]), "block2": jnp.array([[2.0]])}
      >>> gram_by_tensor(grads, 2)
      Array([[[ 1., -2.],
              [-2., 13.]],
      <BLANKLINE>
             [[nan, nan],
              [nan,  4.]]], dtype=float32)
    """
    return jnp.stack([_among_all(leaf, num_exits) for _, leaf in _in_order(per_exit_grads)])


def joint_gram(gram: np.ndarray) -> np.ndarray:
    """Returns the joint Gram matrix of several tensors, the sum of their own.

    Args:
      gram: Gram matrices `[tensors, exits, exits]`, NaN for exits that do not reach a tensor.

    Returns:
      `[exits, exits]`, NaN for exits that reach none of them.
    """
    total = np.nansum(gram, axis=0)
    reached = np.diag(total) > 0
    return np.where(np.logical_and.outer(reached, reached), total, np.nan)


def pair_cosines(gram: np.ndarray) -> np.ndarray:
    """Returns the cosines between the exits' gradients, NaN where the Gram matrix is.

    Args:
      gram: Gram matrices `[..., exits, exits]`.

    Example:
      >>> pair_cosines(np.array([[4.0, -3.0], [-3.0, 9.0]])).tolist()
      [[1.0, -0.5], [-0.5, 1.0]]
    """
    norms = gradient_norms(gram)
    return gram / (norms[..., :, None] * norms[..., None, :])


def gradient_norms(gram: np.ndarray) -> np.ndarray:
    """Returns the norms of the exits' gradients `[..., exits]`, NaN where the Gram matrix is."""
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))


def count_pairs(gram: np.ndarray) -> PairCounts:
    """Counts the pairs of exits, over all tensors of `gram` `[..., exits, exits]`.

    >>> count_pairs(np.array([[[1.0, -2.0], [-2.0, 13.0]], [[1.0, 0.0], [0.0, 4.0]]]))
    PairCounts(pairs=2, conflicting=1, disjoint=1)
    """
    shallow, deep = np.triu_indices(gram.shape[-1], k=1)
    products = gram[..., shallow, deep]
    counts = (~np.isnan(products), products < 0, products == 0)
    return PairCounts(*(int(count.sum()) for count in counts))


def _among_all(leaf: jax.Array, num_exits: int) -> jax.Array:
    """Returns a tensor's Gram matrix `[exits, exits]`, NaN where a gradient is zero."""
    gram = gram_matrix(leaf)
    reached = jnp.diag(gram) > 0
    gram = jnp.where(reached[:, None] & reached, gram, jnp.nan)
    return jnp.pad(gram, (num_exits - len(leaf), 0), constant_values=jnp.nan)


def _in_order(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns a tree's leaves with their names, block 2 before block 10."""
    return sorted(flatten_dict(tree, sep="/").items(), key=lambda item: _natural_order(item[0]))


def _natural_order(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]
