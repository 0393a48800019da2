"""From a config's section `meta` to the method that looks ahead, and whether it fits the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dfs_jax.combiners import Combiner
from dfs_jax.combiners.exit_gradients import check_names
from dfs_jax.meta import Meta, Setup, create_meta
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.training.config import options
from dfs_jax.types import UserError


def meta_from_config(section: Mapping[str, Any] | None) -> Meta | None:
    """Returns the method that a config's section `meta` describes; None where it names none.

    Args:
      section: None for a config of a time when there was none.

    Raises:
      UserError: an unknown name, an option that the method lacks or that has none, or a value out
        of range.
    """
    if section is None:
        return None
    if section["name"]:
        return create_meta(section["name"], **options(section))
    for field, value in options(section).items():
        if value is not None:
            raise UserError(f"meta.{field}={value!r} has no effect without a meta.name: set both")
    return None


def check_meta(
    meta: Meta | None,
    combiner: Combiner,
    model: MultiExitModel,
    image_shape: tuple[int, int, int],
    setup: Setup,
) -> None:
    """Raises UserError where the method cannot train the model as the run is set up."""
    if meta is None:
        return
    kind = type(meta).__name__
    if not getattr(combiner, "is_plain_sum", False):
        raise UserError(
            f"meta method {kind} says itself how gradients merge, and combiner "
            f"{type(combiner).__name__} would have no effect: leave combiner.name 'weighted_sum', "
            f"without weights"
        )
    if getattr(meta, "takes_exit_gradients", False):
        variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
        check_names(model, variables["params"])
    check = getattr(meta, "check", None)
    if check is not None:
        check(setup)
