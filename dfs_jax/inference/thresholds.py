"""Thresholds for a target mean cost, from a curve of policies of decreasing cost.

A cost is any quantity that adds up over stages: operations, the time of a single example on this
machine (latency), or the time for each example in a full batch (the inverse of throughput).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.budgeted import choose_thresholds, thresholds_for_shares
from dfs_jax.inference.policy import EVERYBODY, NOBODY, apply_thresholds
from dfs_jax.types import UserError

RISKS = ("error", "disagreement")
_SWEEPS = 10  # upper bound; two or three suffice
_BISECTIONS = 20
_STEPS = 100  # neighbours on a curve differ by about 1/100 of the whole network's cost at most
# Prices of a pass through the whole network, in units of one mistake.
_PRICES = np.geomspace(1e-4, 1e1, 81)


class OperatingPoint(NamedTuple):
    """Thresholds and their results on the data they were chosen on.

    Attributes:
      thresholds: threshold of each exit but the last, midway between the lowest confidence that
        leaves and the highest that stays; None where no example leaves.
      risk: fraction of the examples answered wrongly, or differently from the last exit.
      cost: mean cost of an example, in the unit of the costs.
      exit_shares: fraction of the examples that each exit answers.
    """

    thresholds: tuple[float | None, ...]
    risk: float
    cost: float
    exit_shares: tuple[float, ...]


def mistakes(predictions: ExitPredictions, risk: str) -> np.ndarray:
    """Returns whether each exit's answer to each example is a mistake, `[exits, n]` bool.

    Args:
      predictions: predictions for n examples.
      risk: kind of mistake: "error", an answer other than the label, or "disagreement", an answer
        other than the last exit's.

    Raises:
      UserError: an unknown risk.
    """
    if risk not in RISKS:
        raise UserError(f"unknown risk {risk!r}: choose one of {', '.join(RISKS)}")
    predicted = np.asarray(predictions.predicted)
    return predicted != (np.asarray(predictions.labels) if risk == "error" else predicted[-1])


def midway(
    confidence: np.ndarray, thresholds: Sequence[float] | np.ndarray
) -> tuple[float | None, ...]:
    """Moves thresholds midway between neighbouring confidences, where rounding is harmless.

    Every example still leaves at the same exit. Only confidences of examples that reach the exit
    are neighbours.

    Args:
      confidence: confidence of each exit in each example, `[exits, n]`.
      thresholds: threshold of every exit, as returned by `choose_thresholds`.

    Returns:
      The threshold of each exit but the last: None where no example leaves, `EVERYBODY` (-1e8)
      where all do.

    Example:
      >>> midway(np.array([[0.9, 0.5, 0.25], [0.5, 0.5, 0.5]]), [0.5, EVERYBODY])
      (0.375,)
    """
    confidence = np.asarray(confidence, np.float64)
    taken = apply_thresholds(confidence, thresholds)
    moved: list[float | None] = []
    for k in range(len(confidence) - 1):
        leaving, staying = confidence[k][taken == k], confidence[k][taken > k]
        staying = staying[~np.isnan(staying)]
        if not len(leaving):
            moved.append(None)
        elif not len(staying):
            moved.append(EVERYBODY)
        else:
            moved.append(float(leaving.min() + staying.max()) / 2)
    return tuple(moved)


def point_for_budget(
    predictions: ExitPredictions, costs: Sequence[float], p: float, *, risk: str = "error"
) -> OperatingPoint:
    """Returns the point of budgeted batch classification for one p (see `budgeted`)."""
    confidence = np.asarray(predictions.confidence)
    return _Family(predictions, costs, risk).point(choose_thresholds(confidence, p))


def point_for_cost(
    predictions: ExitPredictions, costs: Sequence[float], at_most: float, *, risk: str = "error"
) -> OperatingPoint:
    """Returns the point of least risk found with a mean cost of at most `at_most`.

    The point lies on the `operating_curve`, or between its neighbours on both sides of the target.

    Args:
      predictions: predictions that thresholds are chosen on (validation data).
      costs: cost of the network up to and including each exit, shallow first.
      at_most: target cost, in the unit of the costs.
      risk: kind of risk, "error" or "disagreement".

    Raises:
      UserError: a target below the cost of the first exit alone.
    """
    family = _Family(predictions, costs, risk)
    curve = family.curve()
    above = [point for point in curve if point.cost > at_most]
    below = [point for point in curve if point.cost <= at_most]
    if not below:
        raise UserError(_cannot_be_met(at_most, curve[-1], family))
    if above:
        below += family.up_to(at_most, above[-1], below[0])
    return min(below, key=lambda point: (point.risk, point.cost))


def _cannot_be_met(at_most: float, cheapest: OperatingPoint, family: _Family) -> str:
    unsure = int(np.isnan(family.confidence[0]).sum())
    told = f"a mean cost of {at_most:g} cannot be met: the first exit alone costs "
    if not unsure:
        return f"{told}{family.costs[0]:g}"
    return (
        f"{told}{family.costs[0]:g}, and {unsure} of {family.n} examples have no confidence there "
        f"(NaN), so that the cheapest policy costs {cheapest.cost:g}"
    )


def operating_curve(
    predictions: ExitPredictions, costs: Sequence[float], *, risk: str = "error"
) -> list[OperatingPoint]:
    """Returns points of decreasing cost, from no early exit to all examples at the first exit.

    For a price of the cost, thresholds are chosen that minimise

        mean_n mistake(n) + price * mean_n cost(n)

    exit by exit from the deepest. The examples that leave at an exit are the most confident that
    reach it, as many as minimise the objective given the other thresholds. Thresholds of shallow
    exits change which examples reach deep ones, so this is repeated until nothing changes. The
    curve covers 81 prices. Where the policies of two neighbouring prices differ much in cost,
    policies between them mix the fractions of examples that leave at each exit.

    Args:
      predictions: predictions that thresholds are chosen on (validation data).
      costs: cost of the network up to and including each exit, ascending.
      risk: kind of risk, "error" or "disagreement".

    Raises:
      UserError: costs that do not ascend or whose number is not that of the exits; an unknown risk.
    """
    return _Family(predictions, costs, risk).curve()


class _Family:
    """The policies that are chosen on one set of predictions."""

    def __init__(self, predictions: ExitPredictions, costs: Sequence[float], risk: str):
        self.confidence = np.asarray(predictions.confidence, np.float64)
        self.mistakes = mistakes(predictions, risk)
        self.costs = np.asarray(costs, np.float64)
        self.exits, self.n = self.confidence.shape
        if self.costs.shape != (self.exits,) or not (np.diff(self.costs, prepend=0) > 0).all():
            raise UserError(f"{self.exits} exits take {self.exits} rising costs, got {list(costs)}")
        if not self.n:
            raise UserError("thresholds cannot be chosen on 0 examples")
        # Most confident first; NaN is last.
        self.order = np.argsort(np.nan_to_num(-self.confidence, nan=np.inf), axis=1, kind="stable")

    def point(self, thresholds: Sequence[float] | np.ndarray) -> OperatingPoint:
        """Returns the point of thresholds `[exits]`."""
        taken = apply_thresholds(self.confidence, thresholds)
        shares = np.bincount(taken, minlength=self.exits) / self.n
        return OperatingPoint(
            midway(self.confidence, thresholds),
            float(self.mistakes[taken, np.arange(self.n)].mean()),
            float(shares @ self.costs),
            tuple(shares.tolist()),
        )

    def curve(self) -> list[OperatingPoint]:
        """Returns points of decreasing cost."""
        nobody = [*[NOBODY] * (self.exits - 1), EVERYBODY]
        first = [EVERYBODY] * self.exits
        found = [self.point(self.for_price(price)) for price in _PRICES / self.costs[-1]]
        points = [self.point(nobody)]
        for point in [*sorted(found, key=lambda point: -point.cost), self.point(first)]:
            gap = points[-1].cost - point.cost
            steps = max(1, round(_STEPS * gap / self.costs[-1]))
            between = [self.mixture(points[-1], point, i / steps) for i in range(1, steps)]
            for candidate in (*between, point):
                if point.cost <= candidate.cost < points[-1].cost:
                    points.append(candidate)
        return points

    def for_price(self, price: float) -> np.ndarray:
        """Returns the thresholds `[exits]` for a price."""
        loss = self.mistakes + price * self.costs[:, None]
        thresholds = np.full(self.exits, NOBODY)
        thresholds[-1] = EVERYBODY
        for _ in range(_SWEEPS):
            before = thresholds.copy()
            for k in reversed(range(self.exits - 1)):
                thresholds[k] = self._best_cut(k, thresholds, loss)
            if np.array_equal(before, thresholds):
                break
        return thresholds

    def mixture(self, dear: OperatingPoint, cheap: OperatingPoint, part: float) -> OperatingPoint:
        """Returns a point between two, with the weight `part` for the cheaper one."""
        shares = (1 - part) * np.array(dear.exit_shares) + part * np.array(cheap.exit_shares)
        return self.point(thresholds_for_shares(self.confidence, shares))

    def up_to(
        self, at_most: float, dear: OperatingPoint, cheap: OperatingPoint
    ) -> Iterator[OperatingPoint]:
        """Yields points between two whose cost approaches `at_most` from below."""
        too_dear, cheap_enough = 0.0, 1.0
        for _ in range(_BISECTIONS):
            part = (too_dear + cheap_enough) / 2
            point = self.mixture(dear, cheap, part)
            if point.cost <= at_most:
                cheap_enough = part
                yield point
            else:
                too_dear = part

    def _best_cut(self, k: int, thresholds: np.ndarray, loss: np.ndarray) -> float:
        """Returns the best threshold of exit k, given those of all other exits."""
        come = apply_thresholds(self.confidence, [*thresholds[:k], *[EVERYBODY] * (self.exits - k)])
        later = apply_thresholds(self.confidence, [*[NOBODY] * (k + 1), *thresholds[k + 1 :]])
        sure = ~np.isnan(self.confidence[k])
        ranked = self.order[k][((come == k) & sure)[self.order[k]]]
        if not len(ranked):
            return NOBODY
        gain = np.cumsum(loss[later[ranked], ranked] - loss[k, ranked])
        confidence = self.confidence[k][ranked]
        # Equal confidences cannot be separated.
        gain[:-1][confidence[:-1] == confidence[1:]] = -np.inf
        best = int(np.argmax(gain))
        return float(confidence[best]) if gain[best] > 0 else NOBODY
