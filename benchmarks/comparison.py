"""Compares methods: each is trained from the same seeds, under one protocol.

    python -m benchmarks.comparison --config=configs/digits_vgg7.py \\
        --methods=dsn,byot,dfs --seeds=0,1,2 --workdir=runs/comparison

Methods are the words that a config file accepts after its colon; `--config.FIELD=VALUE` applies to
all of them. Runs are in WORKDIR/METHOD/seed_SEED, as from train.py; an interrupted comparison is
resumed. Prints a table of test accuracies, methods by exits, and writes `comparison.json`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from dfs_jax import program
from dfs_jax.config_file import load_config
from dfs_jax.files import write_whole
from dfs_jax.paths import output_directory
from dfs_jax.reports.report import JSON_FILE, Report, write_report
from dfs_jax.reports.run_report import report_evaluation
from dfs_jax.tables import aligned
from dfs_jax.training.evaluate import evaluate_run
from dfs_jax.training.loop import train
from dfs_jax.training.sections import define_config_flag
from dfs_jax.types import Config, UserError

FILE = "comparison.json"


class Accuracies(NamedTuple):
    """Test accuracies of one run, as fractions.

    Attributes:
      exits: accuracy of each exit, shallow first.
      ensemble: accuracy of the mean of all exits' probabilities.
    """

    exits: tuple[float, ...]
    ensemble: float

    @property
    def columns(self) -> tuple[float, ...]:
        """Values of a row of the table: the exits, their mean, the ensemble."""
        return (*self.exits, statistics.fmean(self.exits), self.ensemble)


class Summary(NamedTuple):
    """A quantity over seeds.

    Attributes:
      mean: mean over the seeds.
      deviation: standard deviation over the seeds, with divisor n - 1; None for one seed.
    """

    mean: float
    deviation: float | None


def main() -> None:
    """Runs the program."""
    config = define_config_flag("Configuration file of all runs.")
    methods = flags.DEFINE_list("methods", ["dsn", "dfs"], "Methods to compare.")
    seeds = flags.DEFINE_list("seeds", ["0"], "Random seeds; one run of every method for each.")
    workdir = flags.DEFINE_string("workdir", "runs/comparison", "Directory of the runs.")
    flags.mark_flag_as_required("config")

    def run() -> int | None:
        program.use_compilation_cache()
        flag = flags.FLAGS["config"]
        file, _, _ = config_flags.get_config_filename(flag).partition(":")
        root = output_directory(workdir.value, "--workdir")
        configs = method_configs(
            Path(file).expanduser(), methods.value, config_flags.get_override_values(flag)
        )
        finished = compare(configs, _numbers(seeds.value), root)
        if finished is None:
            program.say("stopped: the same command continues")
            return
        written = _write(finished, root)
        program.say(f"{table(finished)}\nwrote {written}")

    del config  # read through its flag: one file gives a config for each method
    program.run(run)


def method_configs(
    file: Path, methods: Sequence[str], overrides: Mapping[str, Any]
) -> dict[str, Config]:
    """Returns the config of each method: `get_config(method)` of the file, with the overrides.

    Raises:
      UserError: no methods, a method that is named twice, or one that the file does not know.
    """
    if not methods or len(set(methods)) < len(methods):
        raise UserError(f"methods must be named, each once, got {','.join(methods) or 'none'}")
    configs = {}
    for method in methods:
        configs[method] = load_config(file, method)
        configs[method].update_from_flattened_dict(dict(overrides))
    return configs


def compare(
    configs: Mapping[str, Config], seeds: Sequence[int], workdir: Path
) -> dict[str, list[Accuracies]] | None:
    """Trains and evaluates every method from every seed, seed by seed.

    Args:
      configs: config of each method; their seeds are replaced.
      seeds: random seeds of the runs.
      workdir: directory of the runs; finished runs are only evaluated.

    Returns:
      The test accuracies of each method, one per seed; None if a signal stopped the comparison,
      which can be resumed.
    """
    found: dict[str, list[Accuracies]] = {method: [] for method in configs}
    for seed in seeds:
        for method, config in configs.items():
            program.say(f"{method}, seed {seed}")
            config = config.copy_and_resolve_references()
            config.seed = seed
            run = workdir / method / f"seed_{seed}"
            result = train(config, run)
            if result.stopped_by is not None:
                return None
            report = report_evaluation(evaluate_run(run, result.experiment))
            write_report(report, run / JSON_FILE)
            found[method].append(_accuracies(report))
    return found


def table(found: Mapping[str, Sequence[Accuracies]]) -> str:
    """Returns a table of methods by exits: test accuracy (%), mean and deviation over the seeds.

    Example:
      >>> print(table({"dfs": [Accuracies((0.5, 0.75), 0.75), Accuracies((0.6, 0.85), 0.75)]}))
      Test accuracy (%), mean ± deviation of 2 seeds.
                 exit 1        exit 2          mean      ensemble
      dfs  55.00 ± 7.07  80.00 ± 7.07  67.50 ± 7.07  75.00 ± 0.00
    """
    rows = {method: [_cell(s) for s in summaries(runs)] for method, runs in found.items()}
    runs = next(iter(found.values()))
    titles = [f"exit {i}" for i in range(1, len(runs[0].exits) + 1)] + ["mean", "ensemble"]
    over = f", mean ± deviation of {len(runs)} seeds" if len(runs) > 1 else ", one seed"
    lines = [("", *titles), *((name, *cells) for name, cells in rows.items())]
    return f"Test accuracy (%){over}.\n{aligned(lines, left=(0,))}"


def summaries(runs: Sequence[Accuracies]) -> list[Summary]:
    """Returns the mean and deviation of every column over the runs of a method."""
    return [
        Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
        for values in zip(*(run.columns for run in runs), strict=True)
    ]


def _cell(summary: Summary) -> str:
    mean = f"{100 * summary.mean:.2f}"
    return mean if summary.deviation is None else f"{mean} ± {100 * summary.deviation:.2f}"


def _accuracies(report: Report) -> Accuracies:
    exits = tuple(row["accuracy"] for row in report["anytime"])
    return Accuracies(exits, report["ensemble"]["accuracy"])


def _write(found: Mapping[str, Sequence[Accuracies]], workdir: Path) -> Path:
    """Writes `[{"method", "runs", "exits", "mean", "ensemble"}]`: fractions, summaries, runs."""
    content = []
    for method, runs in found.items():
        *exits, mean, ensemble = (summary._asdict() for summary in summaries(runs))
        kept = [run._asdict() for run in runs]
        content.append(
            {"method": method, "exits": exits, "mean": mean, "ensemble": ensemble, "runs": kept}
        )
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return write_whole(workdir / FILE, text)


def _numbers(seeds: Sequence[str]) -> list[int]:
    try:
        numbers = [int(seed) for seed in seeds]
    except ValueError as error:
        raise UserError(f"seeds must be whole numbers, got {','.join(seeds)}") from error
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"seeds must be named, each once, got {','.join(seeds) or 'none'}")
    return numbers


if __name__ == "__main__":
    main()
