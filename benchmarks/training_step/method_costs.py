"""Measures the training steps of several methods, batch sizes and frameworks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.training_step.cost_table import CostRow, cost_table
from benchmarks.training_step.step_timing import (
    StepPrograms,
    StepTimes,
    available_cores,
    compile_step,
    time_steps,
)
from dfs_jax import program
from dfs_jax.costs.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.data.dataset import Dataset, Split
from dfs_jax.data.statistics import channel_statistics
from dfs_jax.registry import Registry
from dfs_jax.reports.cost_report import image_set_shape
from dfs_jax.training.config import check_config
from dfs_jax.training.experiment import Experiment, build_experiment
from dfs_jax.training.methods import MethodParts, method_parts
from dfs_jax.types import Config, UserError, check_whole

PEERS = Registry("peer", {"torch": "benchmarks.training_step.torch_peer:TorchPeer"})

OURS, OUR_LAYOUT = "jax", "channels_last"
DEFAULT_RATIOS = (0.3, 0.5, 0.7)
DEFAULT_REPEATS = 9
_MADE_UP_BATCHES = 4
# Options of augmentations, which a peer does not have.
_AUGMENTATION_OPTIONS = ("crop_", "autoaugment_", "cutout_")


class Variant(NamedTuple):
    """A variant of a method, for comparison.

    Attributes:
      method: name of the method.
      model: options of the model that differ from the config.
      exits: way through the exits, for rules that read the gradients of single exits.
      plain_jit: whether it is compiled without this package's compiler options.
    """

    method: str
    model: Mapping[str, Any] = MappingProxyType({})
    exits: str | None = None
    plain_jit: bool = False


_NAIVE = {"partitioned_backward": False}
VARIANTS = {
    # The usual way to write the fork: the whole input gradient is computed, then cut.
    "dfs_naive": Variant("dfs", _NAIVE),
    # Flax's own layers under plain jax.jit.
    "dfs_flax": Variant("dfs", {**_NAIVE, "cpu_kernels": False}, plain_jit=True),
    # Ways through the exits that are not the default on a CPU.
    "pcgrad_vmap": Variant("pcgrad", exits="vmap"),
    "pcgrad_scan": Variant("pcgrad", exits="scan"),
}
DEFAULT_METHODS = ("dsn", "byot", "dfs", "dfs_naive", "dfs_flax")


class Peer(Protocol):
    """Another framework that runs the same training steps.

    Attributes:
      name: name of the framework.
      layouts: memory layouts of images; each has its own rows.
    """

    name: str
    layouts: Sequence[str]

    def compile_step(self, experiment: Experiment, layout: str) -> StepPrograms:
        """Returns the parts of the experiment's step; raises UserError if it cannot run them."""
        ...


class Case(NamedTuple):
    """One row to measure: a method in one framework."""

    method: str
    partition_ratio: float | None
    framework: str
    layout: str
    experiment: Experiment

    @property
    def key(self) -> tuple[str, float | None, str]:
        """Key of the operations, which cases with equal keys share."""
        return self.method, self.partition_ratio, self.framework


def measure_training_cost(
    config: Config,
    *,
    batch_sizes: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    partition_ratios: Sequence[float] = DEFAULT_RATIOS,
    peer: str | None = None,
    repeats: int = DEFAULT_REPEATS,
) -> list[CostRow]:
    """Compiles and times every method at every batch size, and prints a table for each size.

    All rows of one batch size are timed in turn, on noise with the shape of the config's data set.

    Args:
      config: configuration of a run; `fork.referencing` applies to DFS.
      batch_sizes: numbers of images in a step; None for the config's batch size.
      methods: methods by the words that configs take ("dfs+pcgrad"), or names in `VARIANTS`; None
        for those of `DEFAULT_METHODS` whose options the model has.
      partition_ratios: betas of DFS; its variants are timed at the middle one.
      peer: name in `PEERS`, or "package.module:attribute"; turns augmentation off.
      repeats: number of rounds that medians are taken over.

    Returns:
      One dict per row: `model`, `method`, `partition_ratio`, `batch`, `framework`, `layout`;
      `forward_ms`, `backward_ms`, `other_ms`, `step_ms`, `data_ms` (see `StepTimes`);
      `images_per_second`, of the step alone; `compile_s`, `peak_mib` (see `StepPrograms`); `macs`
      and `macs_theory`, multiply-adds for one image of the step as it runs, and of a step without
      unnecessary input gradients, None if gradients of single exits are computed; `fork`, `loss`,
      names in the config; `published_loop`, passes over the data of a published program that looks
      ahead, or None.

    Raises:
      UserError: an unknown name or a value out of range, before anything is compiled.
    """
    check_whole("repeats", repeats)
    if not partition_ratios:
        raise UserError("partition_ratios must name at least one beta")
    for batch_size in batch_sizes or ():
        check_whole("each of batch_sizes", batch_size)
    check_config(config)
    rival = None if peer is None else create_peer(peer)
    config = config if rival is None else without_augmentation(config)
    batch_sizes = batch_sizes or [config.batch_size]
    dataset = noise_like(config, max(batch_sizes))
    planned = [
        plan_cases(changed(config, {"batch_size": size}), dataset, methods, partition_ratios, rival)
        for size in batch_sizes
    ]
    operations = count_operations(planned[0])  # of one image, independent of the batch size
    rows: list[CostRow] = []
    for cases in planned:
        measured = [
            {**row, **operations[case.key]}
            for case, row in zip(cases, _measure(cases, rival, repeats), strict=True)
        ]
        program.say(f"\n{_headline(cases[0].experiment, rival, repeats)}\n{cost_table(measured)}\n")
        rows += measured
    return rows


def plan_cases(
    config: Config,
    dataset: Dataset,
    names: Sequence[str] | None,
    ratios: Sequence[float],
    rival: Peer | None,
) -> list[Case]:
    """Builds the experiments of one batch size: our rows, then the peer's.

    Args:
      config: configuration of a run with this batch size.
      dataset: data set of `noise_like`.
      names: methods or names in `VARIANTS`; None for those of `DEFAULT_METHODS` whose options the
        model has.
      ratios: betas of DFS.
      rival: peer of `create_peer`, or None.
    """
    ours = []
    for name in names or DEFAULT_METHODS:
        for ratio in _ratios_of(name, ratios):
            experiment = build_experiment(_config_of(config, name, ratio), dataset)
            ours.append(Case(name, ratio, OURS, OUR_LAYOUT, experiment))
    if rival is None:
        return ours
    theirs = [
        case._replace(framework=rival.name, layout=layout)
        for layout in rival.layouts
        for case in ours
        if case.method not in VARIANTS and case.experiment.rule.is_plain_sum
    ]
    return ours + theirs


def _variant(name: str) -> Variant:
    return VARIANTS.get(name, Variant(name))


def _parts_of(name: str) -> MethodParts:
    """Returns the components of a method or a variant of one."""
    try:
        return method_parts(_variant(name).method)
    except KeyError as error:
        variants = ", ".join(VARIANTS)
        raise UserError(f"{error.args[0]}, or from {variants}") from error


def _ratios_of(name: str, ratios: Sequence[float]) -> Sequence[float | None]:
    if _parts_of(name).fork != "dfs":
        return [None]
    return [sorted(ratios)[len(ratios) // 2]] if name in VARIANTS else ratios


def _config_of(config: Config, name: str, ratio: float | None) -> Config:
    """Returns the config of a method; options of a component are kept if it stays the same."""
    variant, parts = _variant(name), _parts_of(name)
    parts = parts._replace(loss=parts.loss or "deep_supervision")
    fields: dict[str, Any] = {f"model.{key}": value for key, value in variant.model.items()}
    for section, component in parts._asdict().items():
        if config[section].name != component:
            fields |= {f"{section}.{key}": None for key in config[section]}
            fields[f"{section}.name"] = component
    fields["fork.partition_ratio"] = None if ratio is None else (ratio,)
    return changed(config, {**fields, "gradients.exits": variant.exits})


def without_augmentation(config: Config) -> Config:
    """Returns the config without augmentation, which a peer does not have."""
    options = {f"data.{key}": None for key in config.data if key.startswith(_AUGMENTATION_OPTIONS)}
    return changed(config, {"data.augmentation": "none", **options})


def changed(config: Config, fields: dict[str, Any]) -> Config:
    """Returns a copy of the config with other values for some fields, "model.width" style."""
    config = copy.deepcopy(config)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def noise_like(config: Config, batch_size: int) -> Dataset:
    """Returns a few batches of noise with the shape of the config's data set."""
    num_classes, image_shape = image_set_shape(config.data)
    draw, count = np.random.default_rng(config.seed), _MADE_UP_BATCHES * batch_size
    images = draw.integers(0, 256, (count, *image_shape), np.uint8)
    split = Split(images, draw.integers(0, num_classes, count, np.int32))
    mean, std = channel_statistics(images)
    names = tuple(map(str, range(num_classes)))
    return Dataset(config.data.name, split, None, split, names, mean, std)


def create_peer(name: str) -> Peer:
    """Returns a peer of `PEERS`; raises UserError if it is not installed."""
    try:
        return PEERS.create(name)
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        raise UserError(f"the {name} peer is not installed: run in this repository") from error


def count_operations(cases: Sequence[Case]) -> dict[tuple, dict[str, int | None]]:
    """Returns the operations of every kind of case, by key."""
    counted = {}
    for case in cases:
        if case.key not in counted:
            counted[case.key] = _operations(case)
    return counted


def _operations(case: Case) -> dict[str, int | None]:
    if not case.experiment.rule.is_plain_sum:
        return {"macs": None, "macs_theory": None}
    model, dataset = case.experiment.model, case.experiment.dataset
    if case.framework != OURS:
        model = model.clone(partitioned_backward=False)  # peers differentiate the naive graph
    parts = model, case.experiment.fork, case.experiment.loss, dataset.image_shape
    traced, theory = traced_step_cost(*parts), theoretical_step_cost(*parts)
    return {"macs": traced.total, "macs_theory": theory.total}


def _measure(cases: Sequence[Case], rival: Peer | None, repeats: int) -> list[CostRow]:
    """Measures one batch size. The peer's programs are built first, since it may refuse them."""
    made: dict[int, StepPrograms] = {}
    for i, case in sorted(enumerate(cases), key=lambda item: item[1].framework == OURS):
        beta = "" if case.partition_ratio is None else f" {case.partition_ratio:g}"
        program.say(f"preparing {case.method}{beta}, {case.framework} {case.layout}")
        if rival is not None and case.framework == rival.name:
            made[i] = rival.compile_step(case.experiment, case.layout)
        else:
            made[i] = compile_step(case.experiment, plain_jit=_variant(case.method).plain_jit)
    programs = [made[i] for i in range(len(cases))]
    times = time_steps(programs, repeats)
    return [_row(*items) for items in zip(cases, programs, times, strict=True)]


def _row(case: Case, programs: StepPrograms, times: StepTimes) -> CostRow:
    config = case.experiment.config
    return {
        "model": config.model.name,
        "method": case.method,
        "partition_ratio": case.partition_ratio,
        "batch": config.batch_size,
        "framework": case.framework,
        "layout": case.layout,
        **times._asdict(),
        "images_per_second": 1e3 * config.batch_size / times.step_ms,
        "compile_s": programs.compile_s,
        "peak_mib": programs.peak_mib,
        "fork": config.fork.name,
        "loss": config.loss.name,
        "published_loop": case.experiment.rule.published_loop(case.experiment.model.num_exits),
    }


def _headline(experiment: Experiment, rival: Peer | None, repeats: int) -> str:
    config, (height, width, _) = experiment.config, experiment.dataset.image_shape
    augmentation = config.data.augmentation or "none"
    beside = "" if rival is None else f" (always with {rival.name})"
    return (
        f"{config.model.name} on {height}x{width} noise, batch {config.batch_size}, "
        f"{available_cores()} cores, medians of {repeats} rounds.\n"
        f"Every step normalises its images; augmentation: {augmentation}{beside}."
    )
