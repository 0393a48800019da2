"""Thresholds with a guarantee: risk at most epsilon with probability at least 1 - delta.

Learn-then-Test: for every policy of a curve, the hypothesis "its true risk exceeds epsilon" is
tested on calibration data that nothing was fitted on. The p-value is the exact binomial tail: with
m mistakes in n examples,

    p = P(Binomial(n, epsilon) <= m).

Policies are tested in a fixed order, by their risk on the fitting data, safest first, each at level
delta, until the first hypothesis that is not rejected. The fixed order makes a correction for the
number of policies unnecessary: the probability that any policy with a risk above epsilon is
accepted is at most delta.

Reference: Angelopoulos et al., "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.thresholds import OperatingPoint, mistakes
from dfs_jax.types import UserError


class Certificate(NamedTuple):
    """Outcome of the tests.

    Attributes:
      point: cheapest policy that qualified, with its results on the fitting data; None if none
        did.
      covers_last_exit: whether using the last exit alone qualified too.
      epsilon: bound on the true risk, a fraction.
      delta: probability, over calibration sets, that the bound fails.
      risk: kind of risk, "error" or "disagreement".
      examples: number of calibration examples.
      p_values: p-values of the tested policies, in order; the test stops at the first failure.
    """

    point: OperatingPoint | None
    covers_last_exit: bool
    epsilon: float
    delta: float
    risk: str
    examples: int
    p_values: tuple[float, ...]

    def describe(self) -> str:
        """Describes the outcome in one sentence."""
        terms = (
            f"a risk ({self.risk}) of at most {self.epsilon:g} with confidence {1 - self.delta:g}"
        )
        if self.point is None:
            return (
                f"no policy qualifies: {terms} cannot be shown on {self.examples} examples, "
                f"not even for the safest (p-value {self.p_values[0]:.2g})"
            )
        return f"{terms}, shown on {self.examples} examples for {len(self.p_values)} policies"


def binomial_p_value(bad: int, n: int, epsilon: float) -> float:
    """Returns P(Binomial(n, epsilon) <= bad), the probability of so few mistakes at risk epsilon.

    >>> round(binomial_p_value(0, 10, 0.5), 6) == round(0.5**10, 6)
    True
    """
    return float(bdtr(bad, n, epsilon))


def certify(
    curve: Sequence[OperatingPoint],
    calibration: ExitPredictions,
    *,
    epsilon: float,
    delta: float,
    risk: str = "error",
) -> Certificate:
    """Returns the cheapest policy of a curve that is shown to have a risk of at most epsilon.

    Its true risk is at most epsilon with probability at least 1 - delta over calibration samples.

    Args:
      curve: `operating_curve` of a fitting set, which also gave the temperatures.
      calibration: predictions for examples that nothing was fitted on, from the distribution of
        future examples, with the same measure and temperatures.
      epsilon: bound on the risk, a fraction in (0, 1).
      delta: probability that the guarantee fails, in (0, 1).
      risk: kind of risk: "error" (a wrong label) or "disagreement" with the last exit, which needs
        no labels.

    Raises:
      UserError: epsilon or delta out of range, an unknown risk, no examples.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise UserError(f"{name} must lie between 0 and 1, got {value!r}")
    bad = mistakes(calibration, risk)
    n = bad.shape[1]
    if not n:
        raise UserError("a guarantee cannot be had from 0 examples")
    confidence = np.asarray(calibration.confidence)
    qualified, p_values = [], []
    for point in _in_order(curve):
        taken = Policy(point.thresholds).exits(confidence)
        p_values.append(binomial_p_value(bad[taken, np.arange(n)].sum(), n, epsilon))
        if p_values[-1] > delta:
            break
        qualified.append(point)
    return Certificate(
        point=min(qualified, key=lambda point: point.cost, default=None),
        covers_last_exit=any(_is_last_exit_only(point) for point in qualified),
        epsilon=epsilon,
        delta=delta,
        risk=risk,
        examples=n,
        p_values=tuple(p_values),
    )


def _in_order(curve: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Returns the points to test, safest first: none dearer than the safest but the last exit."""
    safest = min(curve, key=lambda point: (point.risk, point.cost))
    worth = [p for p in curve if p.cost <= safest.cost or _is_last_exit_only(p)]
    return sorted(worth, key=lambda point: (point.risk, -point.cost))


def _is_last_exit_only(point: OperatingPoint) -> bool:
    return all(threshold is None for threshold in point.thresholds)
