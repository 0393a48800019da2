"""Thresholds with a guarantee: the cheapest whose risk is at most epsilon, but for bad luck delta.

Learn-then-Test: every policy of a curve is a hypothesis "its true risk exceeds epsilon", tested on
calibration data that nothing was fitted on. The p-value is the exact binomial tail: with n examples
of which m were answered badly,

    p = P(Binomial(n, epsilon) <= m).

They are tested in a fixed order, by their risk on the fitting data, safest first, each at level
delta, until the first that is not rejected. So no correction for their number is needed: the chance
that any policy with a risk above epsilon is accepted is at most delta.

Reference: Angelopoulos et al., "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from dfs_jax.inference.confidence import ExitPredictions
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.thresholds import OperatingPoint, mistakes
from dfs_jax.types import UserError


class Certificate(NamedTuple):
    """The outcome of the tests.

    Attributes:
      point: the cheapest point that qualified, with what it gave on the fitting data; None where
        none did.
      covers_last_exit: whether the last exit alone qualified too.
      epsilon: what its risk stays below, a fraction, for all but a share delta of calibration sets.
      delta: see epsilon.
      risk: "error" or "disagreement".
      examples: how many it was calibrated on.
      p_values: of the policies in the order in which they were tested, the first that failed last.
    """

    point: OperatingPoint | None
    covers_last_exit: bool
    epsilon: float
    delta: float
    risk: str
    examples: int
    p_values: tuple[float, ...]

    def describe(self) -> str:
        """Says in one sentence what was found."""
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
    """Returns P(Binomial(n, epsilon) <= bad): how likely so few mistakes are at a risk of epsilon.

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
    """Returns the cheapest policy of a curve whose risk is at most epsilon, but for bad luck delta.

    Args:
      curve: `operating_curve` of a fitting set, which also gave the temperatures.
      calibration: predictions of examples that nothing was fitted on, drawn like those to come; the
        same measure and temperatures.
      epsilon: the risk that is allowed, a fraction in (0, 1).
      delta: the chance of a calibration set that misleads, in (0, 1).
      risk: "error" (the label is missed) or "disagreement" (with the last exit, which needs no
        labels).

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
    """Returns the points worth a test, safest first: not those dearer and riskier than another."""
    safest = min(curve, key=lambda point: (point.risk, point.cost))
    worth = [p for p in curve if p.cost <= safest.cost or _is_last_exit_only(p)]
    return sorted(worth, key=lambda point: (point.risk, -point.cost))


def _is_last_exit_only(point: OperatingPoint) -> bool:
    return all(threshold is None for threshold in point.thresholds)
