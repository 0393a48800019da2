"""Says which places of a run's network are worth an exit, at a mean cost.

    python -m dfs_jax.reports.placement --workdir=runs/digits_vgg7 --speedup=2 --speedup=3
        [--most=3] [--epochs=10] [--learning_rate=0.01] [--checkpoint=best]
        [--costs=onnx --batch=64]

The candidates are the exits of the run. A new head is trained at each, once, on features of the
frozen trunk. Every subset with the last exit then gets a policy for the mean cost asked for, fitted
on validation data: 1/speedup of the cost of the trunk and its last head. Costs are multiply-adds;
with `--costs=jax` or `onnx`, times in that runtime on this machine. The table has the most accurate
subset of each size; the test split is only reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dfs_jax import program
from dfs_jax.files import write_whole
from dfs_jax.inference.fitting import outcome
from dfs_jax.inference.onnx_stages import share_threads_of_process
from dfs_jax.inference.places import Placement, placements
from dfs_jax.inference.temperature import fit_temperatures
from dfs_jax.inference.trained import StagedRun, staged_run
from dfs_jax.paths import input_directory, output_file
from dfs_jax.reports.part_costs import COSTS, JAX, MACS, ONNX, PartCosts, check_costs, part_costs
from dfs_jax.tables import aligned
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import abstract_state, rebuild_experiment
from dfs_jax.training.frozen_heads import train_heads
from dfs_jax.types import UserError

JSON_FILE = "placement.json"

Row = dict[str, Any]

_UNITS = {  # what a table shows, how much of a cost it is, and what a lower cost is
    MACS: ("M MACs", 1e6, "fewer operations"),
    JAX: ("ms", 1e-3, "less time in jax"),
    ONNX: ("ms", 1e-3, "less time in ONNX Runtime"),
}


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of the data, if it has moved.")
    checkpoint = flags.DEFINE_string("checkpoint", "best", "best, latest or a step number.")
    output = flags.DEFINE_string("output", None, f"JSON file; default: {JSON_FILE} in workdir.")
    speedups = flags.DEFINE_multi_float(
        "speedup", [2.0], "Factor by which the mean cost is lower; may be repeated."
    )
    most = flags.DEFINE_integer("most", None, "Largest number of exits; default: no limit.")
    epochs = flags.DEFINE_integer("epochs", 10, "Number of epochs that heads are trained for.")
    rate = flags.DEFINE_float("learning_rate", 0.01, "First learning rate of the heads.")
    measure = flags.DEFINE_string("measure", "max_softmax", "Confidence measure of the policies.")
    costs = flags.DEFINE_string("costs", MACS, f"Costs that are compared: {', '.join(COSTS)}.")
    batch = flags.DEFINE_integer("batch", 1, "Number of images in a batch that is timed.")

    def run() -> None:
        program.use_compilation_cache()
        _check_speedups(speedups.value)
        check_costs(costs.value, batch.value)
        root = input_directory(workdir.value, "--workdir")
        path = _output_path(root / JSON_FILE if output.value is None else output.value)
        staged = with_new_heads(
            root,
            checkpoint=checkpoint.value,
            data_dir=data_dir.value,
            epochs=epochs.value,
            learning_rate=rate.value,
        )
        if costs.value == ONNX:
            share_threads_of_process()
        parts = part_costs(staged, costs.value, batch=batch.value)
        rows: list[Row] = []
        for speedup in speedups.value:
            some = find_places(
                staged, speedup, parts, costs.value, most=most.value, measure=measure.value
            )
            program.say(table(some))
            rows += some
        write_whole(path, json.dumps(rows, indent=2, allow_nan=False) + "\n")
        from dfs_jax.reports.placement_plots import plot_placement

        program.say(f"wrote {path}\nwrote {plot_placement(rows, path.with_suffix('.png'))}")

    program.run(run)


def with_new_heads(
    workdir: Path,
    *,
    checkpoint: str = "best",
    data_dir: str | None = None,
    epochs: int = 10,
    learning_rate: float = 0.01,
) -> StagedRun:
    """Returns a run's network with new heads, trained on its frozen trunk.

    Raises:
      UserError: no run, no such checkpoint, no validation data, a network with a single exit, or a
        mistake of `train_heads`.
    """
    experiment = rebuild_experiment(workdir, data_dir=data_dir)
    if experiment.model.num_exits < 2:
        raise UserError(
            f"the network of {workdir} has a single exit: places are chosen among the exits of a "
            f"run, train one with all exits"
        )
    if experiment.dataset.validation is None:
        raise UserError(
            f"the run in {workdir} holds no validation split out, which places are chosen on: "
            f"train one with data.validation_examples"
        )
    if not learning_rate > 0:
        raise UserError(f"--learning_rate must be above 0, got {learning_rate:g}")
    state, step = Checkpoints(workdir, read_only=True).restore(
        checkpoint, abstract_state(experiment)
    )
    variables = train_heads(
        experiment, state.eval_variables, epochs=epochs, learning_rate=learning_rate
    )
    return staged_run(experiment, variables, step)


def find_places(
    staged: StagedRun,
    speedup: float,
    parts: PartCosts,
    costs: str = MACS,
    *,
    most: int | None = None,
    measure: str = "max_softmax",
) -> list[Row]:
    """Returns a row for every subset of a network's exits that meets a mean cost, the best first.

        speedup         factor by which the mean cost is lower
        costs           "macs", "jax" or "onnx"
        exits           places, 1-based
        accuracy, cost  on validation data; a fraction, and mean multiply-adds or seconds of one
                        image
        test_accuracy, test_cost

    Args:
      staged: network with heads that do not depend on one another.
      speedup: factor by which the mean cost is to be lower than the whole network's.
      parts: costs of the network's parts (`part_costs`).
      costs: what these are.
      most: largest number of exits; None for no limit.
      measure: confidence measure of the policies.

    Raises:
      UserError: no subset is cheap enough, or too many subsets.
    """
    logits, labels = staged.logits("validation")
    test_logits, test_labels = staged.logits("test")
    temperatures = np.asarray(fit_temperatures(logits, labels), np.float32)[:, None, None]
    found = placements(
        logits, labels, *parts, parts.trunk[-1] / speedup, most=most, measure=measure
    )

    def row(placement: Placement) -> Row:
        chosen = list(placement.places)
        scaled = (test_logits / temperatures)[chosen]
        test = outcome(placement.fitted.policy, scaled, test_labels, placement.costs)
        return {
            "speedup": speedup,
            "costs": costs,
            "exits": [k + 1 for k in placement.places],
            "accuracy": placement.accuracy,
            "cost": placement.cost,
            "test_accuracy": test.accuracy,
            "test_cost": test.cost,
        }

    return list(map(row, found))


def best_of_each_size(rows: Sequence[Row]) -> list[Row]:
    """Returns the first row of each number of exits, few exits first."""
    sizes = sorted({len(row["exits"]) for row in rows})
    return [next(row for row in rows if len(row["exits"]) == size) for size in sizes]


def table(rows: Sequence[Row]) -> str:
    """Returns the best rows of one mean cost as a table, and a sentence with the best of all."""
    best = rows[0]
    unit, size, _ = _UNITS[best["costs"]]
    titles = ("exits", "after", "validation", unit, "test", unit)
    lines = [
        (
            len(row["exits"]),
            _listed(row),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['cost'] / size:.3f}",
            f"{100 * row['test_accuracy']:.2f} %",
            f"{row['test_cost'] / size:.3f}",
        )
        for row in best_of_each_size(rows)
    ]
    return (
        f"{said(best)}, {len(rows)} subsets\n"
        f"{aligned([titles, *lines], left=(1,))}\n"
        f"best: exits after {_listed(best)}, {100 * best['accuracy']:.2f} % of the validation data"
    )


def said(row: Row) -> str:
    """Returns a row's mean cost in words.

    >>> said({"speedup": 1.5, "costs": "onnx"})
    '1.5 times less time in ONNX Runtime'
    """
    return f"{row['speedup']:g} times {_UNITS[row['costs']][2]}"


def _listed(row: Row) -> str:
    return ", ".join(map(str, row["exits"]))


def _check_speedups(speedups: Sequence[float]) -> None:
    for speedup in speedups:
        if not 1 <= speedup < float("inf"):
            raise UserError(f"--speedup must be at least 1 and finite, got {speedup:g}")


def _output_path(output: str | Path) -> Path:
    path = output_file(output, "--output")
    if path.suffix != ".json":
        raise UserError(f"--output {path} must end in .json: the plot next to it ends in .png")
    return path


if __name__ == "__main__":
    main()
