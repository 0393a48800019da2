"""Places of exits: costs and choices by hand, and every subset beside the best."""

import itertools

import numpy as np
import pytest

from dfs_jax.inference.fitting import fit_policy
from dfs_jax.inference.places import best_places, exit_costs_of, placements, subsets
from dfs_jax.types import UserError


def two_class_logits(right, sureness):
    """Logits `[n, 2]` of examples of class 0: right or wrong, and by what margin."""
    signs = np.where(np.asarray(right, bool), 1.0, -1.0)
    return np.stack([signs * np.asarray(sureness, float), np.zeros(len(signs))], axis=-1)


# Four examples. Candidate 1 is right about two and sure of them, candidate 2 about three, the last
# about all. Each has a head of cost 1.
LOGITS = np.stack(
    [
        two_class_logits([1, 1, 0, 0], [4, 3, 1, 0.5]),
        two_class_logits([1, 1, 1, 0], [4, 4, 3, 0.5]),
        two_class_logits([1, 1, 1, 1], [4, 4, 4, 4]),
    ]
)
LABELS = np.zeros(4, int)
TRUNK, HEADS = (2.0, 5.0, 10.0), (1.0, 1.0, 1.0)


def test_costs_count_the_trunk_once_and_the_heads_on_the_way():
    assert exit_costs_of((0, 1, 2), TRUNK, HEADS) == (3, 7, 13)
    assert exit_costs_of((1, 2), TRUNK, HEADS) == (6, 12)
    assert exit_costs_of((2,), TRUNK, HEADS) == (11,)


def test_every_subset_has_the_last_candidate():
    for candidates, most in itertools.product((1, 2, 5), (None, 1, 2, 9)):
        found = list(subsets(candidates, most))
        assert len(set(found)) == len(found)
        assert all(places[-1] == candidates - 1 for places in found)
        assert all(len(places) <= (most or candidates) for places in found)
    assert len(list(subsets(5))) == 2**4
    assert list(subsets(4, 2)) == [(3,), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("budget", "most", "places", "accuracy", "cost"),
    [
        (7.4, None, (0, 1, 2), 1.0, 6.5),  # two leave at 3, one at 7, one at 13
        (11.0, None, (0, 1, 2), 1.0, 6.5),  # equally accurate subsets cost more
        (11.0, 2, (0, 2), 1.0, 7.5),  # two leave at 3, two at 12; with (1, 2) three at 6, one at 12
        (11.0, 1, (2,), 1.0, 11.0),
        (3.0, None, (0, 2), 0.5, 3.0),  # all leave at once: a second early exit changes nothing
    ],
)
def test_the_best_places_by_hand(budget, most, places, accuracy, cost):
    best = best_places(LOGITS, LABELS, TRUNK, HEADS, budget, most=most)
    assert best.places == places
    assert best.accuracy == pytest.approx(accuracy)
    assert best.cost == pytest.approx(cost)


def test_dear_heads_are_left_out():
    """With heads of cost 4, both early exits cost (6 + 6 + 13 + 19) / 4, as against 10.5."""
    best = best_places(LOGITS, LABELS, TRUNK, (4.0, 4.0, 1.0), 11.0)
    assert best.places == (0, 2)
    assert best.cost == pytest.approx((6 + 6 + 15 + 15) / 4)


def brute_force(logits, labels, costs, budget):
    """Returns the best accuracy over all thresholds at all exits, on softmax confidences."""
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    confidence, predicted = probabilities.max(-1), logits.argmax(-1)
    choices = [[*np.unique(row), np.inf] for row in confidence[:-1]]
    best = 0.0
    for thresholds in itertools.product(*choices):
        leaves = confidence >= np.array([*thresholds, -np.inf])[:, None]
        taken = leaves.argmax(0)
        if np.asarray(costs)[taken].mean() <= budget:
            each = np.arange(len(labels))
            best = max(best, (predicted[taken, each] == labels).mean())
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_best_is_the_best_of_all_subsets(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 11)
    logits = draw.normal(size=(4, 11, 3))
    for k in range(4):  # deeper candidates know more
        logits[k, np.arange(11), labels] += 0.7 * k
    trunk, heads, budget = (2.0, 3.0, 7.0, 13.0), (0.5, 0.3, 0.7, 0.2), 6.0
    found = placements(logits, labels, trunk, heads, budget)
    affordable = [s for s in subsets(4) if exit_costs_of(s, trunk, heads)[0] <= budget]
    assert sorted(p.places for p in found) == sorted(affordable)
    assert found[0] == best_places(logits, labels, trunk, heads, budget)
    assert found[0].accuracy == max(p.accuracy for p in found)
    for placement in found:
        costs = exit_costs_of(placement.places, trunk, heads)
        alone = fit_policy(logits[list(placement.places)], labels, costs, at_most=budget)
        assert placement.fitted.point.risk == pytest.approx(alone.point.risk)
        assert placement.cost <= budget
    # Thresholds are chosen along a curve: near the best of all, and never above it.
    limit = max(
        brute_force(logits[list(s)], labels, exit_costs_of(s, trunk, heads), budget)
        for s in affordable
    )
    assert limit - 1 / 11 - 1e-9 <= found[0].accuracy


def test_mistakes():
    with pytest.raises(UserError, match="the cheapest exit alone costs 3"):
        best_places(LOGITS, LABELS, TRUNK, HEADS, 2.9)
    with pytest.raises(UserError, match=r"3 candidates need as many costs .* got 2 and 3"):
        best_places(LOGITS, LABELS, TRUNK[:2], HEADS, 9)
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        best_places(LOGITS, LABELS, TRUNK, HEADS, 9, most=0)
    many = np.zeros((14, 4, 2))
    with pytest.raises(UserError, match="14 candidates have 8192 subsets"):
        best_places(many, LABELS, range(1, 15), [1] * 14, 9)
