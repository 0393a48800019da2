"""Cells of a suite, and the config of the run for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from dfs_jax.training.config import MAY_CHANGE
from dfs_jax.types import Config, UserError

# Fields that are part of a cell's identity, although a run may change them.
_MEASURED = {"conflict_every_steps", "conflict_examples", "init_from"}
_LEFT_OUT = set(MAY_CHANGE) - _MEASURED


class Cell(NamedTuple):
    """One run: a method, a network, a data set, a number of epochs and a random seed.

    Attributes:
      network: name of the network in the suite.
      data: name of the data set.
      method: name of the method in the suite; "dsn" is the reference.
      epochs: number of epochs.
      seed: random seed.
    """

    network: str
    data: str
    method: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell in files and messages.

        >>> Cell("vgg7_w16", "cifar10", "dfs", 3, 0).name
        'vgg7_w16/cifar10/3ep/dfs/seed0'
        """
        return f"{self.network}/{self.data}/{self.epochs}ep/{self.method}/seed{self.seed}"


class Suite(NamedTuple):
    """Cells in order of importance.

    Attributes:
      name: name of the suite, and of the results' file.
      cells: the cells, without duplicates.
      config_of: function that returns the config of a cell's run.
      seconds_of: function that returns the measured time of a cell on one core, or None.
      reported_split: "test", or "validation" for a suite that choices are made by.
    """

    name: str
    cells: tuple[Cell, ...]
    config_of: Callable[[Cell], Config]
    seconds_of: Callable[[Cell], float | None]
    reported_split: str = "test"


def grid(
    networks: Sequence[str],
    data: Sequence[str],
    methods: Sequence[str],
    epochs: int,
    seeds: Sequence[int],
) -> tuple[Cell, ...]:
    """Returns the cells of a grid, seed by seed, so that each seed is soon complete.

    >>> [cell.method for cell in grid(["vgg7"], ["digits"], ["dsn", "dfs"], 2, [0, 1])]
    ['dsn', 'dfs', 'dsn', 'dfs']
    """
    return tuple(
        Cell(network, name, method, epochs, seed)
        for seed in seeds
        for network in networks
        for name in data
        for method in methods
    )


def choose(cells: Sequence[Cell], pattern: str, methods: Sequence[str]) -> tuple[Cell, ...]:
    """Returns the cells whose name matches the pattern and whose method is listed, if any are.

    Raises:
      UserError: a method that no cell has, or no matching cell.
    """
    known = {cell.method for cell in cells}
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise UserError(
            f"no cell has the method(s) {', '.join(unknown)}: there are {', '.join(sorted(known))}"
        )
    chosen = tuple(
        cell
        for cell in cells
        if fnmatchcase(cell.name, pattern) and (not methods or cell.method in methods)
    )
    if not chosen:
        raise UserError(f"no cell is called {pattern!r}: --list shows their names")
    return chosen


def cell_config(suite: Suite, cell: Cell, data_dir: str | None = None) -> Config:
    """Returns the config of a cell's run."""
    config = suite.config_of(cell)
    config.seed, config.epochs = cell.seed, cell.epochs
    if data_dir is not None:
        config.data.data_dir = data_dir
    return config


def config_hash(config: Config) -> str:
    """Returns a hash of the fields that affect results: 16 hexadecimal digits.

    Fields that are not set do not count, so that new options of the library leave old results
    valid; neither do the location of the data and the devices.
    """
    fields = {name: value for name, value in _flat(config.to_dict()) if value is not None}
    kept = {name: value for name, value in fields.items() if name not in _LEFT_OUT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _flat(tree: Mapping[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
