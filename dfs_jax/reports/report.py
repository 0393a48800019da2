"""A run's report: plain data from predictions and costs, written as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_jax.costs.flops import ExitCost
from dfs_jax.exits.confidence import ExitPredictions, anytime_accuracy, ensemble_accuracy
from dfs_jax.files import write_whole
from dfs_jax.inference.budgeted import budgeted_curve
from dfs_jax.paths import local_path
from dfs_jax.reports.confusion import class_section, worst_classes
from dfs_jax.tables import aligned, markdown
from dfs_jax.types import UserError

JSON_FILE = "report.json"
_SHOWN_BUDGETS = 10
_SHOWN_CLASSES = 10

Report = dict[str, Any]


def build_report(
    validation: ExitPredictions | None,
    test: ExitPredictions,
    costs: Sequence[ExitCost],
    *,
    split: str,
    run: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> Report:
    """Combines a checkpoint's accuracies and costs in one dictionary for JSON.

        anytime    [{"exit", "accuracy", "macs", "published_macs", "params"}]   see `ExitCost`
        ensemble   {"accuracy"}                                   mean of all exits' probabilities
        budgeted   [{"p", "thresholds", "accuracy", "macs"}]      see `dfs_jax.inference.budgeted`
        classes    accuracy by class and confusion matrices       see `class_section`
        run        {"split", "examples", "thresholds_from", ...}  what was evaluated

    Accuracies are fractions. MACs are multiply-adds of one image, up to and including the exit in
    `anytime`, their mean over the images in `budgeted`. A threshold of 1e8 means that no example
    exits, and -1e8 that all remaining ones do.

    Args:
      validation: predictions that thresholds are chosen on; None for no budgets.
      test: predictions for all other results.
      costs: `exit_costs` of the network.
      split: name of the split of `test`.
      run: more entries for the section `run`: `thresholds_from` (the split of `validation`, by
        default "validation"), `step`, the names of `model`, `data`, `fork` and `loss`.
      class_names: names of the classes; None omits the section `classes`.

    Raises:
      ValueError: predictions and costs with different numbers of exits, or no examples.
    """
    macs = [cost.macs for cost in costs]
    points = [] if validation is None else budgeted_curve(validation, test, macs)
    return {
        "run": {
            "split": split,
            "examples": int(test.num_examples),
            "thresholds_from": "validation",
            **(run or {}),
        },
        "anytime": [
            {
                "exit": cost.exit,
                "accuracy": float(accuracy),
                "macs": cost.macs,
                "published_macs": cost.published_macs,
                "params": cost.params,
            }
            for accuracy, cost in zip(anytime_accuracy(test), costs, strict=True)
        ],
        "ensemble": {"accuracy": float(ensemble_accuracy(test))},
        "budgeted": [{**point._asdict(), "thresholds": list(point.thresholds)} for point in points],
        **({} if class_names is None else {"classes": class_section(test, class_names)}),
    }


def run_title(run: Mapping[str, Any]) -> str:
    """Returns a one-line title for a run, from its section `run`.

    >>> run_title({"model": "vgg7", "data": "digits", "fork": "dfs", "loss": "byot"})
    'vgg7 on digits, dfs fork, byot loss'
    """
    parts = [" on ".join(str(run[key]) for key in ("model", "data") if run.get(key))]
    parts += [f"{run[key]} {key}" for key in ("fork", "loss") if run.get(key)]
    return ", ".join(part for part in parts if part) or "Multi-exit network"


def describe_evaluation(run: Mapping[str, Any]) -> str:
    """Describes what was evaluated.

    >>> describe_evaluation({"split": "test", "examples": 10000, "step": 400})
    'test split, 10,000 examples, checkpoint of step 400'
    """
    described = f"{run['split']} split, {run['examples']:,} examples"
    return f"{described}, checkpoint of step {run['step']}" if "step" in run else described


def table_for_terminal(report: Report) -> str:
    """Returns a compact table of the exits and the ensemble, without a final newline."""
    exits = [
        (str(row["exit"]), _percent(row["accuracy"]), *map(_millions, (row["macs"], row["params"])))
        for row in report["anytime"]
    ]
    ensemble = ("ensemble", _percent(report["ensemble"]["accuracy"]))
    rows = [("exit", "accuracy", "M MACs", "M params"), *exits, ensemble]
    return f"{describe_evaluation(report['run'])}\n{aligned(rows)}"


def render_markdown(report: Report) -> str:
    """Renders the report as a short page: anytime table, ensemble, some of the budgets."""
    run, points = report["run"], report["budgeted"]
    anytime = _right_aligned(
        ["exit", "accuracy", "M MACs", "M parameters"],
        [
            [str(row["exit"]), _percent(row["accuracy"])]
            + [_millions(row[count]) for count in ("macs", "params")]
            for row in report["anytime"]
        ],
    )
    count = min(_SHOWN_BUDGETS, len(points))
    shown = np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))
    budgets = _right_aligned(
        ["p", "accuracy", "mean M MACs"],
        [
            [f"{point['p']:.2f}", _percent(point["accuracy"]), _millions(point["macs"])]
            for point in (points[i] for i in shown)
        ],
    )
    budgeted = f"""
## Budgeted batch: each image takes the first exit that is confident enough

Exit k answers about a fraction p^k / sum p^j; the confidence thresholds were chosen on the \
{run["thresholds_from"]} split. {len(shown)} of {len(points)} budgets; the JSON file next to \
this page contains all of them, with their thresholds.

{budgets}
"""
    return f"""# {run_title(run)}

{describe_evaluation(run).capitalize()}. One MAC is a multiply-add of one image, 2 FLOPs.

## Anytime: each exit on every image

Operations and parameters are those up to and including the exit, with all earlier heads.

{anytime}

Ensemble (mean of all exits' probabilities): **{_percent(report["ensemble"]["accuracy"])}**
{budgeted if points else ""}{_classes_page(report["classes"]) if "classes" in report else ""}"""


def _classes_page(section: Mapping[str, Any]) -> str:
    worst = _right_aligned(
        ["class", "accuracy"],
        [[_cell(name), _percent(share)] for name, share in worst_classes(section, _SHOWN_CLASSES)],
    )
    confusions = _right_aligned(
        ["class", "taken for", "images"],
        [
            [_cell(row["label"]), _cell(row["predicted"]), row["count"]]
            for row in section["confusions"][:_SHOWN_CLASSES]
        ],
    )
    return f"""
## Classes, at the last exit

The classes with the lowest accuracy:

{worst}

The most frequent confusions; the JSON file has the accuracy by class of every exit:

{confusions}
"""


def write_report(report: Report, path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes the report as JSON and as a Markdown page next to it, both atomically.

    Args:
      report: report of `build_report`.
      path: JSON file, or a directory for `report.json`; the page has the suffix `.md`.

    Returns:
      The two paths, JSON first.

    Raises:
      ValueError: the report contains a number that is not finite.
      UserError: a file could not be written, or the JSON file itself has the suffix `.md`.
    """
    path = local_path(path, "report")
    path = path / JSON_FILE if path.is_dir() else path
    page_path = path.with_suffix(".md")
    if page_path == path:
        raise UserError(f"{path} is the page's own name: give the JSON file another suffix")
    page, data = render_markdown(report), _json(report)
    return write_whole(path, f"{data}\n"), write_whole(page_path, page)


def _json(report: Report) -> str:
    """Returns JSON with each list of numbers on one line."""
    text = json.dumps(report, indent=2, allow_nan=False)
    return re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def _cell(name: str) -> str:
    """Returns a name without characters that end a cell of a Markdown table."""
    return name.replace("|", "\\|").replace("\n", " ")


def _right_aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(titles, rows, rule="---:")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}"
