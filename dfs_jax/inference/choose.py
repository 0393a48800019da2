"""Fits a run's early-exit policy to a target and writes it to the run's directory.

    python -m dfs_jax.inference.choose --workdir=DIR --speedup=2.5

Targets: `--p` (budgeted batch classification), `--speedup` or `--mmacs` (mean operations),
`--latency_ms` (mean for single images on this machine), `--throughput` (images per second in full
batches on this machine), or `--epsilon` with `--delta` (a guarantee). Thresholds and temperatures
are fitted on validation data; a guarantee sets part of it aside for calibration. The test split is
only reported.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from absl import flags

from dfs_jax import program
from dfs_jax.costs.flops import exit_costs
from dfs_jax.inference import policy as policies
from dfs_jax.inference.fitting import FittedPolicy, few_examples_warning, fit_policy, outcome
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.run_policy import fitting_record
from dfs_jax.inference.timing import StageTimes
from dfs_jax.inference.trained import StagedRun, load_staged
from dfs_jax.paths import input_directory, output_file
from dfs_jax.training.recorded import check_unchanged
from dfs_jax.types import UserError

TARGETS = ("p", "speedup", "mmacs", "latency_ms", "throughput", "epsilon")


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of the data, if it has moved.")
    checkpoint = flags.DEFINE_string("checkpoint", "best", "best, latest or a step number.")
    output = flags.DEFINE_string("output", None, "Policy file; default: policy.json in workdir.")
    batch_size = flags.DEFINE_integer("batch_size", 256, "Full batch size, for --throughput.")
    for name in TARGETS:
        flags.DEFINE_float(name, None, f"Target {name}; see the description of the program.")
    flags.DEFINE_float("delta", 0.1, "Probability that the guarantee fails.")
    flags.DEFINE_float("calibration_share", 0.5, "Fraction of validation data for calibration.")
    flags.DEFINE_integer("seed", 0, "Random seed of the calibration split.")
    flags.DEFINE_string("risk", "error", "error, or disagreement with the last exit.")
    flags.DEFINE_string("measure", "max_softmax", "max_softmax, entropy, margin or patience.")
    flags.DEFINE_bool("temperatures", True, "Fit the temperatures of the exits first.")
    accept = flags.DEFINE_bool(
        "accept_data_changes", False, "Use the run's validation images even if other files changed."
    )

    def run() -> None:
        program.use_compilation_cache()
        chosen = {name: flags.FLAGS[name].value for name in TARGETS}
        given = {name: value for name, value in chosen.items() if value is not None}
        if len(given) != 1:
            named = ", ".join(f"--{name}" for name in TARGETS)
            raise UserError(f"name one target of {named}; got {len(given)}")
        root = input_directory(workdir.value, "--workdir")
        path = output_file(
            root / policies.FILE if output.value is None else output.value, "--output"
        )
        staged = load_staged(root, checkpoint=checkpoint.value, data_dir=data_dir.value)
        check_unchanged(root, staged.experiment.config.data, accept=accept.value)
        ((target, value),) = given.items()
        names = ("delta", "calibration_share", "seed", "risk", "measure")
        options = {name: flags.FLAGS[name].value for name in names}
        options["scale_temperatures"] = flags.FLAGS["temperatures"].value
        fitted = choose_policy(staged, target, value, batch_size=batch_size.value, **options)
        description = describe(staged, fitted)
        fitted.policy.save(path)
        program.say(description)
        warning = few_examples_warning(fitted.policy)
        if warning is not None:
            program.warn(warning)
        program.say(f"wrote {path}")

    program.run(run)


def choose_policy(
    staged: StagedRun, target: str, value: float, *, batch_size: int = 256, **options: Any
) -> FittedPolicy:
    """Returns the policy of a run for one of `TARGETS`; `options` are passed to `fit_policy`.

    Raises:
      UserError: as in `fit_policy`; a value that is not above 0 and finite; a speed-up below 1.
    """
    if not 0 < value < math.inf:
        raise UserError(f"--{target} must be above 0 and finite, got {value:g}")
    if target == "speedup" and value < 1:
        raise UserError(f"--speedup must be at least 1, the whole network's speed, got {value:g}")
    split = staged.experiment.score_split
    logits, labels = staged.logits(split)
    costs, wanted = _costs_and_target(staged, target, value, batch_size)
    fitted = fit_policy(logits, labels, costs, **wanted, **options)
    about = {
        **staged.about(),
        **fitting_record(staged, split),
        "split": split,
        "target": {target: value},
        "measure": fitted.policy.measure,
        "temperatures": list(fitted.policy.temperatures),
        "thresholds": list(fitted.policy.thresholds),
        **fitted.policy.fitted_on,
    }
    return fitted._replace(policy=dataclasses.replace(fitted.policy, fitted_on=about))


def fit_again(staged: StagedRun, policy: Policy) -> FittedPolicy:
    """Returns a policy for the target of an earlier one, fitted on this network's own confidences.

    Args:
      staged: checkpoint of the run, with the stages to fit on.
      policy: policy of the same run, fitted on other stages.

    Raises:
      UserError: the policy has no record of its target, or as in `choose_policy`.
    """
    target = policy.fitted_on.get("target")
    if not isinstance(target, dict) or len(target) != 1:
        raise UserError(
            "the policy does not say what it was chosen for, so it cannot be fitted again: choose "
            "one with python -m dfs_jax.inference.choose"
        )
    ((name, value),) = target.items()
    options: dict[str, Any] = {
        "measure": policy.measure,
        "risk": policy.fitted_on.get("risk", "error"),
        "scale_temperatures": any(t != 1 for t in policy.temperatures),
    }
    guarantee = policy.fitted_on.get("guarantee")
    if guarantee is not None:
        calibrated, fitted = guarantee["examples"], policy.fitted_on["examples"]
        options["calibration_share"] = calibrated / (calibrated + fitted)
        options |= {key: guarantee[key] for key in ("delta", "seed")}
    return choose_policy(staged, name, value, **options)


def describe(staged: StagedRun, fitted: FittedPolicy) -> str:
    """Describes the policy's results on the test split and the evidence for a guarantee."""
    macs = _macs(staged)
    test = outcome(fitted.policy, *staged.logits("test"), macs)
    shares = " ".join(f"{100 * share:.1f}" for share in test.exit_shares)
    lines = [
        f"test split: accuracy {100 * test.accuracy:.2f} %, {test.cost / 1e6:.3f} M MACs of "
        f"{macs[-1] / 1e6:.3f} M ({macs[-1] / test.cost:.2f} times fewer), "
        f"{100 * test.disagreement:.2f} % answered differently from the last exit",
        f"answered by exits 1 to {len(macs)}: {shares} %",
    ]
    return "\n".join([*lines, *([fitted.certificate.describe()] if fitted.certificate else [])])


def _costs_and_target(
    staged: StagedRun, target: str, value: float, batch_size: int
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Returns the exits' costs in the unit of the target, and the target for `fit_policy`."""
    macs = _macs(staged)
    if target in ("p", "epsilon"):
        return macs, {target: value}
    if target == "speedup":
        return macs, {"at_most": macs[-1] / value}
    if target == "mmacs":
        return macs, {"at_most": value * 1e6}
    if target == "latency_ms":
        return _times(staged, 1).up_to_exit(), {"at_most": value / 1000}
    return _times(staged, batch_size).up_to_exit(), {"at_most": 1 / value}


def _times(staged: StagedRun, batch_size: int) -> StageTimes:
    shapes = sorted({1, batch_size})
    predictor = EarlyExitPredictor(
        staged.stages, staged.example, batch_size=batch_size, shapes=shapes
    )
    return predictor.warm_up()[batch_size]


def _macs(staged: StagedRun) -> tuple[float, ...]:
    costs = exit_costs(staged.experiment.model, staged.experiment.dataset.image_shape)
    return tuple(float(cost.macs) for cost in costs)


if __name__ == "__main__":
    main()
