"""From logits to policies: what is fitted on what, and what it then gives."""

import numpy as np
import pytest

from dfs_jax.inference.fitting import (
    few_examples_warning,
    fit_policy,
    outcome,
    split_for_calibration,
)
from dfs_jax.inference.policy import last_exit_only, read_policy
from dfs_jax.inference.temperature import fit_temperatures
from dfs_jax.inference.thresholds import RISKS
from dfs_jax.types import UserError

COSTS = [2.0, 5.0, 11.0]
EXITS, CLASSES = 3, 4


def draw(n, seed=0):
    """Logits with less noise at deeper exits; the first exit is overconfident."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    truth = 2.5 * np.eye(CLASSES)[labels]
    noise = rng.standard_normal((EXITS, n, CLASSES)) * np.array([2.0, 1.5, 1.0])[:, None, None]
    return ((truth + noise) * np.array([3.0, 1.0, 1.0])[:, None, None]).astype(np.float32), labels


LOGITS, LABELS = draw(601)


@pytest.mark.parametrize("measure", ["max_softmax", "entropy", "margin", "patience"])
def test_a_cost_is_kept_where_it_was_fitted(measure):
    fitted = fit_policy(LOGITS, LABELS, COSTS, at_most=6.0, measure=measure)
    got = outcome(fitted.policy, LOGITS, LABELS, COSTS)
    assert got.cost == pytest.approx(fitted.point.cost)
    assert got.cost <= 6.0
    assert 1 - got.accuracy == pytest.approx(fitted.point.risk)
    assert got.exit_shares == pytest.approx(fitted.policy.exit_shares)
    assert fitted.policy.temperatures == fit_temperatures(LOGITS, LABELS)
    assert fitted.policy.temperatures[0] > 2 * fitted.policy.temperatures[1]
    assert fitted.policy.falls_back


def test_a_budget_and_no_temperatures():
    fitted = fit_policy(LOGITS, LABELS, COSTS, p=0.5, scale_temperatures=False)
    assert fitted.policy.temperatures == (1.0,) * EXITS
    # q = (4, 2, 1) / 7 of 601
    assert fitted.policy.exit_shares == pytest.approx([343 / 601, 171 / 601, 87 / 601])
    assert fitted.policy.fitted_on["examples"] == 601
    assert fitted.policy.fitted_on["guarantee"] is None


@pytest.mark.parametrize("risk", RISKS)
def test_a_guarantee_rests_on_examples_that_nothing_was_fitted_on(risk):
    options = {"epsilon": 0.25, "delta": 0.2, "risk": risk, "calibration_share": 0.4, "seed": 3}
    fitted = fit_policy(LOGITS, LABELS, COSTS, **options)
    fitting, calibration = split_for_calibration(601, 0.4, seed=3)
    assert fitted.certificate.examples == len(calibration) == 240
    assert fitted.policy.temperatures == fit_temperatures(LOGITS[:, fitting], LABELS[fitting])
    got = outcome(fitted.policy, LOGITS[:, fitting], LABELS[fitting], COSTS)
    assert got.cost == pytest.approx(fitted.point.cost)
    assert fitted.policy.fitted_on["guarantee"] == {
        "epsilon": 0.25,
        "delta": 0.2,
        "examples": 240,
        "seed": 3,
    }
    # Other labels and logits of the calibration examples change neither temperatures nor the curve.
    other_logits, other_labels = LOGITS.copy(), LABELS.copy()
    other_logits[:, calibration] += 1
    other_logits[:, calibration[::2], 0] += 0.01
    other_labels[calibration[0]] += 1
    other = fit_policy(other_logits, other_labels % CLASSES, COSTS, **options)
    assert other.policy.temperatures == fitted.policy.temperatures
    new_logits, new_labels = draw(20_000, seed=1)
    new = outcome(fitted.policy, new_logits, new_labels, COSTS)
    assert (1 - new.accuracy if risk == "error" else new.disagreement) < 0.27
    assert new.cost < COSTS[-1]


def test_no_policy_that_qualifies_is_said():
    with pytest.raises(UserError, match=r"no policy qualifies: a risk \(error\) of at most 0.01"):
        fit_policy(LOGITS, LABELS, COSTS, epsilon=0.01)


def test_what_the_last_exit_cannot_promise_forbids_falling_back():
    """The last exit is worse than the first: its answers are not covered by the guarantee."""
    fitted = fit_policy(LOGITS[::-1], LABELS, COSTS, epsilon=0.25)
    assert fitted.policy.thresholds[0] is not None
    assert not fitted.policy.falls_back


def test_outcome_by_hand():
    logits = np.log([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [[0.3, 0.7], [0.3, 0.7], [0.9, 0.1]]])
    labels = np.array([0, 1, 1])
    got = outcome(last_exit_only(2), logits, labels, [1, 10])
    assert got == (pytest.approx(1 / 3), 0.0, 10.0, (0.0, 1.0))
    fitted = fit_policy(logits, labels, [1, 10], at_most=4.5, scale_temperatures=False)
    got = outcome(fitted.policy, logits, labels, [1, 10])
    assert fitted.policy.thresholds == (pytest.approx(0.7),)
    assert got.accuracy == 1.0
    assert got.disagreement == pytest.approx(2 / 3)
    assert got.cost == pytest.approx(4.0)


def test_what_was_fitted_goes_through_json(tmp_path):
    fitted = fit_policy(LOGITS, LABELS, COSTS, epsilon=0.25, risk="disagreement")
    assert read_policy(fitted.policy.save(tmp_path / "policy.json")) == fitted.policy


MISTAKES = {
    "name one target": {},
    "name one target: p, at_most": {"p": 0.5, "at_most": 6.0},
    "leaves one part empty": {"epsilon": 0.1, "calibration_share": 1.0},
    "unknown confidence measure 'luck'": {"p": 0.5, "measure": "luck"},
    "unknown risk 'regret'": {"p": 0.5, "risk": "regret"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    with pytest.raises(UserError, match=message):
        fit_policy(LOGITS, LABELS, COSTS, **MISTAKES[message])


def test_logits_that_are_not_finite_are_refused_by_exit():
    logits = LOGITS.copy()
    logits[1, [5, 9], 0] = np.nan, np.inf
    message = "exit 2 gives logits that are not finite for 2 of 601 examples, the first.* number 6"
    for target in ({"at_most": 6.0}, {"p": 1.0}, {"epsilon": 0.4}):
        with pytest.raises(UserError, match=message):
            fit_policy(logits, LABELS, COSTS, **target)


@pytest.mark.parametrize(("n", "is_few"), [(30, True), (601, False)])
def test_few_examples_are_told_with_an_interval(n, is_few):
    fitted = fit_policy(LOGITS[:, :n], LABELS[:n], COSTS, at_most=6.0)
    low, high = fitted.policy.fitted_on["fitted_risk_interval"]
    assert low <= fitted.point.risk <= high
    warning = few_examples_warning(fitted.policy)
    assert (warning is not None) == is_few
    if warning is not None:
        assert "fitted on 30 examples" in warning


def test_every_exit_unsure_alike_or_a_class_missing():
    """All confidences are equal, so that all examples exit together."""
    flat = np.zeros((EXITS, 40, CLASSES), np.float32)
    labels = np.zeros(40, int)
    fitted = fit_policy(flat, labels, COSTS, at_most=COSTS[0])
    assert outcome(fitted.policy, flat, labels, COSTS).cost == COSTS[0]
