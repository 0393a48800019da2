"""Training regimes: when the trunk is trained, and at which rate.

A pretrained trunk is often best left alone at first, while new heads are far from their place.
While it is frozen, blocks run with their running statistics, nothing is differentiated through
them, and their parameters, statistics and optimizer state stay as they are, bit for bit.

Reference: Kubaty et al., "How to Train Your Multi-Exit Model? Analyzing the Impact of Training
Strategies", 2024.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dfs_jax.models.contract import is_head
from dfs_jax.registry import Registry
from dfs_jax.training.config import options
from dfs_jax.types import Config, PyTree, UserError, check_whole


@dataclasses.dataclass(frozen=True)
class Regime:
    """A training regime.

    Attributes:
      frozen_epochs: number of epochs from the start with a frozen trunk; None for all.
      trunk_rate: learning rate of the trunk, in multiples of the heads'.
    """

    frozen_epochs: int | None = 0
    trunk_rate: float = 1.0

    def __post_init__(self):
        if isinstance(self.trunk_rate, bool) or not 0 < self.trunk_rate < math.inf:
            raise UserError(
                f"regime.trunk_rate must be a finite number above 0, got {self.trunk_rate!r}: the "
                f"regime frozen leaves the trunk as it is"
            )

    def check(self, epochs: int) -> None:
        """Raises UserError unless the trunk is trained in one of the epochs of a mixed run."""
        if self.frozen_epochs and self.frozen_epochs >= epochs:
            raise UserError(
                f"regime.frozen_epochs={self.frozen_epochs} leaves none of the {epochs} epochs for "
                f"the trunk: choose fewer, or the regime frozen"
            )

    def frozen_steps(self, total_steps: int, steps_per_epoch: int) -> int:
        """Returns the number of steps from the start with a frozen trunk.

        >>> Regime(frozen_epochs=2).frozen_steps(total_steps=35, steps_per_epoch=7)
        14
        """
        if self.frozen_epochs is None:
            return total_steps
        return self.frozen_epochs * steps_per_epoch


def joint(*, trunk_rate: float = 1.0) -> Regime:
    """Trunk and heads are trained together.

    Args:
      trunk_rate: learning rate of the trunk, in multiples of the heads'.
    """
    return Regime(0, trunk_rate)


def frozen() -> Regime:
    """Heads alone are trained."""
    return Regime(None)


def mixed(*, frozen_epochs: int, trunk_rate: float = 1.0) -> Regime:
    """Heads alone are trained in the first epochs, then trunk and heads together.

    Args:
      frozen_epochs: number of epochs with a frozen trunk.
      trunk_rate: learning rate of the trunk afterwards, in multiples of the heads'.
    """
    check_whole("regime.frozen_epochs", frozen_epochs)
    return Regime(frozen_epochs, trunk_rate)


REGIMES = Registry("regime", {"joint": joint, "frozen": frozen, "mixed": mixed})


def regime_from_config(config: Config) -> Regime:
    """Returns the regime of a section `regime`."""
    section = config.regime
    regime = REGIMES.create(section.name, **options(section))
    regime.check(config.epochs)
    return regime


def scaled_trunk(updates: PyTree, rate: float) -> PyTree:
    """Returns updates of the parameters, those of the trunk multiplied by `rate`."""
    if rate == 1:
        return updates
    return _by_part(lambda update: update, lambda update: rate * update, updates)


def kept_trunk(before: PyTree, after: PyTree) -> PyTree:
    """Returns `after` with the trunk's parts of `before`: of parameters, or of a state for each."""
    return _by_part(lambda old, new: new, lambda old, new: old, before, after)


def _by_part(of_head: Callable, of_trunk: Callable, *trees: PyTree) -> PyTree:
    """Maps the leaves of heads and, where names of parameters lead to them, of the trunk."""

    def change(path: Sequence[Any], *leaves: Any) -> Any:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return (of_trunk if names and not is_head(names[0]) else of_head)(*leaves)

    return jax.tree_util.tree_map_with_path(change, *trees)
