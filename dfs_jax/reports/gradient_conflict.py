"""Measures how the exits' gradients conflict in finished runs, on a fixed batch.

    python -m dfs_jax.reports.gradient_conflict --workdir=runs/digits_vgg7
    python -m dfs_jax.reports.gradient_conflict --workdirs=runs/dsn,runs/dfs --output=conflict.json
        [--checkpoint=latest] [--examples=128]

For every tensor of the trunk and every pair of exits that reach it, this computes the cosine of the
gradients of the two exits' losses, and summarises it by layer, by block and over the trunk. It
prints a table, writes the numbers as JSON, and draws a plot next to it: cosines between exits in
every layer, with a row per run. If the runs measured their conflict during training
(`config.conflict_every_steps`), a second plot shows it over the steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dfs_jax import program
from dfs_jax.files import write_whole
from dfs_jax.gradients.conflict import count_pairs, gradient_norms, joint_gram, pair_cosines
from dfs_jax.paths import input_directory, output_file
from dfs_jax.tables import aligned
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.conflict import SPLIT, ConflictProbe, mean_cosines, rows_by_prefix
from dfs_jax.training.experiment import abstract_state, rebuild_experiment
from dfs_jax.training.metrics import read_metrics
from dfs_jax.types import UserError

JSON_FILE = "gradient_conflict.json"
DEFAULT_EXAMPLES = 128

Row = dict[str, Any]
Measurement = dict[str, Any]


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.")
    workdirs = flags.DEFINE_list("workdirs", [], "Directories of several runs to compare.")
    checkpoint = flags.DEFINE_string("checkpoint", "latest", "best, latest or a step number.")
    examples = flags.DEFINE_integer("examples", DEFAULT_EXAMPLES, "Size of the fixed batch.")
    output = flags.DEFINE_string("output", None, f"JSON file; default: {JSON_FILE} in workdir.")

    def run() -> None:
        program.use_compilation_cache()
        directories = [*filter(None, [workdir.value]), *workdirs.value]
        paths = [input_directory(directory, "--workdir") for directory in directories]
        path = _output_path(paths, output.value)
        measurements = [measure_run(run, checkpoint.value, examples.value) for run in paths]
        check_comparable(measurements)
        program.say(table_for_terminal(measurements))
        for written in write_measurements(measurements, [read_probe(run) for run in paths], path):
            program.say(f"wrote {written}")

    program.run(run)


def measure_run(
    workdir: Path, checkpoint: str = "latest", examples: int = DEFAULT_EXAMPLES
) -> Measurement:
    """Measures the conflict of a run's exits at one checkpoint.

    Parameters are the trained ones, not their moving average. The batch is the first examples of
    validation data (of train if the run holds none out).

    Args:
      workdir: directory of the run.
      checkpoint: "best", "latest" or a step number.
      examples: number of examples in the batch.

    Returns:
      Plain data, see `describe_gram`, with a section `run`.

    Raises:
      UserError: no run, no such checkpoint, or fewer examples than devices.
    """
    experiment = rebuild_experiment(workdir)
    probe = ConflictProbe(experiment, examples)
    checkpoints = Checkpoints(workdir, read_only=True)
    state, step = checkpoints.restore(checkpoint, abstract_state(experiment))
    config = experiment.config
    about = {
        "workdir": workdir.name,
        "step": step,
        "split": probe.split,
        "examples": probe.examples,
        "model": config.model.name,
        "data": config.data.name,
        "fork": config.fork.name,
        "loss": config.loss.name,
    }
    gram = probe(state.params, state.batch_stats)
    return {"run": about, **describe_gram(gram, probe.tensor_names)}


def describe_gram(gram: np.ndarray, names: tuple[str, ...]) -> Measurement:
    """Converts Gram matrices to plain data for JSON, with null where there is no number.

        trunk     all tensors; also "mean_cosines" [exits][exits] over the tensors
        blocks    [row]    shallow first
        layers    [row]    a layer: a module and its parameters
        tensors   [row]

    A row has its `name`; `pairs`, the number of pairs of exits that reach a tensor, summed over the
    row's tensors; `conflicting_pairs`, the fraction with a negative cosine; `disjoint_pairs`, the
    fraction with a cosine of exactly 0, whose exits train different channels; `cosines`
    [exits][exits] and `norms` [exits] of the row's gradient as a whole.

    Args:
      gram: Gram matrices `[tensors, exits, exits]`, NaN for exits that do not reach a tensor.
      names: names of the tensors.
    """
    depths = {"blocks": 1, "layers": -1, "tensors": None}  # parts of the name
    rows = {
        level: [_row(name, gram[some]) for name, some in rows_by_prefix(names, depth=depth).items()]
        for level, depth in depths.items()
    }
    trunk = _row("trunk", gram) | {"mean_cosines": _plain(mean_cosines(gram))}
    return {"trunk": trunk, **rows}


def read_probe(workdir: Path) -> list[Row]:
    """Returns a run's measurements during training: lines of `metrics.jsonl`, oldest first."""
    return [line for line in read_metrics(workdir) if line["split"] == SPLIT]


def table_for_terminal(measurements: Sequence[Measurement]) -> str:
    """Returns a table of the fraction of conflicting pairs: a line per block, a column per run."""
    titles = [measurement["run"]["workdir"] for measurement in measurements]
    rows = [["", *titles]]
    for i, block in enumerate(measurements[0]["blocks"]):
        rows.append([block["name"], *(_share_cell(m["blocks"][i]) for m in measurements)])
    rows.append(["trunk", *(_share_cell(m["trunk"]) for m in measurements)])
    title = "conflicting pairs of exits (in brackets: among those that share weights)"
    return f"{title}\n{aligned(rows)}"


def write_measurements(
    measurements: Sequence[Measurement], probes: Sequence[Sequence[Row]], path: Path
) -> list[Path]:
    """Writes the JSON file and the plots next to it; returns their paths."""
    from dfs_jax.reports.conflict_plots import plot_conflict, plot_conflict_over_time

    content = json.dumps({"runs": list(measurements)}, indent=1, allow_nan=False) + "\n"
    written = [write_whole(path, content)]
    written.append(plot_conflict(measurements, path.with_suffix(".png")))
    if all(probes):
        over_time = path.with_name(f"{path.stem}_over_time.png")
        titles = [measurement["run"]["workdir"] for measurement in measurements]
        written.append(plot_conflict_over_time(probes, titles, over_time))
    return written


def check_comparable(measurements: Sequence[Measurement]) -> None:
    """Raises UserError unless the runs have the same network."""
    first, *others = ([row["name"] for row in m["tensors"]] for m in measurements)
    for names, measurement in zip(others, measurements[1:], strict=True):
        if names != first:
            raise UserError(
                f"runs of different networks cannot be compared: the trunk of "
                f"{measurement['run']['workdir']} has other tensors than that of "
                f"{measurements[0]['run']['workdir']}"
            )


def _row(name: str, gram: np.ndarray) -> Row:
    counts, joint = count_pairs(gram), joint_gram(gram)
    return {
        "name": name,
        "pairs": counts.pairs,
        "conflicting_pairs": _plain(counts.conflicting_share),
        "disjoint_pairs": _plain(counts.disjoint_share),
        "cosines": _plain(pair_cosines(joint)),
        "norms": _plain(gradient_norms(joint)),
    }


def _plain(values: Any) -> Any:
    """Returns numbers for JSON: None for NaN."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return float(values) if math.isfinite(values) else None


def _share_cell(row: Row) -> str:
    """Returns the fraction of conflicting pairs: of all pairs, and of those that share weights."""
    if not row["pairs"]:
        return "no pair"
    conflicting, disjoint = row["conflicting_pairs"], row["disjoint_pairs"]
    sharing = f"{100 * conflicting / (1 - disjoint):.1f} %" if disjoint < 1 else "none"
    return f"{100 * conflicting:.1f} % ({sharing})"


def _output_path(workdirs: Sequence[Path], output: str | None) -> Path:
    if not workdirs:
        raise UserError("name a run with --workdir=DIR, or several with --workdirs=DIR,DIR")
    if output is None and len(workdirs) > 1:
        raise UserError("several runs are compared in a file of their own: name it with --output")
    path = output_file(workdirs[0] / JSON_FILE if output is None else output, "--output")
    if path.suffix != ".json":
        raise UserError(f"output {path} must end in .json: the plots next to it end in .png")
    return path


if __name__ == "__main__":
    main()
