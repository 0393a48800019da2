"""The report and the pictures of one run, from its directory."""

from __future__ import annotations

from pathlib import Path

from dfs_jax.analysis.flops import exit_costs
from dfs_jax.analysis.plots import plot_accuracy_against_operations, plot_accuracy_over_time
from dfs_jax.analysis.report import (
    Report,
    build_report,
    run_title,
    table_for_terminal,
    write_report,
)
from dfs_jax.interop import save_weights
from dfs_jax.output import say
from dfs_jax.training.evaluate import RunEvaluation, evaluate_run
from dfs_jax.training.experiment import Experiment, rebuild_experiment
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.processes import is_writer
from dfs_jax.training.sharding import gathered

OVER_TIME_PICTURE = "accuracy_over_time.png"
WEIGHTS_FILE = "weights.safetensors"
OPERATIONS_PICTURE = "accuracy_against_operations.png"


def report_run(
    workdir: Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    output: Path | None = None,
    experiment: Experiment | None = None,
) -> Report:
    """Evaluates a checkpoint of a run, writes what was found and prints a table.

    The test split's report lies in the run's directory, with the pictures and the checkpoint's
    weights under flat names; another split's, or one with an `output` of its own, comes alone.

    Args:
      workdir: the run's directory.
      split: what is reported; thresholds always come from validation data (from the training data
        of a run that holds none out).
      checkpoint: "best", "latest" or a step's number.
      output: the JSON file, with a readable page beside it; `report.json` in `workdir` for the test
        split, `report_SPLIT.json` for others.
      experiment: what the run's config describes, where it is at hand; None builds it.

    Returns:
      The report (see `dfs_jax.analysis.report.build_report`).

    Raises:
      UserError: no run, no such checkpoint or split, a file that cannot be written.
    """
    experiment = experiment or rebuild_experiment(workdir)
    evaluation = evaluate_run(workdir, experiment, split=split, checkpoint=checkpoint)
    report = report_evaluation(evaluation)
    variables = gathered(evaluation.variables)
    if not is_writer():
        return report
    name = "report.json" if split == "test" else f"report_{split}.json"
    written = write_report(report, output or workdir / name)
    if output is None and split == "test":
        save_weights(workdir / WEIGHTS_FILE, variables)
        written += (workdir / WEIGHTS_FILE, *_draw(workdir, report))
    say("\n".join([table_for_terminal(report), *(f"wrote {path}" for path in written)]))
    return report


def report_evaluation(evaluation: RunEvaluation) -> Report:
    """Returns the report of a run's evaluation (see `dfs_jax.analysis.report.build_report`)."""
    experiment = evaluation.experiment
    config = experiment.config
    return build_report(
        evaluation.fitting,
        evaluation.reported,
        exit_costs(experiment.model, experiment.dataset.image_shape),
        split=evaluation.reported_split,
        run={
            "thresholds_from": evaluation.fitting_split,
            "step": evaluation.step,
            "model": config.model.name,
            "data": config.data.name,
            "fork": config.fork.name,
            "loss": config.loss.name,
        },
    )


def _draw(workdir: Path, report: Report) -> tuple[Path, ...]:
    over_time, operations = workdir / OVER_TIME_PICTURE, workdir / OPERATIONS_PICTURE
    plot_accuracy_against_operations(report, operations)
    lines = [line for line in read_metrics(workdir) if line["split"] == "validation"]
    if not lines:
        return (operations,)
    plot_accuracy_over_time(lines, over_time, title=run_title(report["run"]))
    return over_time, operations
