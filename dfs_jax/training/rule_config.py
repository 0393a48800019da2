"""Builds the gradient rule from a config's section `gradients`, and checks that it fits the run."""

from __future__ import annotations

from typing import Any

import jax

from dfs_jax.gradients import GradientRule, Setup, create_rule
from dfs_jax.gradients.combiner import Combiner
from dfs_jax.gradients.exit_gradients import check_exits, check_names
from dfs_jax.models.contract import MultiExitModel, init_variables, split_trunk_and_heads
from dfs_jax.training.config import options
from dfs_jax.types import Config, PyTree, UserError


def rule_from_config(section: Config) -> GradientRule:
    """Returns the gradient rule that a config's section `gradients` describes.

    Raises:
      UserError: an unknown name, an option that the rule lacks, a value out of range, or a way
        through the exits for a rule that does not read the gradients of single exits.
    """
    others = {key: value for key, value in options(section).items() if key != "exits"}
    rule = create_rule(section.name, **others)
    if not isinstance(rule, GradientRule):
        raise UserError(
            f"gradients.name={section.name!r} is not a gradient rule: derive {type(rule).__name__} "
            f"from dfs_jax.gradients.GradientRule or dfs_jax.gradients.combiner.Combiner"
        )
    check_exits(section.exits)
    if section.exits is not None and not rule.takes_exit_gradients:
        raise UserError(
            f"gradients.exits={section.exits!r} has no effect with {section.name!r}, which takes "
            f"no gradients of single exits: leave it unset, or choose another rule"
        )
    return rule


def check_rule(
    rule: GradientRule, model: MultiExitModel, image_shape: tuple[int, int, int], setup: Setup
) -> None:
    """Raises UserError if the rule cannot train the model in a run that is set up like this.

    A combiner is traced for one update of the model's trunk.
    """
    rule.check(setup)
    if rule.needs_blocks and not model.runs_in_blocks:
        raise UserError(
            f"gradient rule {type(rule).__name__} needs a model that runs in blocks, which "
            f"{type(model).__name__} does not: choose another rule"
        )
    if not rule.takes_exit_gradients:
        return
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    check_names(model, variables["params"])
    if isinstance(rule, Combiner):
        _check_combiner(rule, model.num_exits, variables["params"])


def _check_combiner(rule: Combiner, num_exits: int, params: PyTree) -> None:
    trunk, _ = split_trunk_and_heads(params)

    def by_exit(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_exits, *leaf.shape), leaf.dtype)

    def update(grads: PyTree, trunk: PyTree, key: jax.Array):
        state = rule.init_trunk(trunk)
        return rule.update(grads, state, trunk, key=key), state

    try:
        (grads, new), state = jax.eval_shape(
            update, jax.tree.map(by_exit, trunk), trunk, jax.random.key(0)
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    for what, actual, expected in (("gradients", grads, trunk), ("a state", new, state)):
        if _shapes(actual) != _shapes(expected):
            raise UserError(
                f"gradient rule {type(rule).__name__} returns {what} of other shapes or types than "
                f"it was given: keep those of the {'parameters' if expected is trunk else 'state'}"
            )


def _shapes(tree: PyTree) -> PyTree:
    """Returns the structure, shapes and types of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
