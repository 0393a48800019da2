"""Fits a policy to recorded logits: temperatures, thresholds and, on request, a guarantee."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dfs_jax.exits.confidence import ExitPredictions, exit_predictions
from dfs_jax.exits.scores import MEASURES, Measure
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.risk import Certificate, certify
from dfs_jax.inference.temperature import fit_temperatures
from dfs_jax.inference.thresholds import (
    OperatingPoint,
    mistakes,
    operating_curve,
    point_for_budget,
    point_for_cost,
)
from dfs_jax.types import UserError

_Z = 1.959964  # 97.5 % quantile of the normal distribution
WIDEST_INTERVAL = 0.1  # of a risk, as a fraction; 380 examples or more always suffice


class FittedPolicy(NamedTuple):
    """A policy and its results on the data it was fitted on.

    Attributes:
      policy: the policy; its `fitted_on` holds all results as plain data.
      point: risk, mean cost and exits on the fitting data.
      certificate: outcome of the tests, if a guarantee was requested.
    """

    policy: Policy
    point: OperatingPoint
    certificate: Certificate | None = None


class PolicyOutcome(NamedTuple):
    """Results of a policy on a set of examples: fractions, and a mean cost in the costs' unit."""

    accuracy: float
    disagreement: float
    cost: float
    exit_shares: tuple[float, ...]


def fit_policy(
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Sequence[float],
    *,
    p: float | None = None,
    at_most: float | None = None,
    epsilon: float | None = None,
    delta: float = 0.1,
    risk: str = "error",
    measure: str = "max_softmax",
    scale_temperatures: bool = True,
    calibration_share: float = 0.5,
    seed: int = 0,
) -> FittedPolicy:
    """Fits a policy to one target: `p`, `at_most` or `epsilon`.

    Args:
      logits: logits `[exits, n, classes]` of examples that the network was not trained on.
      labels: integer labels, `[n]`.
      costs: cost of the network up to and including each exit.
      p: parameter of budgeted batch classification (see `dfs_jax.inference.budgeted`).
      at_most: largest mean cost, in the unit of the costs.
      epsilon: bound on the risk, a fraction. The result is the cheapest policy that is shown to
        satisfy it on calibration examples that nothing else is fitted on.
      delta: probability that the guarantee fails.
      risk: kind of risk, "error" or "disagreement" with the last exit.
      measure: name of the measure of confidence.
      scale_temperatures: whether the temperatures are fitted first; otherwise they are 1.
      calibration_share: fraction of the examples used for calibration, with epsilon.
      seed: random seed of the calibration split.

    Raises:
      UserError: no target or several, logits that are not finite, a value out of range, a target
        that cannot be met, or no policy that qualifies.
    """
    if sum(target is not None for target in (p, at_most, epsilon)) != 1:
        raise UserError("name one target: p, at_most or epsilon")
    check_logits(logits)
    fitting, calibration = np.arange(len(labels)), np.arange(0)
    if epsilon is not None:
        fitting, calibration = split_for_calibration(len(labels), calibration_share, seed)
    temperatures = (1.0,) * len(logits)
    if scale_temperatures:
        temperatures = fit_temperatures(logits[:, fitting], labels[fitting])
    predict = functools.partial(predictions_of, measure=measure, temperatures=temperatures)
    predictions = predict(logits[:, fitting], labels[fitting])
    certificate = None
    if p is not None:
        point = point_for_budget(predictions, costs, p, risk=risk)
    elif at_most is not None:
        point = point_for_cost(predictions, costs, at_most, risk=risk)
    else:
        assert epsilon is not None
        held_out = predict(logits[:, calibration], labels[calibration])
        curve = operating_curve(predictions, costs, risk=risk)
        certificate = certify(curve, held_out, epsilon=epsilon, delta=delta, risk=risk)
        if certificate.point is None:
            raise UserError(certificate.describe())
        point = certificate.point
    policy = Policy(
        thresholds=point.thresholds,
        measure=measure,
        temperatures=temperatures,
        exit_shares=point.exit_shares,
        falls_back=certificate is None or certificate.covers_last_exit,
        fitted_on={
            "examples": len(fitting),
            "risk": risk,
            "fitted_risk": point.risk,
            "fitted_risk_interval": list(risk_interval(point.risk, len(fitting))),
            "fitted_cost": point.cost,
            "guarantee": None if certificate is None else _guarantee(certificate, seed),
        },
    )
    return FittedPolicy(policy, point, certificate)


def check_logits(logits: np.ndarray) -> None:
    """Raises UserError if a logit of `logits` `[exits, n, classes]` is not finite.

    Neither temperatures nor thresholds can be fitted to such an exit.
    """
    bad = np.logical_not(np.all(np.isfinite(logits), axis=2))
    if not np.any(bad):
        return
    exit_index = int(np.argmax(np.any(bad, axis=1)))
    example, count = int(np.argmax(bad[exit_index])), int(np.sum(bad[exit_index]))
    raise UserError(
        f"exit {exit_index + 1} gives logits that are not finite for {count} of {len(bad[0])} "
        f"examples, the first of them number {example + 1}: a policy cannot be fitted to this "
        f"checkpoint; look at these examples, or choose an earlier checkpoint"
    )


def risk_interval(risk: float, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of a risk that was estimated on n examples.

    >>> low, high = risk_interval(0.1, 100)
    >>> round(low, 3), round(high, 3)
    (0.055, 0.174)
    """
    centre = (risk + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(risk * (1 - risk) / n + _Z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def few_examples_warning(policy: Policy) -> str | None:
    """Returns a warning if a policy was fitted on too few examples to be reliable, else None.

    There are too few if the 95 % interval of the risk is wider than 10 percentage points.
    """
    low, high = policy.fitted_on["fitted_risk_interval"]
    if high - low <= WIDEST_INTERVAL:
        return None
    return (
        f"warning: the policy was fitted on {policy.fitted_on['examples']} examples, on which its "
        f"risk is known only to lie between {100 * low:.1f} and {100 * high:.1f} % (95 % "
        f"interval): hold out more with data.validation_examples"
    )


def split_for_calibration(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits n examples at random; returns the indices of both parts, the second a given fraction.

    Raises:
      UserError: one of the parts would be empty.

    Example:
      >>> [len(part) for part in split_for_calibration(50, 0.1, seed=0)]
      [45, 5]
    """
    order = np.random.default_rng(seed).permutation(n)
    kept = round(share * n)
    if not 0 < kept < n:
        raise UserError(f"a calibration share of {share:g} of {n} examples leaves one part empty")
    return order[kept:], order[:kept]


def predictions_of(
    logits: np.ndarray, labels: np.ndarray, *, measure: str, temperatures: Sequence[float]
) -> ExitPredictions:
    """Returns the exits' predictions and confidences on the host (see `exit_predictions`)."""
    scales = np.asarray(temperatures, np.float32)
    return jax.device_get(_predict(logits, labels, scales, measure=MEASURES.resolve(measure)))


@functools.partial(jax.jit, static_argnames="measure")
def _predict(
    logits: jax.Array, labels: jax.Array, temperatures: jax.Array, *, measure: Measure
) -> ExitPredictions:
    return exit_predictions(logits, labels, measure=measure, temperatures=temperatures)


def outcome(
    policy: Policy, logits: np.ndarray, labels: np.ndarray, costs: Sequence[float]
) -> PolicyOutcome:
    """Returns a policy's results on recorded logits `[exits, n, classes]`."""
    predictions = _predictions_for(policy, logits, labels)
    taken = policy.exits(np.asarray(predictions.confidence))
    each = np.arange(len(taken))
    shares = np.bincount(taken, minlength=policy.num_exits) / len(taken)
    return PolicyOutcome(
        accuracy=1 - float(mistakes(predictions, "error")[taken, each].mean()),
        disagreement=float(mistakes(predictions, "disagreement")[taken, each].mean()),
        cost=float(shares @ np.asarray(costs)),
        exit_shares=tuple(shares.tolist()),
    )


def exits_taken(policy: Policy, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the exits (0-based, `[n]`) that a policy takes on recorded logits."""
    return policy.exits(np.asarray(_predictions_for(policy, logits, labels).confidence))


def _predictions_for(policy: Policy, logits: np.ndarray, labels: np.ndarray) -> ExitPredictions:
    return predictions_of(logits, labels, measure=policy.measure, temperatures=policy.temperatures)


def _guarantee(certificate: Certificate, seed: int) -> dict[str, float]:
    return {
        "epsilon": certificate.epsilon,
        "delta": certificate.delta,
        "examples": certificate.examples,
        "seed": seed,
    }
