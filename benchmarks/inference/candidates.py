"""Candidates of the inference benchmark: the whole network, its exits, and policies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from absl import logging

from dfs_jax.costs.flops import exit_costs
from dfs_jax.inference import policy as policies
from dfs_jax.inference.fitting import PolicyOutcome, exits_taken, fit_policy, outcome
from dfs_jax.inference.policy import Policy, last_exit_only
from dfs_jax.inference.trained import StagedRun
from dfs_jax.types import UserError

LOSSES = (0.0, 0.01)  # of an oracle's accuracy, fractions
SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


class Candidate(NamedTuple):
    """A policy to measure, or the network up to one exit.

    Attributes:
      name: name of the row.
      policy: early-exit policy; for the network up to exit K, all examples exit there.
      exit_index: that exit, 0-based; None for a policy.
      result: results on the whole test split.
      taken: exits (0-based) of the examples that may be timed, `[n]`.
      oracles: exits of the whole test split by the accuracy that is lost (see `oracle_exits`);
        empty but for the whole network.
    """

    name: str
    policy: Policy
    exit_index: int | None
    result: PolicyOutcome
    taken: np.ndarray
    oracles: Mapping[float, np.ndarray] = MappingProxyType({})

    def shares(self, n: int) -> tuple[float, ...]:
        """Returns the fraction of the first n examples that each exit answers."""
        counts = np.bincount(self.taken[:n], minlength=self.policy.num_exits)
        return tuple((counts / n).tolist())


def find_candidates(
    staged: StagedRun,
    own: Policy | None,
    measure: str,
    timed: int,
    *,
    with_exits: bool = True,
    with_policies: bool = True,
) -> list[Candidate]:
    """Returns the whole network, every exit, policies of fewer operations, and the run's policy.

    Policies are fitted on validation data, if they are available; results are on the test split.

    Args:
      staged: checkpoint of the run.
      own: policy of the run, if it has one.
      measure: confidence measure of the other policies.
      timed: number of test examples, from the first, that may be timed.
      with_exits: whether the network up to each exit is a candidate.
      with_policies: whether policies are candidates, its own included.
    """
    macs = macs_of(staged)
    last = len(macs) - 1
    logits, labels = staged.logits("test")

    def candidate(name: str, policy: Policy, exit_index: int | None = None) -> Candidate:
        taken = exits_taken(policy, logits[:, :timed], labels[:timed])
        return Candidate(name, policy, exit_index, outcome(policy, logits, labels, macs), taken)

    def at_exit(k: int) -> Policy:
        return Policy((*[None] * k, *[policies.EVERYBODY] * (last - k)))

    whole = candidate("full", last_exit_only(last + 1), last)
    found = [whole._replace(oracles={x: oracle_exits(logits, labels, x) for x in LOSSES})]
    if with_exits:
        found += [candidate(f"exit {k + 1}", at_exit(k), k) for k in range(last)]
    if not with_policies:
        return found
    found.append(candidate("no early exit", last_exit_only(last + 1)))
    try:
        validation = staged.logits(staged.experiment.score_split)
    except UserError as error:
        logging.warning("no policies are fitted: %s", error)
        validation = None
    for speedup in SPEEDUPS:
        if validation is not None and macs[-1] / speedup > macs[0]:
            fitted = fit_policy(*validation, macs, at_most=macs[-1] / speedup, measure=measure)
            found.append(candidate(f"{speedup:g}x", fitted.policy))
    return found if own is None else [*found, candidate(policies.FILE, own)]


def oracle_exits(logits: np.ndarray, labels: np.ndarray, loss: float = 0.0) -> np.ndarray:
    """Returns the earliest exits of a given accuracy, which somebody takes who knows the labels.

    No policy of that accuracy costs less: of the examples that some exit gets right, those where it
    is early leave there, as many as must be right, and all others leave at the first exit.

    Args:
      logits: logits `[exits, n, classes]`.
      labels: classes `[n]`.
      loss: accuracy that may be lost against the last exit, a fraction.

    Returns:
      Exits, 0-based, `[n]`.

    Example: three examples of class 1, of which the second is answered right from exit 2 on, and
    the third by no exit.
      >>> logits = np.array([[[0, 1], [1, 0], [1, 0]], [[0, 1], [0, 1], [1, 0]]])
      >>> oracle_exits(logits, np.array([1, 1, 1])).tolist()
      [0, 1, 0]
    """
    right = logits.argmax(axis=-1) == labels
    first = np.where(right.any(axis=0), right.argmax(axis=0), len(right))
    needed = max(0, math.ceil(right[-1].sum() - loss * len(labels) - 1e-9))
    taken = np.zeros(len(labels), int)
    earliest = np.argsort(first, kind="stable")[:needed]
    taken[earliest] = first[earliest]
    return taken


def macs_of(staged: StagedRun) -> tuple[float, ...]:
    """Returns the multiply-adds of one image up to each exit."""
    costs = exit_costs(staged.experiment.model, staged.experiment.dataset.image_shape)
    return tuple(float(cost.macs) for cost in costs)
