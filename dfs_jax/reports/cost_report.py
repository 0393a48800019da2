"""Costs of a config's network: each exit, and one training step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from dfs_jax import program
from dfs_jax.costs.flops import exit_costs
from dfs_jax.costs.step_operations import StepCost, theoretical_step_cost, traced_step_cost
from dfs_jax.data.shapes import DatasetShape, known_shape
from dfs_jax.files import write_whole
from dfs_jax.forks import Fork, create_fork
from dfs_jax.losses import Loss, create_loss
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.paths import output_file
from dfs_jax.tables import aligned
from dfs_jax.training.config import options
from dfs_jax.training.experiment import model_from_config
from dfs_jax.training.input_config import dataset_from_config
from dfs_jax.training.regimes import regime_from_config
from dfs_jax.training.sections import define_config_flag
from dfs_jax.types import Config, UserError

CostReport = dict[str, Any]


def main() -> None:
    """Runs the program: prints the costs of `--config`, and writes them to `--output`."""
    config = define_config_flag("Configuration of the run.")
    output = flags.DEFINE_string("output", None, "JSON file to write.")
    flags.mark_flag_as_required("config")

    def run() -> None:
        path = None if output.value is None else output_file(output.value, "--output")
        _print_and_write(config.value, path)

    program.run(run)


def cost_report(config: Config) -> CostReport:
    """Returns the costs of a config's network as plain data for JSON.

        exits          [{"exit", "params", "macs", "published_macs", "literature_flops",
                         "macs_without_earlier_heads"}]     see `ExitCost`
        training_step  {"fork", "loss", "plain", "forked", "speedup"}

    `plain` and `forked` are the same network without and with the config's fork, each
    `{"traced": costs, "theory": costs}` with costs `{"forward", "weight_gradients",
    "input_gradients", "total"}` in multiply-adds of one image; `speedup` is plain / forked of the
    totals. Well-known data sets need not be present; others are read for their image size.

    Raises:
      UserError: an unknown name, an option that its component lacks, or parts that do not fit.
    """
    fork = create_fork(config.fork.name, **options(config.fork))
    loss = create_loss(config.loss.name, **options(config.loss))
    num_classes, image_shape = image_set_shape(config.data)
    model = model_from_config(config.model, loss, num_classes=num_classes)
    model = model.clone(frozen_trunk=regime_from_config(config).frozen_epochs is None)
    try:
        exits = [cost._asdict() for cost in exit_costs(model, image_shape)]
        plain = _step_costs(model, create_fork("plain"), loss, image_shape)
        forked = _step_costs(model, fork, loss, image_shape)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    step = {
        "fork": config.fork.name,
        "loss": config.loss.name,
        "plain": {how: {**cost._asdict(), "total": cost.total} for how, cost in plain.items()},
        "forked": {how: {**cost._asdict(), "total": cost.total} for how, cost in forked.items()},
        "speedup": {how: plain[how].total / forked[how].total for how in plain},
    }
    return {"exits": exits, "training_step": step}


def image_set_shape(section: Config) -> DatasetShape:
    """Returns the shape of the set in a section `data`; sets that are not well-known are read."""
    shape = known_shape(section.name, section.image_size)
    if shape is not None:
        return shape
    dataset = dataset_from_config(section)
    return DatasetShape(dataset.num_classes, dataset.image_shape)


def table_for_terminal(report: CostReport) -> str:
    """Returns the report as two tables with their legends, without a final newline."""
    step = report["training_step"]
    counts = (
        "params",
        "macs",
        "published_macs",
        "macs_without_earlier_heads",
        "literature_flops",
    )
    parts = ("forward", "weight_gradients", "input_gradients", "total")
    exits = [(cost["exit"], *(cost[count] for count in counts)) for cost in report["exits"]]
    is_plain = step["fork"] == "plain"
    steps = [
        (f"{name}, {how}", *(step[key][how][part] for part in parts))
        for key, name in (("plain", "plain"), ("forked", step["fork"]))[: 1 if is_plain else 2]
        for how in ("traced", "theory")
    ]
    ratios = ", ".join(f"{how} {ratio:.3f}" for how, ratio in step["speedup"].items())
    speedup = "" if is_plain else f"\nplain / {step['fork']}: {ratios}"
    return f"""\
One image, up to and including each exit, in millions. MACs are multiply-adds (1 MAC = 2 FLOPs)
of the stages that early exit runs; blocks: of everything that the published blocks compute; alone:
those without the heads of earlier exits; literature: what published tables call FLOPs.
{_counts(("exit", "parameters", "MACs", "blocks", "alone", "literature"), exits)}

One training step on one image, in millions of MACs. Traced: as JAX differentiates the network;
theory: without the gradients of inputs that train nothing.
{_counts(("", "forward", "weight gradients", "input gradients", "total"), steps)}{speedup}"""


def _print_and_write(config: Config, output: Path | None) -> None:
    report = cost_report(config)
    program.say(table_for_terminal(report))
    if output is not None:
        content = json.dumps(report, indent=2, allow_nan=False) + "\n"
        written = write_whole(output, content)
        program.say(f"wrote {written}")


def _step_costs(
    model: MultiExitModel, fork: Fork, loss: Loss, image_shape: tuple[int, int, int]
) -> dict[str, StepCost]:
    counts = {"traced": traced_step_cost, "theory": theoretical_step_cost}
    return {how: count(model, fork, loss, image_shape) for how, count in counts.items()}


def _counts(titles: Iterable[str], rows: Iterable[tuple]) -> str:
    """Aligns rows of a label and counts, shown in millions."""
    cells = [[str(label), *(f"{n / 1e6:,.3f}" for n in counts)] for label, *counts in rows]
    return aligned([tuple(titles), *cells])


if __name__ == "__main__":
    main()
