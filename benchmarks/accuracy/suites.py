"""Suites: `small` for two cores, `search` for choosing its recipes, `paper` as published.

`small` trains narrow networks on whole sets of 45,000 images of 32x32 pixels for an epoch, some for
eight, all by one recipe: batches of 100, SGD with momentum 0.9, a cosine from 0.1 with a quarter of
an epoch of warm-up, weight decay 5e-4, crop and flip. Nothing of it was tuned for any method. The
headline was fixed beforehand: DFS symmetric at beta 0.5 against DSN, three paired seeds.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy.cells import Cell, Suite, grid
from configs import common
from dfs_jax.types import Config, UserError

SHORT, LONG = 1, 8  # epochs
SETS = ("cifar10", "tiny_imagenet100")
SINGLE = ("byot", "ge", "pcgrad", "cagrad", "meta_gf", "wpn")
HEADLINE = ("dsn", *SINGLE, "dfs", "dfs_trunk_only", "dfs_none")
PAIR = ("dsn", "dfs", "dfs_trunk_only")
BETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Chosen by the search on validation data, and the same recipe without surgery; see `search`.
BEST = ("dfs_trunk_only_early_batch50_flip", "dsn_batch50_flip")
# Useful for the first exits and for small budgets, by longer runs of the search.
CONFIRMED = ("dsn", "dfs_trunk_only_two")
TWO_EXITS = "vgg7_w16_2exits"
FEWER_EXITS = ("vgg7_w16_3exits", TWO_EXITS)
SEARCH_SEED = 100  # and beyond: the table's seeds take no part in a choice

NETWORKS: dict[str, dict[str, Any]] = {
    "vgg7_w16": {"model.name": "vgg7", "model.width": 16},
    "vgg7_w16_3exits": {"model.name": "vgg7", "model.width": 16, "model.exits": (2, 4, 6)},
    "vgg7_w16_2exits": {"model.name": "vgg7", "model.width": 16, "model.exits": (1, 6)},
    "vgg7_w32": {"model.name": "vgg7", "model.width": 32},
    "resnet18_w16": {"model.name": "resnet18", "model.width": 16, "model.stem": "cifar"},
    "msdnet_g4": {
        "model.name": "msdnet_cifar_anytime",
        "model.num_exits": 5,
        "model.growth": 4,
        "model.initial_channels": 8,
    },
}

# Betas by exit. Where beta is 1, trunk_only changes nothing: the trunk and the exit both train all.
_FALLING, _RISING = (0.9, 0.8, 0.7, 0.6, 0.5), (0.5, 0.6, 0.7, 0.8, 0.9)
_EARLY, _FIRST = (0.8, 0.9, 1.0, 1.0, 1.0), (0.5, 1.0, 1.0, 1.0, 1.0)
_TWO = (0.5, 0.5, 1.0, 1.0, 1.0)
_TRUNK_ONLY = {"fork.referencing": "trunk_only"}
# As many operations in more steps; by the rule that a rate goes with the batch.
_BATCH50 = {"batch_size": 50, "optimizer.learning_rate": 0.05}
_BATCH25 = {"batch_size": 25, "optimizer.learning_rate": 0.025}
_FLIP = {"data.augmentation": "flip"}
_AUGMENTED = {"data.augmentation": "crop,flip,autoaugment,cutout"}
# By name: what stands after a config's colon, and the fields that are changed.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dsn": ("dsn", {}),
    "byot": ("byot", {}),
    "ge": ("ge", {}),
    "pcgrad": ("pcgrad", {}),
    "cagrad": ("cagrad", {}),
    "meta_gf": ("meta_gf", {}),
    "wpn": ("wpn", {}),
    "dfs": ("dfs", {"fork.referencing": "symmetric"}),
    "dfs_trunk_only": ("dfs", _TRUNK_ONLY),
    "dfs_none": ("dfs", {"fork.referencing": "none"}),
    **{f"dfs_beta{b}": ("dfs", {"fork.partition_ratio": (b,)}) for b in BETAS if b != 0.5},
    **{
        f"dfs_trunk_only_beta{b}": ("dfs", {**_TRUNK_ONLY, "fork.partition_ratio": (b,)})
        for b in BETAS
        if b != 0.5
    },
    "dfs_falling": ("dfs", {"fork.partition_ratio": _FALLING}),
    "dfs_trunk_only_falling": ("dfs", {**_TRUNK_ONLY, "fork.partition_ratio": _FALLING}),
    "dfs_trunk_only_rising": ("dfs", {**_TRUNK_ONLY, "fork.partition_ratio": _RISING}),
    "dfs_trunk_only_early": ("dfs", {**_TRUNK_ONLY, "fork.partition_ratio": _EARLY}),
    "dfs_trunk_only_first": ("dfs", {**_TRUNK_ONLY, "fork.partition_ratio": _FIRST}),
    "dfs_trunk_only_two": ("dfs", {**_TRUNK_ONLY, "fork.partition_ratio": _TWO}),
    "dsn_augmented": ("dsn", _AUGMENTED),
    "dfs_augmented": ("dfs", _AUGMENTED),
    "dfs_trunk_only_augmented": ("dfs", {**_TRUNK_ONLY, **_AUGMENTED}),
    "distillation": ("distillation", {}),
    "dfs_distillation": ("dfs+distillation", {}),
    "dfs_trunk_only_distillation": ("dfs+distillation", _TRUNK_ONLY),
    **{
        f"dfs_trunk_only_{name}_distillation": (
            "dfs+distillation",
            {**_TRUNK_ONLY, "fork.partition_ratio": betas},
        )
        for name, betas in (("falling", _FALLING), ("early", _EARLY), ("first", _FIRST))
    },
    "dsn_batch50": ("dsn", _BATCH50),
    "dsn_batch50_flip": ("dsn", {**_BATCH50, **_FLIP}),
    "dfs_trunk_only_early_batch50": (
        "dfs",
        {**_TRUNK_ONLY, "fork.partition_ratio": _EARLY, **_BATCH50},
    ),
    "dfs_trunk_only_early_batch50_flip": (
        "dfs",
        {**_TRUNK_ONLY, "fork.partition_ratio": _EARLY, **_BATCH50, **_FLIP},
    ),
    "dsn_batch25_flip": ("dsn", {**_BATCH25, **_FLIP}),
    **{
        f"dfs_trunk_only_{name}_batch25_flip": (
            "dfs",
            {**_TRUNK_ONLY, "fork.partition_ratio": betas, **_BATCH25, **_FLIP},
        )
        for name, betas in (("early", _EARLY), ("first", _FIRST))
    },
    "dfs_byot": ("dfs+byot", {}),
    # The published recipe of ResNet18: surgery, BYOT's losses and strong augmentation together.
    "byot_augmented": ("byot", _AUGMENTED),
    "dfs_byot_augmented": ("dfs+byot", _AUGMENTED),
}

_IMAGES = 45_000
# Busy seconds of one core for 1,000 training images, on an AMD EPYC with the other core busy too.
SECONDS = {
    **dict.fromkeys(("vgg7_w16", *FEWER_EXITS), 2.1),
    "vgg7_w32": 4.6,
    "resnet18_w16": 8.4,
    "msdnet_g4": 9.1,
}
# Over deep supervision.
_COSTS = {"byot": 1.05, "pcgrad": 2.1, "cagrad": 2.1, "meta_gf": 2.8, "wpn": 2.2}
_SECONDS_A_CELL = 35  # tracing, compilation, the probe and the last evaluation
_PROBES = 6  # of the exits' conflict, in a run


def small(seeds: int | None = None) -> Suite:
    """Returns the suite for two cores; rows with intervals have this number of seeds (3)."""
    paired = range(3 if seeds is None else seeds)
    longer = ("vgg7_w16",)
    sweep = [f"dfs_beta{b}" for b in BETAS if b != 0.5]
    ends = [f"dfs_trunk_only_beta{b}" for b in (0.1, 0.3, 0.7, 0.9)]
    cells = (
        *grid(["vgg7_w16"], SETS, (*HEADLINE, *BEST), SHORT, paired),
        *grid(FEWER_EXITS, SETS[:1], PAIR, SHORT, [0]),
        *grid(longer, SETS, CONFIRMED, LONG, paired),
        *grid(longer, SETS[:1], ("dfs", "dfs_trunk_only", *BEST), LONG, [0]),
        *grid(longer, SETS[:1], sweep, SHORT, [0]),
        *grid(["vgg7_w32"], SETS[:1], PAIR, SHORT, [0]),
        *(
            cell
            for network, methods in OTHER_NETWORKS.items()
            for cell in grid([network], SETS[:1], methods, SHORT, [0])
        ),
        *grid(longer, SETS[:1], ends, SHORT, [0]),
        *grid(longer, SETS[:1], PER_EXIT, SHORT, [0]),
        *grid(longer, SETS[:1], RECIPES, SHORT, [0]),
        *grid(longer, SETS[1:], ("dfs", "dfs_trunk_only"), LONG, [0]),
        *grid(longer, SETS, WITH_BYOT[1:], SHORT, paired),
        *grid(longer, SETS[:1], PUBLISHED, LONG, paired),
    )
    return Suite("small", cells, _small_config, _seconds)


PER_EXIT = (
    "dfs_falling",
    "dfs_trunk_only_falling",
    "dfs_trunk_only_rising",
    "dfs_trunk_only_early",
    "dfs_trunk_only_first",
)
RECIPES = (
    "distillation",
    "dfs_distillation",
    "dfs_trunk_only_distillation",
    "dsn_augmented",
    "dfs_augmented",
    "dfs_trunk_only_augmented",
)
# With the referencing that the published code has for each.
OTHER_NETWORKS = {
    "resnet18_w16": ("dsn", "byot", "dfs"),
    "msdnet_g4": ("dsn", "byot", "dfs_trunk_only"),
}
WITH_BYOT = ("byot", "dfs_byot")
PUBLISHED = ("byot_augmented", "dfs_byot_augmented")
CANDIDATES = (
    "dsn",
    "dfs_trunk_only_falling",
    "dfs_trunk_only_early",
    "dfs_trunk_only_first",
    "dfs_trunk_only_beta0.9",
    "distillation",
    "dfs_trunk_only_falling_distillation",
    "dfs_trunk_only_early_distillation",
    "dfs_trunk_only_first_distillation",
    # The second attempt, after the first nine were seen: a run this short lacks steps.
    "dsn_batch50",
    "dsn_batch50_flip",
    "dfs_trunk_only_early_batch50",
    "dfs_trunk_only_early_batch50_flip",
    # The third, after the headline and the first long runs were seen: still more steps; and longer
    # runs, where surgery at every fork had gained at exits 1 and 2 and lost at the others.
    "dsn_batch25_flip",
    "dfs_trunk_only_early_batch25_flip",
    "dfs_trunk_only_first_batch25_flip",
)
LONG_CANDIDATES = ("dsn", "dfs_trunk_only_early", "dfs_trunk_only_two")
LONG_OF_TWO_EXITS = ("dsn", "dfs_trunk_only")  # whose gradients agree least


def search(seeds: int | None = None) -> Suite:
    """Returns the cells that recipes are chosen by: on validation data, from seeds of their own."""
    numbers = range(SEARCH_SEED, SEARCH_SEED + (1 if seeds is None else seeds))
    cells = (
        *grid(["vgg7_w16"], SETS, CANDIDATES, SHORT, numbers),
        *grid(["vgg7_w16"], SETS, LONG_CANDIDATES, LONG, numbers),
        *grid([TWO_EXITS], SETS[:1], LONG_OF_TWO_EXITS, LONG, numbers),
    )
    return Suite("search", cells, _small_config, _seconds, reported_split="validation")


# By config: the methods of the published tables that the library has, and the epochs.
PUBLISHED_SETTINGS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "cifar100_vgg7": (("dsn", "byot", *(f"dfs_beta{b}" for b in (0.1, 0.5, 0.9))), 100, 3),
    "cifar100_resnet18": (("dsn", "byot", "dfs"), 300, 3),
    "cifar100_msdnet": (("dsn", "ge", "cagrad", "pcgrad", "nash_mtl", "dfs"), 300, 3),
    "imagenet_msdnet": (("dsn", "ge", "cagrad", "pcgrad", "dfs"), 90, 1),
}
# What is worth most, first; what the settings have besides comes last.
FIRST_METHODS = {
    "cifar100_resnet18": ("dfs", "byot", "dsn"),
    "cifar100_vgg7": ("dsn", "byot", "dfs_beta0.5", "dfs_beta0.1", "dfs_beta0.9"),
    "cifar100_msdnet": ("dfs", "dsn", "ge", "pcgrad"),
}
# Networks with only their last exit, by width: the alternative to a network with several exits.
STATIC_WIDTHS = {"cifar100_resnet18": (64, 45, 32), "cifar100_vgg7": (64, 45, 32)}
_STATIC_MODELS: dict[str, dict[str, Any]] = {
    "cifar100_resnet18": {"model.name": "benchmarks.accuracy.static:StaticResNet18"},
    "cifar100_vgg7": {"model.exits": (6,)},
}
_EVALUATIONS = 50  # of a published run, each with a checkpoint


def paper(seeds: int | None = None) -> Suite:
    """Returns the published settings, which need an accelerator."""
    first = [
        grid([name], [_data_of(name)], methods, _epochs_of(name), _seeds_of(name, seeds))
        for name, methods in FIRST_METHODS.items()
    ]
    static = [
        grid([name], [_data_of(name)], [f"static_w{w}" for w in widths], _epochs_of(name), [0])
        for name, widths in STATIC_WIDTHS.items()
    ]
    others = [
        grid([name], [_data_of(name)], _others(name), _epochs_of(name), _seeds_of(name, seeds))
        for name in PUBLISHED_SETTINGS
    ]
    cells = (
        *(cell for group in first for cell in group if cell.seed == 0),
        *(cell for group in static for cell in group),
        *sorted((c for group in first for c in group if c.seed), key=lambda c: c.seed),
        *(cell for group in others for cell in group),
    )
    return Suite("paper", cells, _paper_config, lambda cell: None)


def _others(name: str) -> tuple[str, ...]:
    methods, *_ = PUBLISHED_SETTINGS[name]
    return tuple(method for method in methods if method not in FIRST_METHODS.get(name, ()))


def _data_of(name: str) -> str:
    return _published_config(name, "dfs").data.name


def _epochs_of(name: str) -> int:
    return PUBLISHED_SETTINGS[name][1]


def _seeds_of(name: str, asked: int | None) -> range:
    return range(PUBLISHED_SETTINGS[name][2] if asked is None else asked)


SUITES = {"small": small, "search": search, "paper": paper}


def create_suite(name: str, seeds: int | None = None) -> Suite:
    """Returns a suite.

    Raises:
      UserError: there is none of that name, or fewer than one seed.
    """
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}: choose one of {', '.join(SUITES)}")
    if seeds is not None and seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    return SUITES[name](seeds)


def _small_config(cell: Cell) -> Config:
    method, changes = METHODS[cell.method]
    config = common.get_config(method)
    config.data.name = cell.data
    config.batch_size = 100
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 0.25
    config.eval_every_epochs = max(1, cell.epochs // 7)
    config.update_from_flattened_dict({**NETWORKS[cell.network], **changes})
    if cell.network in ("vgg7_w16", *FEWER_EXITS):
        config.conflict_every_steps = cell.epochs * (_IMAGES // config.batch_size) // _PROBES
    return config


def _paper_config(cell: Cell) -> Config:
    """Returns a published config with the changes for a GPU: see `docs/gpu.md`.

    Blocks compute in bfloat16, and evaluations are few. With another number of epochs, the learning
    rate decays at the same fractions of the run.
    """
    method, _, beta = cell.method.partition("_beta")
    static, _, width = cell.method.partition("_w")
    config = _published_config(cell.network, "dsn" if static == "static" else method)
    config.compute_dtype = "bfloat16"
    config.eval_every_epochs = max(1, cell.epochs // _EVALUATIONS)
    published, decays = _epochs_of(cell.network), config.schedule.decay_epochs
    if decays is not None and cell.epochs != published:
        config.schedule.decay_epochs = _scaled(decays, cell.epochs, published)
    if beta:
        config.fork.partition_ratio = (float(beta),)
    if static == "static":
        config.update_from_flattened_dict(_STATIC_MODELS[cell.network])
        config.model.width = int(width)
    if cell.method == "dsn" and cell.data == "cifar100":  # once, at the end
        config.conflict_every_steps = cell.epochs * (_IMAGES // config.batch_size)
    return config


def _scaled(decays: Sequence[int], epochs: int, published: int) -> tuple[int, ...]:
    """Returns the epochs of decay of a shorter or longer run, none beyond its last.

    >>> _scaled((250, 280, 295), 30, 300), _scaled((250, 280, 295), 2, 300)
    ((25, 28, 29), (1,))
    """
    if epochs < 2:
        raise UserError(f"a run whose learning rate decays has at least 2 epochs, got {epochs}")
    places = (round(epoch * epochs / published) for epoch in decays)
    return tuple(sorted({min(max(place, 1), epochs - 1) for place in places}))


def _published_config(name: str, method: str) -> Config:
    return importlib.import_module(f"configs.{name}").get_config(method)


def _seconds(cell: Cell) -> float:
    images = _IMAGES * cell.epochs / 1000
    cost = _COSTS.get(cell.method, 1.0)
    return _SECONDS_A_CELL + images * SECONDS[cell.network] * cost
