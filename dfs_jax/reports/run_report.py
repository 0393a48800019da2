"""Report and plots of one run, from its directory."""

from __future__ import annotations

from pathlib import Path

from dfs_jax.costs.flops import exit_costs
from dfs_jax.interop import save_weights
from dfs_jax.interop.files import STEP
from dfs_jax.output import say
from dfs_jax.reports.confusion_plots import plot_confusion
from dfs_jax.reports.plots import plot_accuracy_against_operations, plot_accuracy_over_time
from dfs_jax.reports.report import (
    Report,
    build_report,
    run_title,
    table_for_terminal,
    write_report,
)
from dfs_jax.training.evaluate import RunEvaluation, evaluate_run
from dfs_jax.training.experiment import Experiment, rebuild_experiment
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.processes import is_writer
from dfs_jax.training.sharding import gathered

OVER_TIME_PICTURE = "accuracy_over_time.png"
WEIGHTS_FILE = "weights.safetensors"
OPERATIONS_PICTURE = "accuracy_against_operations.png"
CONFUSION_PICTURE = "confusion.png"


def report_run(
    workdir: Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    output: Path | None = None,
    experiment: Experiment | None = None,
) -> Report:
    """Evaluates a checkpoint of a run, writes the results and prints a table.

    The best checkpoint's report on the test split is written to the run's directory, with plots and
    its weights under flat names; for another split or checkpoint, or an `output`, only the report
    is written.

    Args:
      workdir: directory of the run.
      split: split to report; thresholds always come from validation data (from the training data
        if the run holds none out).
      checkpoint: "best", "latest" or a step number.
      output: JSON file, with a Markdown page next to it; default: in `workdir`, `report.json` for
        the test split, `report_SPLIT.json` for others, with `_stepN` if it is not the best.
      experiment: experiment of the run, if it has been built; None builds it.

    Returns:
      The report (see `dfs_jax.reports.report.build_report`).

    Raises:
      UserError: no run, no such checkpoint or split, or a file that cannot be written.
    """
    experiment = experiment or rebuild_experiment(workdir)
    evaluation = evaluate_run(workdir, experiment, split=split, checkpoint=checkpoint)
    report = report_evaluation(evaluation)
    variables = gathered(evaluation.variables)
    if not is_writer():
        return report
    name = "report" if split == "test" else f"report_{split}"
    name = name if evaluation.is_best else f"{name}_step{evaluation.step}"
    written = write_report(report, output or workdir / f"{name}.json")
    if output is None and name == "report":
        save_weights(workdir / WEIGHTS_FILE, variables, about={STEP: str(evaluation.step)})
        written += (workdir / WEIGHTS_FILE, *_draw(workdir, report))
    say("\n".join([table_for_terminal(report), *(f"wrote {path}" for path in written)]))
    return report


def report_evaluation(evaluation: RunEvaluation) -> Report:
    """Returns the report of a run's evaluation (see `dfs_jax.reports.report.build_report`)."""
    experiment = evaluation.experiment
    config = experiment.config
    return build_report(
        evaluation.fitting,
        evaluation.reported,
        exit_costs(experiment.model, experiment.dataset.image_shape),
        split=evaluation.reported_split,
        run={
            "thresholds_from": None if evaluation.fitting is None else evaluation.fitting_split,
            "step": evaluation.step,
            "model": config.model.name,
            "data": config.data.name,
            "fork": config.fork.name,
            "loss": config.loss.name,
        },
        class_names=experiment.dataset.class_names,
    )


def _draw(workdir: Path, report: Report) -> tuple[Path, ...]:
    over_time, operations = workdir / OVER_TIME_PICTURE, workdir / OPERATIONS_PICTURE
    plot_accuracy_against_operations(report, operations)
    pictures = [operations]
    if report["classes"]["confusion"] is not None:
        pictures.append(plot_confusion(report, workdir / CONFUSION_PICTURE))
    lines = [line for line in read_metrics(workdir) if line["split"] == "validation"]
    if lines:
        plot_accuracy_over_time(lines, over_time, title=run_title(report["run"]))
        pictures.insert(0, over_time)
    return tuple(pictures)
