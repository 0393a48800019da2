"""What a cell of the table is, and the config of the run that fills it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from dfs_jax.training.config import MAY_CHANGE
from dfs_jax.types import Config, UserError

# Part of what a cell holds, though a run may change them while it goes on.
_MEASURED = {"conflict_every_steps", "conflict_examples", "init_from"}
_LEFT_OUT = set(MAY_CHANGE) - _MEASURED


class Cell(NamedTuple):
    """One run: a method on a network and a data set, for so many epochs, from one seed.

    Attributes:
      network: a name that the suite knows.
      data: of the data set.
      method: a name that the suite knows; "dsn" is what others are compared with.
      epochs: of training.
      seed: of the run.
    """

    network: str
    data: str
    method: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """What the cell is called everywhere.

        >>> Cell("vgg7_w16", "cifar10", "dfs", 3, 0).name
        'vgg7_w16/cifar10/3ep/dfs/seed0'
        """
        return f"{self.network}/{self.data}/{self.epochs}ep/{self.method}/seed{self.seed}"


class Suite(NamedTuple):
    """Cells in the order in which they are worth having.

    Attributes:
      name: of the results' file.
      cells: each once.
      config_of: the config of a cell's run.
      seconds_of: how long one core is busy with it, where that was measured; else None.
      reported_split: "test"; "validation" where choices are made.
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
    """Returns the cells whose name fits the pattern and whose method is named; all without methods.

    Raises:
      UserError: a method that no cell has, or no cell is left.
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
    """Returns what tells configs apart whose results differ: 16 hexadecimal digits.

    Fields that are not set do not count, so that an option which is new to the library leaves old
    results valid; nor does where the data lies, nor on which devices a run goes on.
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
