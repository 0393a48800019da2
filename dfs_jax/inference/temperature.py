"""Temperature scaling: one number for each exit that calibrates its probabilities.

Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq

# Bounds: the temperature of a perfect exit is 0, that of an uninformative one infinite.
COLDEST, HOTTEST = 0.05, 20.0


def fit_temperatures(logits: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """Returns each exit's temperature T, which minimises its cross-entropy.

        T = argmin mean_n -log softmax(z_n / T)[y_n]

    The cross-entropy is convex in 1 / T, and the zero of its derivative,

        mean_n (sum_c p_c z_nc - z_n,y_n),   p = softmax(z_n / T),

    is bracketed between T = 0.05 and T = 20. Examples with a logit that is not finite are omitted.

    Args:
      logits: logits `[exits, n, classes]` of data that the network was not trained on.
      labels: integer labels, `[n]`.

    Raises:
      ValueError: other shapes, or no example with finite logits.

    Example: an exit that gives class 0 odds of e^2 and is right half of the time.
      >>> fit_temperatures(np.array([[[2.0, 0.0]] * 2]), np.array([0, 1]))
      (20.0,)
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(
            f"logits must be [exits, n, classes] and labels [n], got {logits.shape} and "
            f"{labels.shape}"
        )
    return tuple(_fit_one(exit_logits.astype(np.float64), labels) for exit_logits in logits)


def _fit_one(logits: np.ndarray, labels: np.ndarray) -> float:
    finite = np.isfinite(logits).all(axis=1)
    logits, labels = logits[finite], labels[finite]
    if not len(labels):
        raise ValueError("a temperature needs at least 1 example with finite logits")
    logits = logits - logits.max(axis=1, keepdims=True)
    told = logits[np.arange(len(labels)), labels].mean()

    def slope(log_beta: float) -> float:
        weights = np.exp(logits * math.exp(log_beta))
        expected = (weights * logits).sum(axis=1) / weights.sum(axis=1)
        return float(expected.mean() - told)

    low, high = -math.log(HOTTEST), -math.log(COLDEST)
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COLDEST
    return math.exp(-float(brentq(slope, low, high, xtol=1e-9)))  # type: ignore[arg-type]
