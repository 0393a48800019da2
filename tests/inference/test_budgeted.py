"""Budgeted batch: golden numbers, a slow loop as reference, ties, edges and speed."""

import math
import time

import numpy as np
import pytest

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.budgeted import (
    DEFAULT_BUDGETS,
    budgeted_curve,
    choose_thresholds,
    exit_distribution,
)
from dfs_jax.inference.policy import EVERYBODY, NOBODY, apply_thresholds


def predictions_of(probabilities, labels):
    return ExitPredictions(
        confidence=probabilities.max(axis=2),
        predicted=probabilities.argmax(axis=2),
        ensemble=probabilities.mean(axis=0).argmax(axis=1),
        loss=np.zeros(probabilities.shape[:2]),
        labels=labels,
    )


def random_predictions(seed, exits, n, levels=None, classes=3):
    """Predictions whose confidences take few values (many ties) where `levels` is given."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((exits, n), dtype=np.float32)
    if levels is not None:
        confidence = np.ceil(confidence * levels) / np.float32(levels)
    predicted = rng.integers(0, classes, (exits, n))
    return ExitPredictions(confidence, predicted, predicted[0], None, rng.integers(0, classes, n))


def slow_thresholds(confidence, p):
    """The procedure in words, one example at a time."""
    exits, n = confidence.shape
    weights = [p**k for k in range(1, exits + 1)]
    answered = [False] * n
    thresholds = []
    for k in range(exits - 1):
        wanted = math.floor(n * (weights[k] / sum(weights)))
        threshold, seen = NOBODY, 0
        for example in sorted(range(n), key=lambda i: -confidence[k][i]):
            if answered[example]:
                continue
            seen += 1
            if seen == wanted:
                threshold = float(confidence[k][example])
                break
        thresholds.append(threshold)
        for example in range(n):
            if confidence[k][example] >= threshold:
                answered[example] = True
    return [*thresholds, EVERYBODY]


def slow_evaluation(test, thresholds, costs):
    right, operations = 0, 0
    n = test.num_examples
    for example in range(n):
        for k in range(len(costs)):
            if k == len(costs) - 1 or test.confidence[k][example] >= thresholds[k]:
                right += int(test.predicted[k][example] == test.labels[example])
                operations += costs[k]
                break
    return right / n, operations / n


@pytest.mark.parametrize("part", ["val", "test"])
def test_golden_budgets(shared_dir, part):
    golden = np.load(shared_dir / "golden" / "budgeted_batch.npz")
    sets = {
        name: predictions_of(golden[f"{name}_probs"], golden[f"{name}_labels"])
        for name in ("val", "test")
    }
    assert golden["p"].tolist() == list(DEFAULT_BUDGETS)
    curve = budgeted_curve(sets["val"], sets[part], golden["flops"])
    thresholds = np.array([point.thresholds for point in curve])
    np.testing.assert_array_equal(thresholds, golden["thresholds"])
    n = sets[part].num_examples
    for point, percent, flops in zip(
        curve, golden[f"{part}_acc"], golden[f"{part}_flops"], strict=True
    ):
        assert round(point.accuracy * n) == round(percent / 100 * n)
        assert point.accuracy * 100 == pytest.approx(percent, rel=1e-14)
        assert point.macs == pytest.approx(flops, rel=1e-6)


@pytest.mark.parametrize("levels", [None, 1, 3, 11])
@pytest.mark.parametrize(("exits", "n"), [(2, 1), (2, 23), (5, 61), (7, 140)])
def test_equals_the_slow_loop(exits, n, levels):
    validation = random_predictions(1, exits, n, levels)
    test = random_predictions(2, exits, n + 5, levels)
    costs = [3, 5, 11, 13, 17, 19, 23][:exits]
    ps = (0.05, 0.3, 0.5, 0.95, 1.0, 1.5, 2.0)
    curve = budgeted_curve(validation, test, costs, ps)
    assert [point.p for point in curve] == list(ps)
    for point in curve:
        expected = slow_thresholds(validation.confidence, point.p)
        assert list(point.thresholds) == expected
        accuracy, macs = slow_evaluation(test, expected, costs)
        assert point.accuracy == accuracy
        assert point.macs == pytest.approx(macs, rel=1e-14)


def test_by_hand():
    # p = 1 asks each of two exits for floor(4 / 2) = 2: the second best of the first exit is 0.7.
    confidence = np.array([[0.9, 0.2, 0.7, 0.4], [0.5, 0.5, 0.5, 0.5]])
    assert choose_thresholds(confidence, 1.0).tolist() == [0.7, EVERYBODY]
    assert apply_thresholds(confidence, [0.7, EVERYBODY]).tolist() == [0, 1, 0, 1]
    predicted = np.array([[1, 1, 0, 1], [0, 1, 1, 0]])
    p = ExitPredictions(confidence, predicted, predicted[0], None, np.array([1, 1, 1, 1]))
    (point,) = budgeted_curve(p, p, [10, 30], [1.0])
    assert point == (1.0, (0.7, EVERYBODY), 0.5, 20.0)


def test_ties_are_answered_together_and_leave_fewer_for_later_exits():
    # Each exit is to answer 2 of 6. Five tie at the first, so one is left for the second: too few.
    confidence = np.array([[0.8, 0.8, 0.8, 0.8, 0.8, 0.1], [0.9] * 6, [0.9] * 6])
    thresholds = choose_thresholds(confidence, 1.0)
    assert thresholds.tolist() == [0.8, NOBODY, EVERYBODY]
    assert apply_thresholds(confidence, thresholds).tolist() == [0, 0, 0, 0, 0, 2]


def test_only_unanswered_examples_are_ranked():
    # The first exit takes example 0, which is also the second exit's best.
    confidence = np.array([[0.9, 0.1, 0.1], [0.9, 0.5, 0.3], [1, 1, 1]])
    assert choose_thresholds(confidence, 1.0).tolist() == [0.9, 0.5, EVERYBODY]


def test_a_share_below_one_example_answers_nobody():
    # floor(3 * 0.05 / 1.05...) = 0 at the second exit.
    confidence = np.full((3, 3), 0.5)
    confidence[0] = [0.9, 0.8, 0.7]
    assert choose_thresholds(confidence, 0.05).tolist() == [0.8, NOBODY, EVERYBODY]


def test_example_order_does_not_matter():
    p = random_predictions(5, 5, 83, levels=9)
    order = np.random.default_rng(0).permutation(83)
    np.testing.assert_array_equal(
        choose_thresholds(p.confidence[:, order], DEFAULT_BUDGETS),
        choose_thresholds(p.confidence, DEFAULT_BUDGETS),
    )


def test_without_ties_each_exit_answers_its_share():
    p = random_predictions(3, 5, 997)
    for parameter in DEFAULT_BUDGETS:
        taken = apply_thresholds(p.confidence, choose_thresholds(p.confidence, parameter))
        shares = np.floor(997 * exit_distribution(parameter, 5)).astype(int)
        counts = np.bincount(taken, minlength=5)
        # A later exit can also find an earlier one's examples above its own threshold: not its own.
        assert counts[:-1].tolist() == shares[:-1].tolist()
        assert counts.sum() == 997


def test_larger_p_spends_more():
    p = random_predictions(4, 7, 1013)
    macs = [point.macs for point in budgeted_curve(p, p, range(1, 8))]
    assert macs == sorted(macs)
    assert macs[0] < 1.2
    assert macs[-1] > 5.5


def test_not_a_number_is_never_confident():
    confidence = np.array([[np.nan, 0.4, 0.6, np.nan], [np.nan, 0.1, 0.1, 0.1]], np.float32)
    thresholds = choose_thresholds(confidence, 1.0)
    np.testing.assert_array_equal(thresholds, np.array([0.4, EVERYBODY], np.float32))
    assert apply_thresholds(confidence, thresholds).tolist() == [1, 0, 0, 1]
    nobody = choose_thresholds(np.full((2, 4), np.nan), 1.0)
    assert nobody.tolist() == [NOBODY, EVERYBODY]


def test_one_exit_answers_all():
    confidence = np.array([[0.3, 0.4]])
    assert choose_thresholds(confidence, 0.5).tolist() == [EVERYBODY]
    assert apply_thresholds(confidence, [EVERYBODY]).tolist() == [0, 0]


def test_exit_distribution():
    np.testing.assert_allclose(exit_distribution(2.0, 3), [2 / 14, 4 / 14, 8 / 14], rtol=1e-15)
    for p in DEFAULT_BUDGETS:
        assert exit_distribution(p, 13).sum() == pytest.approx(1, rel=1e-14)
    np.testing.assert_array_equal(exit_distribution(1, 7) * 7, np.ones(7))


def test_default_budgets_are_the_decimals():
    assert [f"{p:.2f}" for p in DEFAULT_BUDGETS[:3]] == ["0.05", "0.10", "0.15"]
    assert DEFAULT_BUDGETS[2] == 0.15
    assert (len(DEFAULT_BUDGETS), DEFAULT_BUDGETS[-1]) == (40, 2.0)


@pytest.mark.parametrize("p", [0, -0.5, float("inf"), float("nan")])
def test_refuses_a_bad_p(p):
    with pytest.raises(ValueError, match="above 0"):
        exit_distribution(p, 3)


def test_refuses_what_does_not_fit():
    p = random_predictions(0, 3, 5)
    with pytest.raises(ValueError, match="3, 3 and 2 exits"):
        budgeted_curve(p, p, [1, 2])
    with pytest.raises(ValueError, match="3 exits take 3 thresholds, got 2"):
        apply_thresholds(p.confidence, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"\[exits, examples\]"):
        choose_thresholds(np.zeros((3, 0)), 1.0)
    with pytest.raises(ValueError, match="at least 1 exit"):
        exit_distribution(1.0, 0)
    empty = random_predictions(0, 3, 0)
    with pytest.raises(ValueError, match="0 examples"):
        budgeted_curve(p, empty, [1, 2, 3])


@pytest.mark.slow
def test_a_million_examples_take_seconds():
    p = random_predictions(0, 7, 1_000_000)
    begin = time.perf_counter()
    budgeted_curve(p, p, range(1, 8))
    assert time.perf_counter() - begin < 10
