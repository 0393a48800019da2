"""Counts how often a guarantee of `dfs_jax.inference.choose` fails, on a run's test images.

    python -m benchmarks.guarantee --workdir=DIR --epsilon=0.4 --delta=0.1

Temperatures and the curve of policies come from the validation split, once. Each random split then
calibrates on a small fraction of the test images; the risk of the resulting policy on the rest
stands for its true risk. (With a large fraction the two would be dependent: a lucky calibration set
leaves the unlucky images to the rest.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from absl import flags

from dfs_jax import program
from dfs_jax.costs.flops import exit_costs
from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.fitting import predictions_of, split_for_calibration
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.risk import certify
from dfs_jax.inference.temperature import fit_temperatures
from dfs_jax.inference.thresholds import OperatingPoint, mistakes, operating_curve
from dfs_jax.inference.trained import load_staged
from dfs_jax.paths import input_directory


class Tally(NamedTuple):
    """Results of many calibrations.

    Attributes:
      draws: number of random splits.
      qualified: number of splits for which a policy qualified.
      violations: number of these whose risk exceeds the bound.
      cost: mean cost of the qualified policies, as a fraction of the last exit's cost.
    """

    draws: int
    qualified: int
    violations: int
    cost: float


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of the data, if it has moved.")
    epsilon = flags.DEFINE_float("epsilon", None, "Bound on the risk.", required=True)
    delta = flags.DEFINE_float("delta", 0.1, "Probability that the guarantee fails.")
    risk = flags.DEFINE_string("risk", "error", "error, or disagreement with the last exit.")
    share = flags.DEFINE_float("share", 0.05, "Fraction of the test split for calibration.")
    draws = flags.DEFINE_integer("draws", 1000, "Number of random splits.")

    def run() -> None:
        program.use_compilation_cache()
        root = input_directory(workdir.value, "--workdir")
        staged = load_staged(root, data_dir=data_dir.value)
        logits, labels = staged.logits(staged.experiment.score_split)
        temperatures = fit_temperatures(logits, labels)
        options = {"measure": "max_softmax", "temperatures": temperatures}
        costs = exit_costs(staged.experiment.model, staged.experiment.dataset.image_shape)
        macs = [float(cost.macs) for cost in costs]
        curve = operating_curve(predictions_of(logits, labels, **options), macs, risk=risk.value)
        pool = predictions_of(*staged.logits("test"), **options)
        found = tally(
            curve,
            pool,
            epsilon=epsilon.value,
            delta=delta.value,
            risk=risk.value,
            share=share.value,
            draws=draws.value,
        )
        program.say(
            f"{found.violations} violations in {found.draws} draws "
            f"({100 * found.violations / found.draws:.1f} %, allowed {100 * delta.value:g} %); "
            f"{found.qualified} found a policy, at {100 * found.cost / macs[-1]:.1f} % of the "
            f"full network's operations on average"
        )

    program.run(run)


def tally(
    curve: list[OperatingPoint],
    pool: ExitPredictions,
    *,
    epsilon: float,
    delta: float,
    risk: str,
    share: float,
    draws: int,
) -> Tally:
    """Returns the results of `draws` calibrations on part of the pool, each tested on the rest."""
    bad, confidence = mistakes(pool, risk), np.asarray(pool.confidence)
    each, wrong = np.arange(bad.shape[1]), {}
    for point in curve:
        wrong[point.thresholds] = bad[Policy(point.thresholds).exits(confidence), each]
    costs, violations = [], 0
    for seed in range(draws):
        rest, calibration = split_for_calibration(len(each), share, seed)
        some = ExitPredictions(*(np.asarray(field)[..., calibration] for field in pool))
        point = certify(curve, some, epsilon=epsilon, delta=delta, risk=risk).point
        if point is not None:
            costs.append(point.cost)
            violations += bool(wrong[point.thresholds][rest].mean() > epsilon)
    return Tally(draws, len(costs), violations, float(np.mean(costs)) if costs else np.nan)


if __name__ == "__main__":
    main()
