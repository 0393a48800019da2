"""Budgeted batch classification: confidence thresholds that spread examples over the exits.

For a parameter p, exit k (1-based) answers a fraction q_k = p^k / sum_j p^j of all examples: the
smaller p, the smaller the cost. Thresholds come from validation data, the report from test data.

Reference: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification",
ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.exits.distribution import exit_distribution
from dfs_jax.inference.policy import EVERYBODY, NOBODY, apply_thresholds

# 0.05, 0.10, ... 2.00, each the float nearest to its decimal.
DEFAULT_BUDGETS = tuple(step / 20 for step in range(1, 41))


class BudgetPoint(NamedTuple):
    """One point of the budgeted curve.

    Attributes:
      p: parameter of `exit_distribution`.
      thresholds: confidence threshold of each exit; an example leaves at the first exit whose
        threshold it reaches.
      accuracy: fraction of all examples that are classified correctly.
      macs: mean number of operations up to the exit that an example takes, in the unit of the
        costs.
    """

    p: float
    thresholds: tuple[float, ...]
    accuracy: float
    macs: float


def choose_thresholds(confidence: np.ndarray, p: float | Sequence[float]) -> np.ndarray:
    """Returns thresholds with which exit k answers about a fraction q_k of the examples.

    Exit by exit, shallow first, the examples that no earlier exit answers are ranked by their
    confidence, and the threshold is the m-th highest confidence, with m = floor(n * q_k) in float64
    and n the size of the whole set. Then:

    - the exit answers examples with `confidence >= threshold`. Examples tied with the m-th are
      answered too, so that it can answer more than m, and later exits rank fewer;
    - the order among ties does not matter, since they are answered together;
    - if m = 0 or fewer than m examples remain, the threshold is `NOBODY` (1e8), and all of them
      stay for later exits;
    - the last exit takes the rest: its threshold is `EVERYBODY` (-1e8);
    - a NaN confidence is not ranked and reaches no threshold.

    Args:
      confidence: confidence of each exit in each example, `[exits, n]` float32 or float64, of
        validation data.
      p: parameter of `exit_distribution`, or several of them.

    Returns:
      Thresholds as float64, which holds confidences exactly: `[exits]` for one p and
      `[budgets, exits]` for several.

    Raises:
      ValueError: a p that is not positive, or confidences that are not `[exits, n]` with n > 0.

    Example: with q = (2/3, 1/3) and three examples the first exit's second confidence counts.
      >>> confidence = np.array([[0.9, 0.5, 0.7], [0.6, 0.8, 0.7]])
      >>> choose_thresholds(confidence, 0.5).tolist()
      [0.7, -100000000.0]
    """
    confidence = np.asarray(confidence)
    if confidence.ndim != 2 or 0 in confidence.shape:
        raise ValueError(f"confidences must be [exits, examples], got shape {confidence.shape}")
    rows = [
        thresholds_for_shares(confidence, exit_distribution(float(one), len(confidence)))
        for one in np.ravel(p)
    ]
    return np.reshape(rows, (*np.shape(p), len(confidence)))


def thresholds_for_shares(confidence: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns thresholds `[exits]` as `choose_thresholds` does, for any fractions `[exits]`."""
    num_exits, n = confidence.shape
    thresholds = np.full(num_exits, NOBODY)
    left = np.ones(n, bool)
    for k in range(num_exits - 1):
        rank = int(np.floor(n * shares[k]))
        ranked = confidence[k][left]
        ranked = ranked[~np.isnan(ranked)]
        if not 1 <= rank <= len(ranked):
            continue
        thresholds[k] = np.partition(ranked, len(ranked) - rank)[len(ranked) - rank]
        left &= ~(confidence[k] >= thresholds[k])
    thresholds[-1] = EVERYBODY
    return thresholds


def budgeted_curve(
    validation: ExitPredictions,
    test: ExitPredictions,
    costs: Sequence[float],
    ps: Sequence[float] = DEFAULT_BUDGETS,
) -> list[BudgetPoint]:
    """Chooses thresholds on one set and reports their results on another, for each budget.

    Args:
      validation: predictions that thresholds are chosen on.
      test: predictions that are reported.
      costs: operations of the network up to and including each exit, shallow first.
      ps: parameters of `exit_distribution`.

    Returns:
      One `BudgetPoint` for each p.

    Raises:
      ValueError: different numbers of exits in the sets or the costs, or an empty set.
    """
    counts = (len(validation.confidence), len(test.confidence), len(costs))
    if len(set(counts)) != 1:
        raise ValueError(
            f"validation data, test data and costs are of {counts[0]}, {counts[1]} and "
            f"{counts[2]} exits: they must be of one network"
        )
    if test.num_examples == 0:
        raise ValueError("there is no accuracy of 0 examples")
    thresholds = choose_thresholds(np.asarray(validation.confidence), ps)
    confidence, correct = np.asarray(test.confidence), np.asarray(test.correct())
    return [
        _point(float(p), row, confidence, correct, costs)
        for p, row in zip(ps, thresholds, strict=True)
    ]


def _point(
    p: float,
    thresholds: np.ndarray,
    confidence: np.ndarray,
    correct: np.ndarray,
    costs: Sequence[float],
) -> BudgetPoint:
    taken = apply_thresholds(confidence, thresholds.tolist())
    num_right, operations = 0, 0.0
    for k, cost in enumerate(costs):
        answered = taken == k
        num_right += np.count_nonzero(answered & correct[k])
        operations += np.count_nonzero(answered) * cost
    n = len(taken)
    return BudgetPoint(p, tuple(thresholds.tolist()), num_right / n, float(operations) / n)
