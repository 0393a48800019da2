"""Thresholds from targets: against every possible choice, one example at a time."""

import itertools

import numpy as np
import pytest

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.budgeted import DEFAULT_BUDGETS, choose_thresholds
from dfs_jax.inference.policy import EVERYBODY, NOBODY, Policy
from dfs_jax.inference.thresholds import (
    midway,
    mistakes,
    operating_curve,
    point_for_budget,
    point_for_cost,
)
from dfs_jax.types import UserError

COSTS = [2.0, 5.0, 11.0, 13.0]


def draw(exits, n, seed=0, levels=None):
    """Exits that are right as often as they are sure, deeper ones surer."""
    rng = np.random.default_rng(seed)
    skill = rng.random(n)
    confidence = np.clip(skill + 0.3 * rng.standard_normal((exits, n)), 0.01, 1)
    confidence = np.clip(confidence + 0.1 * np.arange(exits)[:, None], 0, 1).astype(np.float32)
    if levels:
        confidence = np.ceil(confidence * levels) / np.float32(levels)
    labels = rng.integers(0, 3, n)
    wrong = rng.random((exits, n)) > confidence
    predicted = (labels + wrong * rng.integers(1, 3, (exits, n))) % 3
    return ExitPredictions(confidence, predicted, predicted[0], None, labels)


def slow_outcome(predictions, thresholds, costs, risk="error"):
    """Risk, cost and shares, one example at a time."""
    exits, n = predictions.confidence.shape
    bad, cost, shares = 0, 0.0, [0] * exits
    for i in range(n):
        for k in range(exits):
            bound = thresholds[k] if k < exits - 1 else -1e8
            if bound is not None and float(predictions.confidence[k][i]) >= bound:
                wanted = predictions.labels[i] if risk == "error" else predictions.predicted[-1][i]
                bad += int(predictions.predicted[k][i] != wanted)
                cost += costs[k]
                shares[k] += 1
                break
    return bad / n, cost / n, [share / n for share in shares]


def assert_is_what_it_says(point, predictions, costs, risk="error"):
    bad, cost, shares = slow_outcome(predictions, point.thresholds, costs, risk)
    assert point.risk == pytest.approx(bad)
    assert point.cost == pytest.approx(cost)
    assert list(point.exit_shares) == pytest.approx(shares)


@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize("risk", ["error", "disagreement"])
def test_every_point_is_what_it_says(risk, levels):
    predictions = draw(4, 131, levels=levels)
    curve = operating_curve(predictions, COSTS, risk=risk)
    for point in curve:
        assert_is_what_it_says(point, predictions, COSTS, risk)
    costs = [point.cost for point in curve]
    assert costs == sorted(set(costs), reverse=True)
    assert curve[0].thresholds == (None, None, None)
    assert curve[-1].thresholds[0] == EVERYBODY
    assert len(curve) > (5 if levels else 50)


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_is_better_at_any_price(seed):
    """Every choice of two thresholds: none has a lower risk + price * cost than the curve."""
    predictions, costs = draw(3, 29, seed), COSTS[:3]
    candidates = [[NOBODY, *row] for row in predictions.confidence[:2].astype(float)]
    every = [slow_outcome(predictions, pair, costs) for pair in itertools.product(*candidates)]
    curve = operating_curve(predictions, costs)
    for price in (0.0, 0.01, 0.03, 0.1, 0.3):
        best = min(risk + price * cost for risk, cost, _ in every)
        assert min(p.risk + price * p.cost for p in curve) <= best + 0.01


@pytest.mark.parametrize("levels", [None, 11])
def test_a_target_is_kept_and_used(levels):
    predictions = draw(4, 501, levels=levels)
    curve = operating_curve(predictions, COSTS)
    for target in (2.0, 3.1, 6.0, 8.5, 12.0, 13.0, 99.0):
        point = point_for_cost(predictions, COSTS, target)
        assert_is_what_it_says(point, predictions, COSTS)
        assert point.cost <= target
        best = min(p.risk for p in curve if p.cost <= target)
        assert point.risk <= best
    risks = [point_for_cost(predictions, COSTS, t).risk for t in np.linspace(2, 13, 23)]
    assert all(b <= a + 0.005 for a, b in itertools.pairwise(risks))


def test_no_budget_of_the_literature_is_better():
    predictions = draw(4, 997)
    for p in DEFAULT_BUDGETS[::5]:
        budget = point_for_budget(predictions, COSTS, p)
        assert_is_what_it_says(budget, predictions, COSTS)
        assert point_for_cost(predictions, COSTS, budget.cost).risk <= budget.risk + 0.003


@pytest.mark.parametrize("levels", [None, 1, 3, 11])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0, 2.0])
def test_midway_changes_nobodys_exit_and_keeps_away_from_everybody(p, levels):
    confidence = draw(4, 89, levels=levels).confidence
    chosen = choose_thresholds(confidence, p)
    policy = Policy(midway(confidence, chosen))
    expected = np.array(
        [next(k for k in range(4) if confidence[k, i] >= chosen[k]) for i in range(89)]
    )
    taken = policy.exits(confidence)
    np.testing.assert_array_equal(taken, expected)
    for k, threshold in enumerate(policy.thresholds):
        left, stayed = confidence[k][taken == k], confidence[k][taken > k]
        if threshold is None:
            assert not len(left)
        elif threshold != EVERYBODY:
            assert threshold == (float(left.min()) + float(stayed.max())) / 2
            assert left.min() > threshold > stayed.max()


def test_what_is_no_number_stays_to_the_end():
    predictions = draw(3, 41)
    predictions.confidence[:2, 7] = np.nan
    for point in operating_curve(predictions, COSTS[:3])[:-1]:
        assert Policy(point.thresholds).exits(predictions.confidence)[7] == 2


def test_a_cost_that_nan_puts_out_of_reach_is_explained():
    predictions = draw(3, 41)
    predictions.confidence[0, :7] = np.nan
    with pytest.raises(UserError, match=r"first exit alone costs .* 7 of 41 examples have no conf"):
        point_for_cost(predictions, COSTS[:3], COSTS[0])


def test_mistakes_by_hand():
    predicted = np.array([[1, 2, 0], [1, 1, 0]])
    p = ExitPredictions(np.ones((2, 3)), predicted, None, None, np.array([1, 2, 2]))
    assert mistakes(p, "error").tolist() == [[False, False, True], [False, True, True]]
    assert mistakes(p, "disagreement").tolist() == [[False, True, False], [False] * 3]


def test_mistakes_of_users():
    predictions = draw(3, 5)
    with pytest.raises(UserError, match=r"cost of 1.5 cannot be met: the first exit alone costs 2"):
        point_for_cost(predictions, COSTS[:3], 1.5)
    with pytest.raises(UserError, match="3 exits take 3 rising costs"):
        operating_curve(predictions, COSTS)
    with pytest.raises(UserError, match=r"3 rising costs, got \[1, 3, 3\]"):
        operating_curve(predictions, [1, 3, 3])
    with pytest.raises(UserError, match="unknown risk 'regret'"):
        operating_curve(predictions, COSTS[:3], risk="regret")
    with pytest.raises(UserError, match="0 examples"):
        operating_curve(draw(3, 0), COSTS[:3])
