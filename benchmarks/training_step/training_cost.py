"""Measures the cost of training by method: the paper's training-efficiency experiment.

    python -m benchmarks.training_step --config=configs/cifar100_vgg7.py --batch_sizes=64,128
        [--methods=dsn,byot,dfs] [--partition_ratios=0.3,0.5,0.7] [--peer=torch] [--repeats=N]
        [--output=FILE.json]

Times the config's own training step on noise with the shape of the data set, which need not be
present: forward, backward, the rest of the step, making a batch; also compilation, memory and
operations. `--peer=torch` times the same networks in PyTorch in the same run. Prints a table for
each batch size; `--output` names a JSON file for all numbers, with a plot next to it.

Reference: Gong et al., "Deep Feature Surgery", ECCV 2024, figures 4 and 5 (right).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.training_step.cost_table import CostRow
from benchmarks.training_step.method_costs import (
    DEFAULT_RATIOS,
    DEFAULT_REPEATS,
    PEERS,
    VARIANTS,
    measure_training_cost,
)
from dfs_jax import program
from dfs_jax.paths import output_file
from dfs_jax.reports.report import write_whole
from dfs_jax.training.sections import define_config_flag
from dfs_jax.types import UserError


def main() -> None:
    """Runs the program."""
    config = define_config_flag("Configuration of the run.")
    batch_sizes = flags.DEFINE_list("batch_sizes", None, "Batch sizes; default: the config's.")
    methods = flags.DEFINE_list("methods", None, f"Methods, or any of {', '.join(VARIANTS)}.")
    ratios = flags.DEFINE_list("partition_ratios", list(map(str, DEFAULT_RATIOS)), "Betas of DFS.")
    peer = flags.DEFINE_string("peer", None, f"Framework to compare: {', '.join(PEERS.table)}.")
    repeats = flags.DEFINE_integer("repeats", DEFAULT_REPEATS, "Number of rounds for medians.")
    output = flags.DEFINE_string("output", None, "JSON file to write, with a PNG next to it.")
    flags.mark_flag_as_required("config")

    def run() -> None:
        program.use_compilation_cache()
        path = None if output.value is None else check_output(output.value)
        rows = measure_training_cost(
            config.value,
            batch_sizes=_numbers("batch_sizes", batch_sizes.value or (), int),
            methods=methods.value,
            partition_ratios=_numbers("partition_ratios", ratios.value, float),
            peer=peer.value,
            repeats=repeats.value,
        )
        if path is not None:
            write_training_cost(rows, path)

    program.run(run)


def check_output(output: str | Path) -> Path:
    """Returns the path of a JSON file if it, and a plot next to it, can be written.

    Raises:
      UserError: they cannot be written, which is reported before measuring.
    """
    path = output_file(output, "output")
    if path.suffix != ".json":
        raise UserError(f"output {path} must end in .json: the plot next to it ends in .png")
    output_file(path.with_suffix(".png"), "output")
    return path


def write_training_cost(rows: Sequence[CostRow], path: Path) -> None:
    """Writes the rows as JSON to `path`, and the plot next to it."""
    from benchmarks.training_step.cost_plots import plot_training_cost

    content = json.dumps(rows, indent=2, allow_nan=False) + "\n"
    program.say(f"wrote {write_whole(path, content)}")
    program.say(f"wrote {plot_training_cost(rows, path.with_suffix('.png'))}")


def _numbers(flag: str, texts: Sequence[str], kind: type) -> list[Any]:
    try:
        return [kind(text) for text in texts]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        given = ",".join(texts)
        raise UserError(f"{flag} must be {what} with commas between, got {given!r}") from error


if __name__ == "__main__":
    main()
