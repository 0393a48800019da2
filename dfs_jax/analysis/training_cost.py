"""What training costs, method by method: the paper's training-efficiency experiment.

    python -m dfs_jax.analysis.training_cost --config=configs/cifar100_vgg7.py --batch_sizes=64,128
        [--methods=dsn,byot,dfs] [--partition_ratios=0.3,0.5,0.7] [--peer=torch] [--repeats=N]
        [--output=FILE.json]

Times the config's own training step on made-up images of the data set's shape, so that the set
need not be there: forward, backward, the rest, making a batch; compilation and memory; operations.
`--peer=torch` times the same networks in PyTorch in the same run. Prints a table; `--output` writes
every number, and a picture beside it.

Reference: Gong et al., "Deep Feature Surgery", ECCV 2024, figures 4 and 5 (right).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import flags
from ml_collections import config_flags

from dfs_jax import program
from dfs_jax.analysis.cost_report import image_set_shape
from dfs_jax.analysis.cost_table import CostRow, cost_table
from dfs_jax.analysis.report import write_whole
from dfs_jax.analysis.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.analysis.step_timing import StepPrograms, StepTimes, compile_step, time_steps
from dfs_jax.data.dataset import Dataset, Split
from dfs_jax.data.statistics import channel_statistics
from dfs_jax.losses import create_loss
from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.registry import Registry
from dfs_jax.training.experiment import Experiment, build_experiment, model_from_config
from dfs_jax.types import Config, UserError, check_whole

PEERS = Registry("peer", {"torch": "benchmarks.torch_peer:TorchPeer"})

OURS, OUR_LAYOUT = "jax", "channels_last"
_BATCHES = 4  # made-up batches to take turns with


class Method(NamedTuple):
    """What a row trains.

    Attributes:
      fork, loss: their names in a config.
      model: options of the model besides the config's own.
      peer: whether a peer runs it too; the others are other ways to run the same method.
    """

    fork: str
    loss: str
    model: Mapping[str, Any] = MappingProxyType({})
    peer: bool = True


METHODS = {
    "dsn": Method("plain", "deep_supervision"),
    "byot": Method("plain", "byot"),
    "dfs": Method("dfs", "deep_supervision"),
    "dfs_byot": Method("dfs", "byot"),
    # As one writes it: the whole input gradient is computed, then cut.
    "dfs_naive": Method("dfs", "deep_supervision", {"partitioned_backward": False}, peer=False),
    # And every layer is Flax's own.
    "dfs_flax": Method(
        "dfs",
        "deep_supervision",
        {"partitioned_backward": False, "cpu_kernels": False},
        peer=False,
    ),
}
DEFAULT_METHODS = ("dsn", "byot", "dfs", "dfs_naive", "dfs_flax")


class Peer(Protocol):
    """Another framework that runs the same training steps.

    Attributes:
      name: of the framework.
      layouts: how images may lie in memory, a row each.
    """

    name: str
    layouts: Sequence[str]

    def compile_step(self, experiment: Experiment, layout: str) -> StepPrograms:
        """Returns the parts of the experiment's step; raises UserError for what it cannot run."""
        ...


class Case(NamedTuple):
    """One row to measure: a method in one framework."""

    method: str
    partition_ratio: float | None
    framework: str
    layout: str
    experiment: Experiment


def main() -> None:
    """Runs the program."""
    config = config_flags.DEFINE_config_file("config", None, "A run's configuration file.")
    batch_sizes = flags.DEFINE_list("batch_sizes", None, "Images a step; the config's own.")
    methods = flags.DEFINE_list("methods", None, f"Of {', '.join(METHODS)}.")
    ratios = flags.DEFINE_list("partition_ratios", ["0.3", "0.5", "0.7"], "Betas of DFS.")
    peer = flags.DEFINE_string("peer", None, "Another framework to measure beside: torch.")
    repeats = flags.DEFINE_integer("repeats", 9, "Rounds that medians are taken of.")
    output = flags.DEFINE_string("output", None, "The JSON file to write, with a PNG beside it.")
    flags.mark_flag_as_required("config")

    def run() -> None:
        program.use_compilation_cache()
        path = None if output.value is None else check_output(Path(output.value).absolute())
        rows = measure_training_cost(
            config.value,
            batch_sizes=_numbers("batch_sizes", batch_sizes.value, int),
            methods=methods.value,
            partition_ratios=_numbers("partition_ratios", ratios.value, float) or (),
            peer=peer.value,
            repeats=repeats.value,
        )
        if path is not None:
            write_training_cost(rows, path)

    program.run(run)


def measure_training_cost(
    config: Config,
    *,
    batch_sizes: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    partition_ratios: Sequence[float] = (0.3, 0.5, 0.7),
    peer: str | None = None,
    repeats: int = 9,
) -> list[CostRow]:
    """Compiles and times every method at every batch size, and prints a table for each size.

    Args:
      config: of a run; DFS refers to foreign features as its fork says.
      batch_sizes: images a step; None for the config's own.
      methods: of `METHODS`; None for `DEFAULT_METHODS`, as far as the model has their options.
      partition_ratios: betas of DFS; the other ways to run it are timed at the middle one.
      peer: of `PEERS`, or one's own "package.module:attribute"; nothing is then augmented.
      repeats: rounds that medians are taken of.

    Returns:
      One dict a row, with the fields of the JSON file: `model`, `method`, `partition_ratio`,
      `batch`, `framework`, `layout`, `forward_ms`, `backward_ms`, `other_ms`, `step_ms`, `data_ms`,
      `images_per_second`, `compile_s`, `peak_mib`, and of one image `macs`, those of the step as it
      runs, and `macs_theory`, those without the gradients of inputs that train nothing.

    Raises:
      UserError: an unknown name or a value out of range, told before anything is compiled.
    """
    check_whole("repeats", repeats)
    rival = None if peer is None else _create_peer(peer)
    if rival is not None:
        config = _changed(config, {"data.augmentation": "none"})
    dataset = _made_up_dataset(config, max(batch_sizes or [config.batch_size]))
    planned = []
    for batch in batch_sizes or [config.batch_size]:
        check_whole("each of batch_sizes", batch)
        sized = _changed(config, {"batch_size": batch})
        planned.append(_plan(sized, dataset, methods, partition_ratios, rival))
    rows: list[CostRow] = []
    for cases in planned:
        measured = _measure(cases, rival, repeats)
        program.say(f"{_headline(cases[0].experiment, rival, repeats)}\n{cost_table(measured)}\n")
        rows += measured
    return rows


def write_training_cost(rows: Sequence[CostRow], path: Path) -> None:
    """Writes the rows as JSON to `path`, and a picture of them beside it."""
    from dfs_jax.analysis.cost_plots import plot_training_cost

    content = json.dumps(rows, indent=2, allow_nan=False) + "\n"
    program.say(f"wrote {write_whole(path, content.encode())}")
    program.say(f"wrote {plot_training_cost(rows, path.with_suffix('.png'))}")


def check_output(path: Path) -> Path:
    """Returns the path if a JSON file and a picture beside it can be written there.

    Raises:
      UserError: they cannot.
    """
    if path.suffix != ".json":
        raise UserError(f"output {path} must end in .json: the picture's name ends in .png instead")
    for file in (path, path.with_suffix(".png")):
        if file.is_dir():
            raise UserError(f"output {file} is a directory: name a file")
    write_whole(path.with_name(f".{path.name}.probe"), b"").unlink()
    return path


def _numbers(flag: str, texts: Sequence[str] | None, kind: type) -> list[Any] | None:
    try:
        return None if texts is None else [kind(text) for text in texts]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        given = ",".join(texts or ())
        raise UserError(f"{flag} must be {what} with commas between, got {given!r}") from error


def _plan(
    config: Config,
    dataset: Dataset,
    names: Sequence[str] | None,
    ratios: Sequence[float],
    rival: Peer | None,
) -> list[Case]:
    """Builds the experiments of one batch size, ours first."""
    cases = []
    for name in names or _default_methods(config):
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
        method = METHODS[name]
        for ratio in _ratios_of(method, ratios):
            experiment = build_experiment(_config_of(config, method, ratio), dataset)
            cases.append(Case(name, ratio, OURS, OUR_LAYOUT, experiment))
    if rival is None:
        return cases
    theirs = [
        case._replace(framework=rival.name, layout=layout)
        for case in cases
        if METHODS[case.method].peer
        for layout in rival.layouts
    ]
    return cases + theirs


def _default_methods(config: Config) -> list[str]:
    loss = create_loss(METHODS["dsn"].loss)
    model = model_from_config(config.model, loss, num_classes=2)
    has_options = isinstance(model, ConvolutionalModel)
    return [name for name in DEFAULT_METHODS if has_options or not METHODS[name].model]


def _ratios_of(method: Method, ratios: Sequence[float]) -> Sequence[float | None]:
    if method.fork == "plain":
        return [None]
    return ratios if method.peer else sorted(ratios)[len(ratios) // 2 :][:1]


def _config_of(config: Config, method: Method, ratio: float | None) -> Config:
    """Returns the config of a method; options of a fork or a loss stay where it is the same one."""
    fork = {} if method.fork == config.fork.name else _without_options(config.fork)
    loss = {} if method.loss == config.loss.name else _without_options(config.loss)
    return _changed(
        config,
        {
            **{f"fork.{key}": value for key, value in fork.items()},
            **{f"loss.{key}": value for key, value in loss.items()},
            **{f"model.{key}": value for key, value in method.model.items()},
            "fork.name": method.fork,
            "fork.partition_ratio": None if ratio is None else (ratio,),
            "loss.name": method.loss,
        },
    )


def _without_options(section: Config) -> dict[str, None]:
    return {key: None for key in section if key != "name"}


def _changed(config: Config, fields: Mapping[str, Any]) -> Config:
    config = copy.deepcopy(config)
    with config.unlocked():
        config.update_from_flattened_dict(dict(fields))
    return config


def _made_up_dataset(config: Config, batch_size: int) -> Dataset:
    """Returns noise of the shape of the config's set, a few batches of it."""
    num_classes, image_shape = image_set_shape(config.data)
    draw = np.random.default_rng(config.seed)
    count = _BATCHES * batch_size
    images = draw.integers(0, 256, (count, *image_shape), np.uint8)
    split = Split(images, draw.integers(0, num_classes, count, np.int32))
    mean, std = channel_statistics(images)
    names = tuple(map(str, range(num_classes)))
    return Dataset(config.data.name, split, None, split, names, mean, std)


def _create_peer(name: str) -> Peer:
    try:
        return PEERS.create(name)
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        raise UserError(
            f"peer {name!r} comes with the repository: run from its directory"
        ) from error


def _measure(cases: Sequence[Case], rival: Peer | None, repeats: int) -> list[CostRow]:
    """Measures the cases of one batch size; a peer's, which may refuse, are made first."""
    made: dict[int, StepPrograms] = {}
    for i, case in sorted(enumerate(cases), key=lambda item: item[1].framework == OURS):
        beta = "" if case.partition_ratio is None else f" {case.partition_ratio:g}"
        program.say(f"preparing {case.method}{beta}, {case.framework} {case.layout}")
        if rival is None or case.framework == OURS:
            made[i] = compile_step(case.experiment)
        else:
            made[i] = rival.compile_step(case.experiment, case.layout)
    programs = [made[i] for i in range(len(cases))]
    times = time_steps(programs, repeats)
    return [_row(*items) for items in zip(cases, programs, times, strict=True)]


def _row(case: Case, programs: StepPrograms, times: StepTimes) -> CostRow:
    experiment, method = case.experiment, METHODS[case.method]
    model, shape = experiment.model, experiment.dataset.image_shape
    if case.framework != OURS:  # it differentiates the naive graph
        model = model.clone(partitioned_backward=False)
    parts = model, experiment.fork, experiment.loss, shape
    return {
        "model": experiment.config.model.name,
        "method": case.method,
        "fork": method.fork,
        "loss": method.loss,
        "partition_ratio": case.partition_ratio,
        "batch": experiment.config.batch_size,
        "framework": case.framework,
        "layout": case.layout,
        **times._asdict(),
        "images_per_second": 1e3 * experiment.config.batch_size / times.step_ms,
        "compile_s": programs.compile_s,
        "peak_mib": programs.peak_mib,
        "macs": traced_step_cost(*parts).total,
        "macs_theory": theoretical_step_cost(*parts).total,
    }


def _headline(experiment: Experiment, rival: Peer | None, repeats: int) -> str:
    height, width, _ = experiment.dataset.image_shape
    config, cores = experiment.config, len(os.sched_getaffinity(0))
    augmentation = config.data.augmentation or "none"
    against = "" if rival is None else f" (none beside {rival.name}, which has none)"
    return (
        f"\n{config.model.name} on {height}x{width} noise, batch {config.batch_size}, {cores} "
        f"cores, medians of {repeats} rounds.\n"
        f"Images are normalised; augmentation: {augmentation}{against}."
    )


if __name__ == "__main__":
    main()
