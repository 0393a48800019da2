"""Guarantees: exact tails, the order of the tests, and violations counted where risks are known."""

import math

import numpy as np
import pytest

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.fitting import predictions_of
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.risk import binomial_p_value, certify
from dfs_jax.inference.temperature import fit_temperatures
from dfs_jax.inference.thresholds import RISKS, OperatingPoint, operating_curve
from dfs_jax.types import UserError


@pytest.mark.parametrize(("bad", "n", "epsilon"), [(0, 7, 0.3), (3, 23, 0.1), (40, 101, 0.5)])
def test_the_p_value_is_the_exact_tail(bad, n, epsilon):
    tail = sum(math.comb(n, m) * epsilon**m * (1 - epsilon) ** (n - m) for m in range(bad + 1))
    assert binomial_p_value(bad, n, epsilon) == pytest.approx(tail, rel=1e-12)


COSTS = [1.0, 2.0, 4.0]


def draw(rng, n):
    """Exits whose true risk at any confidence is known: they are wrong with chance 1 - confidence.

    The answers to an example are wrong together as far as they can be.
    """
    confidence = 1 - 0.8 * rng.random((3, n)) ** np.array([[1.5], [2.5], [4.0]])
    wrong = rng.random(n) > confidence
    labels = np.zeros(n, int)
    return ExitPredictions(confidence, labels + wrong, None, None, labels)


def true_risk(thresholds, population):
    """Mean chance of a mistake over a population of two hundred thousand."""
    confidence = population.confidence
    taken = np.full(confidence.shape[1], 2)
    for k in (1, 0):
        if thresholds[k] is not None:
            taken[confidence[k] >= thresholds[k]] = k
    return float((1 - confidence[taken, np.arange(len(taken))]).mean())


@pytest.mark.parametrize(("epsilon", "delta"), [(0.25, 0.1), (0.22, 0.05)])
def test_violations_are_at_most_delta(epsilon, delta):
    """1,000 calibration sets: a true risk above epsilon in at most a share delta of them."""
    rng = np.random.default_rng(7)
    curve = operating_curve(draw(rng, 1000), COSTS)
    population = draw(rng, 200_000)
    risks = {point.thresholds: true_risk(point.thresholds, population) for point in curve}
    assert min(risks.values()) < epsilon < max(risks.values())
    draws, violations, qualified = 1000, 0, 0
    for _ in range(draws):
        found = certify(curve, draw(rng, 400), epsilon=epsilon, delta=delta)
        if found.point is not None:
            qualified += 1
            violations += risks[found.point.thresholds] > epsilon
    # Three standard deviations of the count of violations above what is allowed.
    assert violations <= draws * delta + 3 * math.sqrt(draws * delta * (1 - delta))
    assert qualified > draws / 2
    # The test can fail: with the empirical risk alone it would.
    assert violations > 0


def draw_logits(rng, n):
    """Logits of three exits, and what the labels are drawn from: exits see it through noise."""
    truth = 2.5 * rng.standard_normal((n, 4))
    noise = rng.standard_normal((3, n, 4)) * np.array([2.0, 1.0, 0.3])[:, None, None]
    chances = np.exp(truth) / np.exp(truth).sum(1, keepdims=True)
    labels = (chances.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=3)
    return (truth + noise).astype(np.float32), labels, chances


@pytest.mark.parametrize("risk", RISKS)
def test_violations_on_logits_are_at_most_delta(risk):
    """From logits to the guarantee, temperatures included; true risks are those of 200,000."""
    rng = np.random.default_rng(3)
    draws, n, delta = 1000, 300, 0.1
    logits, labels, _ = draw_logits(rng, 1000)
    options = {"measure": "max_softmax", "temperatures": fit_temperatures(logits, labels)}
    curve = operating_curve(predictions_of(logits, labels, **options), COSTS, risk=risk)
    logits, labels, chances = draw_logits(rng, 200_000)
    population, each = predictions_of(logits, labels, **options), np.arange(200_000)
    right = chances if risk == "error" else np.eye(4)[population.predicted[-1]]
    risks = {}
    for point in curve:
        answers = population.predicted[Policy(point.thresholds).exits(population.confidence), each]
        risks[point.thresholds] = float(1 - right[each, answers].mean())
    epsilon = (min(risks.values()) + max(risks.values())) / 2
    logits, labels, _ = draw_logits(rng, draws * n)
    calibration = predictions_of(logits, labels, **options)
    violations = 0
    for i in range(draws):
        some = ExitPredictions(*(field[..., i * n : (i + 1) * n] for field in calibration))
        found = certify(curve, some, epsilon=epsilon, delta=delta, risk=risk)
        violations += found.point is not None and risks[found.point.thresholds] > epsilon
    assert 0 < violations <= draws * delta + 3 * math.sqrt(draws * delta * (1 - delta))


def points(*thresholds):
    return [OperatingPoint(t, 0.1 * i, 10.0 - i, (0.5, 0.5)) for i, t in enumerate(thresholds)]


def example_predictions():
    """The second exit is always right; the first about the surer half of 200 examples."""
    confidence = np.stack([np.linspace(0, 1, 200, endpoint=False), np.ones(200)])
    predicted = np.stack([(np.arange(200) < 100).astype(int), np.zeros(200, int)])
    return ExitPredictions(confidence, predicted, None, None, np.zeros(200, int))


def test_the_cheapest_that_qualifies_is_found():
    calibration = example_predictions()
    curve = points((None,), (0.8,), (0.5,), (0.4,), (0.0,))
    for risk in ("error", "disagreement"):
        found = certify(curve, calibration, epsilon=0.05, delta=0.1, risk=risk)
        # Wrong at these thresholds: 0, 0, 0, 20 and 100 of 200.
        assert found.point == curve[2]
        expected = [binomial_p_value(bad, 200, 0.05) for bad in (0, 0, 0, 20)]
        assert found.p_values == pytest.approx(expected)
        assert found.examples == 200
    assert "shown on 200 examples for 4 policies" in found.describe()


def test_what_comes_after_the_first_failure_is_not_tried():
    curve = points((None,), (0.0,), (0.5,))
    found = certify(curve, example_predictions(), epsilon=0.05, delta=0.1)
    assert found.point == curve[0]
    assert len(found.p_values) == 2


def test_the_order_is_by_risk_on_the_fitting_data():
    """The last exit alone, when not the safest, comes in its turn; what is worse in both never."""
    dear, safe, cheap = points((0.9,), (0.8,), (0.5,))
    last = OperatingPoint((None,), 0.15, 12.0, (0.0, 1.0))
    curve = [last, dear._replace(risk=0.3), safe._replace(risk=0.0), cheap]
    calibration = example_predictions()
    found = certify(curve, calibration, epsilon=0.05, delta=0.1)
    assert found.point == cheap
    assert found.covers_last_exit
    assert len(found.p_values) == 3
    found = certify(
        [*curve[1:3], cheap._replace(thresholds=(0.0,))], calibration, epsilon=0.05, delta=0.1
    )
    assert found.point == curve[2]
    assert not found.covers_last_exit


def test_when_nothing_qualifies_it_says_so():
    few = ExitPredictions(*(x[..., :20] if x is not None else None for x in example_predictions()))
    found = certify(points((None,), (0.5,)), few, epsilon=0.05, delta=0.1)
    assert found.point is None
    assert found.p_values == pytest.approx([0.95**20])
    assert found.describe() == (
        "no policy qualifies: a risk (error) of at most 0.05 with confidence 0.9 cannot be shown "
        "on 20 examples, not even for the safest (p-value 0.36)"
    )


def test_mistakes_of_users():
    calibration = example_predictions()
    curve = points((None,))
    with pytest.raises(UserError, match="epsilon must lie between 0 and 1, got 5"):
        certify(curve, calibration, epsilon=5, delta=0.1)
    with pytest.raises(UserError, match="delta must lie between 0 and 1, got 0"):
        certify(curve, calibration, epsilon=0.1, delta=0)
    with pytest.raises(UserError, match="unknown risk 'regret'"):
        certify(curve, calibration, epsilon=0.1, delta=0.1, risk="regret")
    empty = ExitPredictions(*(x[..., :0] if x is not None else None for x in calibration))
    with pytest.raises(UserError, match="0 examples"):
        certify(curve, empty, epsilon=0.1, delta=0.1)
