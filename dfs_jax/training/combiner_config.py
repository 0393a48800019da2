"""From a config's section `combiner` to the combiner, and whether it fits the model."""

from __future__ import annotations

from typing import Any

import jax

from dfs_jax.combiners import Combiner, create_combiner
from dfs_jax.combiners.exit_gradients import check_exits, check_names
from dfs_jax.meta import Meta
from dfs_jax.models.contract import MultiExitModel, init_variables, split_trunk_and_heads
from dfs_jax.training.config import options
from dfs_jax.types import Config, PyTree, UserError


def combiner_from_config(section: Config, meta: Meta | None = None) -> Combiner:
    """Returns the combiner that a config's section `combiner` describes.

    Args:
      section: of the config.
      meta: method that may take the gradients of single exits in the combiner's place.

    Raises:
      UserError: an unknown name, an option that the combiner lacks, a value out of range, or a way
        through the exits where none is needed.
    """
    others = {key: value for key, value in options(section).items() if key != "exits"}
    combiner = create_combiner(section.name, **others)
    check_exits(section.exits)
    takes_exits = getattr(meta, "takes_exit_gradients", False)
    if section.exits is not None and getattr(combiner, "is_plain_sum", False) and not takes_exits:
        raise UserError(
            f"combiner.exits={section.exits!r} has no effect with a plain sum of the exits' "
            f"gradients, which is one backward pass: leave it unset, or choose a combiner"
        )
    return combiner


def check_combiner(
    combiner: Combiner, model: MultiExitModel, image_shape: tuple[int, int, int]
) -> None:
    """Traces one update for the model's trunk, so that what does not fit is named at once.

    Raises:
      UserError: parameters outside the model's blocks and heads, or a combiner that refuses so many
        exits, or returns gradients or a state of other shapes than those of the parameters and the
        state before.
    """
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    if not getattr(combiner, "is_plain_sum", False):
        check_names(model, variables["params"])
    params, _ = split_trunk_and_heads(variables["params"])

    def by_exit(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((model.num_exits, *leaf.shape), leaf.dtype)

    def update(grads: PyTree, params: PyTree, key: jax.Array):
        state = combiner.init(params)
        return combiner.update(grads, state, params, key=key), state

    try:
        (grads, new), state = jax.eval_shape(
            update, jax.tree.map(by_exit, params), params, jax.random.key(0)
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    for what, actual, expected in (("gradients", grads, params), ("a state", new, state)):
        if _shapes(actual) != _shapes(expected):
            raise UserError(
                f"combiner {type(combiner).__name__} returns {what} of other shapes or types than "
                f"it was given: keep those of the {'parameters' if expected is params else 'state'}"
            )


def _shapes(tree: PyTree) -> PyTree:
    """Returns what two trees must have in common: structure, shapes and types."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
