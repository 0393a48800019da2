"""Places of exits: the subset of candidates that is most accurate at a mean cost.

An exit is worth its head only if enough examples leave there. The heads of all candidates are
trained once, on the same frozen trunk, so that an exit's logits do not depend on the other exits,
and every subset can be evaluated on recorded logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.inference.fitting import FittedPolicy, fit_policy
from dfs_jax.inference.temperature import fit_temperatures
from dfs_jax.types import UserError

MOST_SUBSETS = 4096


class Placement(NamedTuple):
    """A subset of the candidates and its policy.

    Attributes:
      places: candidates that have an exit, 0-based, shallow first; the last is always among them.
      costs: cost of the network up to and including each of these exits.
      fitted: policy for logits that are divided by the candidates' temperatures, and its results.
    """

    places: tuple[int, ...]
    costs: tuple[float, ...]
    fitted: FittedPolicy

    @property
    def accuracy(self) -> float:
        """Accuracy on the examples that the policy was fitted on, a fraction."""
        return 1 - self.fitted.point.risk

    @property
    def cost(self) -> float:
        """Mean cost of these examples."""
        return self.fitted.point.cost


def exit_costs_of(
    places: Sequence[int], trunk_costs: Sequence[float], head_costs: Sequence[float]
) -> tuple[float, ...]:
    """Returns the cost up to and including each exit of a subset.

        cost of exit k = trunk up to k + heads of the subset up to and including k

    Args:
      places: candidates that have an exit, 0-based, shallow first.
      trunk_costs: cost of the trunk up to each candidate.
      head_costs: cost of each candidate's head.

    Example:
      >>> exit_costs_of((0, 2), trunk_costs=(10, 20, 30), head_costs=(1, 2, 4))
      (11, 35)
    """
    heads = itertools.accumulate(head_costs[k] for k in places)
    return tuple(
        trunk_costs[k] + sum_of_heads for k, sum_of_heads in zip(places, heads, strict=True)
    )


def subsets(candidates: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """Yields every subset of candidates with the last among them, small ones first.

    Args:
      candidates: number of candidates.
      most: largest number of exits; None for no limit.

    Example:
      >>> list(subsets(3))
      [(2,), (0, 2), (1, 2), (0, 1, 2)]
    """
    for early in range(candidates if most is None else min(most, candidates)):
        for places in itertools.combinations(range(candidates - 1), early):
            yield (*places, candidates - 1)


def placements(
    logits: np.ndarray,
    labels: np.ndarray,
    trunk_costs: Sequence[float],
    head_costs: Sequence[float],
    budget: float,
    *,
    most: int | None = None,
    measure: str = "max_softmax",
) -> list[Placement]:
    """Returns every subset that can meet a mean cost, the best first.

    Better is more accurate; of equally accurate subsets, cheaper; then with fewer exits.

    Args:
      logits: logits `[candidates, n, classes]` of examples that the network was not trained on.
      labels: integer labels, `[n]`.
      trunk_costs: cost of the trunk up to each candidate, rising.
      head_costs: cost of each candidate's head.
      budget: largest mean cost, in the unit of the costs.
      most: largest number of exits; None for no limit.
      measure: name of the measure of confidence.

    Raises:
      UserError: costs that do not fit the logits, a limit below 1, too many subsets, or a budget
        that no subset can meet.
    """
    candidates = len(logits)
    _check(candidates, trunk_costs, head_costs, most)
    temperatures = np.asarray(fit_temperatures(logits, labels), np.float32)
    scaled = logits / temperatures[:, None, None]
    found = []
    for places in subsets(candidates, most):
        costs = exit_costs_of(places, trunk_costs, head_costs)
        if costs[0] > budget:
            continue
        fitted = fit_policy(
            scaled[list(places)],
            labels,
            costs,
            at_most=budget,
            measure=measure,
            scale_temperatures=False,
        )
        found.append(Placement(places, costs, fitted))
    if not found:
        cheapest = min(map(sum, zip(trunk_costs, head_costs, strict=True)))
        raise UserError(
            f"no exits meet a mean cost of {budget:g}: the cheapest exit alone costs {cheapest:g}"
        )
    return sorted(found, key=lambda p: (-p.accuracy, p.cost, len(p.places)))


def best_places(
    logits: np.ndarray,
    labels: np.ndarray,
    trunk_costs: Sequence[float],
    head_costs: Sequence[float],
    budget: float,
    **options: Any,
) -> Placement:
    """Returns the most accurate subset of candidates at a mean cost; see `placements`.

    The search is exact over subsets; the thresholds of each are those of `fit_policy`.

    Example: two candidates; the first is right, and surer, on two of the three examples.
      >>> logits = np.array([[[9.0, 0], [9, 0], [0, 1]], [[1, 0], [1, 0], [1, 0]]])
      >>> best = best_places(logits, np.zeros(3, int), (2, 6), (1, 1), budget=5)
      >>> best.places, round(best.accuracy, 2), round(best.cost, 2)
      ((0, 1), 1.0, 4.67)
    """
    return placements(logits, labels, trunk_costs, head_costs, budget, **options)[0]


def _check(
    candidates: int, trunk_costs: Sequence[float], head_costs: Sequence[float], most: int | None
) -> None:
    if not len(trunk_costs) == len(head_costs) == candidates:
        raise UserError(
            f"{candidates} candidates need as many costs of the trunk and of heads, got "
            f"{len(trunk_costs)} and {len(head_costs)}"
        )
    if most is not None and most < 1:
        raise UserError(f"the largest number of exits must be at least 1, got {most}")
    early = candidates - 1
    limit = early if most is None else min(most - 1, early)
    count = sum(math.comb(early, k) for k in range(limit + 1))
    if count > MOST_SUBSETS:
        raise UserError(
            f"{candidates} candidates have {count} subsets, more than {MOST_SUBSETS} that are "
            f"tried: allow fewer exits"
        )
