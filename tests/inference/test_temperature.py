"""Temperature scaling: against a fine grid, by hand, and at its bounds."""

import numpy as np
import pytest

from dfs_jax.inference.temperature import COLDEST, HOTTEST, fit_temperatures

EXITS, EXAMPLES, CLASSES = 3, 211, 5


def cross_entropy(logits, labels, temperature):
    scaled = logits.astype(np.float64) / temperature
    log_sums = np.log(np.exp(scaled).sum(-1))
    return np.mean(log_sums - scaled[np.arange(len(labels)), labels])


def draw(sharpness):
    """Labels drawn from the softmax of logits, which are then multiplied by `sharpness`."""
    rng = np.random.default_rng(5)
    logits = 2 * rng.standard_normal((EXITS, EXAMPLES, CLASSES))
    gumbel = rng.gumbel(size=(EXAMPLES, CLASSES))
    labels = (logits[0] + gumbel).argmax(-1)
    return logits * np.array(sharpness)[:, None, None], labels


def test_no_temperature_of_a_fine_grid_is_better():
    logits, labels = draw((1.0, 0.3, 4.0))
    for exit_logits, temperature in zip(logits, fit_temperatures(logits, labels), strict=True):
        grid = np.geomspace(COLDEST, HOTTEST, 2001)
        losses = [cross_entropy(exit_logits, labels, t) for t in grid]
        assert cross_entropy(exit_logits, labels, temperature) <= min(losses)
        assert abs(np.log(temperature / grid[np.argmin(losses)])) < 0.01


def test_what_was_told_too_surely_is_found():
    logits, labels = draw((1.0, 1.0, 1.0))
    (honest, *_), (sharp, *_) = (fit_temperatures(s * logits, labels) for s in (1, 3))
    assert honest == pytest.approx(1, abs=0.2)
    assert sharp == pytest.approx(3 * honest, rel=1e-6)


def test_by_hand():
    # Odds of e^z : 1 for an answer that is right 3 times of 4: log 3 = z / T.
    logits = np.array([[[2.0, 0.0]] * 4])
    assert fit_temperatures(logits, [0, 0, 0, 1]) == pytest.approx((2 / np.log(3),))


def test_bounds_and_what_is_no_number():
    logits, labels = np.array([[[2.0, 0.0], [0.0, 2.0], [np.nan, 0.0]]]), np.array([0, 1, 1])
    assert fit_temperatures(logits, labels) == (COLDEST,)
    assert fit_temperatures(logits, 1 - labels) == (HOTTEST,)
    huge = np.array([[[1e30, 0.0], [0.0, 1e30]]])
    assert fit_temperatures(huge, np.array([0, 0])) == (HOTTEST,)
    with pytest.raises(ValueError, match="at least 1 example"):
        fit_temperatures(np.full((1, 2, 3), np.nan), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        fit_temperatures(np.zeros((2, 3)), np.zeros(3, int))
