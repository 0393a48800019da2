"""docs/results.md: hand-written text around tables and figures rendered from the results.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced, the rest is kept. Cells that
have not been run are marked in the tables.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.accuracy import suites
from benchmarks.accuracy.cells import Suite
from benchmarks.accuracy.published import PUBLISHED
from benchmarks.accuracy.results import FAILED, Record, Results
from benchmarks.accuracy.rows import Row, current, select
from benchmarks.accuracy.tables import (
    accuracy_table,
    budget_table,
    conflict_table,
    difference_table,
    published_table,
    title,
)
from dfs_jax.files import write_whole
from dfs_jax.types import UserError

PAGE = "results.md"
_BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
_NETWORK = "vgg7_w16"
_PICTURES = {
    "by_exit": "Accuracy by exit, and points above DSN with 95 % intervals over the paired seeds",
    "budget": "Budgeted batch classification: accuracy against mean operations",
    "beta": "Accuracy of every exit against beta; dashed: DSN",
    "conflict": "Conflicting pairs of exits in the trunk over training",
    "epochs": "Points above DSN against the length of training",
}


class Found:
    """A suite and its results.

    Args:
      suite: suite of `benchmarks.accuracy.suites`.
      directory: directory of the results' files.
    """

    def __init__(self, suite: Suite, directory: Path):
        self.suite = suite
        self.records = Results(directory / f"{suite.name}.json", directory).read()

    def rows(self, network: str, data: str, epochs: int, methods: Sequence[str]) -> list[Row]:
        """Returns the rows of a table."""
        return select(self.suite, self.records, network, data, epochs, methods)

    def current(self) -> dict[str, Record]:
        """Returns the finished cells with the suite's present configs."""
        found = {c.name: current(self.suite, self.records, c) for c in self.suite.cells}
        return {name: record for name, record in found.items() if record is not None}


def render_page(docs: Path, directory: Path) -> list[Path]:
    """Writes the page's tables and figures; returns their paths.

    Args:
      docs: directory of the page.
      directory: directory of the results' files; a missing file has no cells yet.

    Raises:
      UserError: there is no page, or a block is missing or unknown.
    """
    small, search, paper = (
        Found(create(), directory) for create in (suites.small, suites.search, suites.paper)
    )
    blocks: dict[str, Callable[[], str]] = {
        "status": lambda: "\n\n".join(_status(found) for found in (search, small, paper)),
        "headline": lambda: _headline(small),
        "budget": lambda: _titled(budget_table, _headline_rows(small)),
        "conflict": lambda: _titled(conflict_table, _headline_rows(small)),
        "epochs": lambda: _epochs(small),
        "confirmed": lambda: _confirmed(small),
        "beta": lambda: _beta(small),
        "width": lambda: accuracy_table(small.rows("vgg7_w32", *_ON_CIFAR, suites.PAIR)),
        "recipes": lambda: accuracy_table(_with(small, suites.RECIPES)),
        "byot": lambda: _byot(small),
        "published_recipe": lambda: _published_recipe(small),
        "exits": lambda: _exits(small),
        "networks": lambda: _networks(small),
        "search": lambda: _search(search),
        "paper": lambda: _paper(paper),
    }
    path = docs / PAGE
    if not path.exists():
        raise UserError(f"there is no page {path}: restore it, its text is written by hand")
    text = path.read_text(encoding="utf-8")
    _check_blocks(path, text, blocks)
    written = _draw(small, docs)
    drawn = {picture.name for picture in written}
    content = {name: create() for name, create in blocks.items()}
    for name, caption in _PICTURES.items():
        block, picture = "headline" if name == "by_exit" else name, f"results_{name}.png"
        if picture in drawn:
            content[block] += f"\n\n![{caption}]({picture})"
    text = _BLOCK.sub(lambda m: f"{m[1]}{content[m[2]]}\n{m[3]}", text)
    return [write_whole(path, text), *written]


_ON_CIFAR = (suites.SETS[0], suites.SHORT)
# Methods drawn against the length of training.
_LENGTHENED = (*suites.PAIR, *suites.BEST)
# Fractions of the last exit's operations; the first exit of VGG7 costs 0.07.
_SMALL_BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


def _check_blocks(path: Path, text: str, blocks: Mapping[str, object]) -> None:
    names = [name for _, name, _ in _BLOCK.findall(text)]
    found, known = Counter(names), Counter(blocks.keys())
    wrong = (found - known) + (known - found)
    if wrong:
        raise UserError(
            f"{path} must have each of {', '.join(blocks)} between begin and end marks once; "
            f"missing, unknown or twice: {', '.join(wrong)}"
        )


def _draw(small: Found, docs: Path) -> list[Path]:
    from benchmarks.accuracy import figures

    headline = _headline_rows(small)
    if not any(row.runs for rows in headline.values() for row in rows):
        return []
    by_epochs = {
        data: {
            epochs: _seed0(small.rows(_NETWORK, data, epochs, _LENGTHENED))
            for epochs in (suites.SHORT, suites.LONG)
        }
        for data in suites.SETS
    }
    (reference,) = _with(small, [])[:1]
    draw_betas = functools.partial(figures.draw_betas, reference=reference)
    drawings: dict[str, tuple[Callable[..., Path], object]] = {
        "by_exit": (figures.draw_by_exit, headline),
        "budget": (figures.draw_budget, headline),
        "beta": (draw_betas, _beta_rows(small)),
        "conflict": (figures.draw_conflict, headline),
        "epochs": (figures.draw_epochs, by_epochs),
    }
    paths = []
    for name, (draw, rows) in drawings.items():
        try:
            paths.append(draw(rows, docs / f"results_{name}.png"))
        except ValueError:  # nothing to draw yet
            continue
    return paths


def _headline_rows(small: Found) -> dict[str, list[Row]]:
    methods = (*suites.HEADLINE, *suites.BEST)
    return {data: small.rows(_NETWORK, data, suites.SHORT, methods) for data in suites.SETS}


def _headline(small: Found) -> str:
    return "\n\n".join(
        f"**{data}**\n\n{accuracy_table(rows)}\n\n{difference_table(rows)}"
        for data, rows in _headline_rows(small).items()
    )


def _titled(table: Callable[[Sequence[Row]], str], by_title: Mapping[str, Sequence[Row]]) -> str:
    return "\n\n".join(f"**{name}**\n\n{table(rows)}" for name, rows in by_title.items())


def _with(small: Found, methods: Sequence[str]) -> list[Row]:
    """Returns rows of the headline and these methods, with the seed that both have."""
    return _seed0(small.rows(_NETWORK, *_ON_CIFAR, [*suites.PAIR, *methods]))


def _seed0(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with seed 0 only, so that they are comparable."""
    return [
        Row(row.method, {s: r for s, r in row.runs.items() if s == 0}, min(row.asked, 1))
        for row in rows
    ]


def _epochs(small: Found) -> str:
    methods = (*_LENGTHENED, *suites.CONFIRMED[1:])
    by_title = {}
    for data in suites.SETS:
        rows = _seed0(small.rows(_NETWORK, data, suites.LONG, methods))
        by_title[f"{data}, {suites.LONG} epochs"] = [row for row in rows if row.asked]
    return _titled(accuracy_table, by_title)


def _confirmed(small: Found) -> str:
    parts = []
    for data in suites.SETS:
        rows = small.rows(_NETWORK, data, suites.LONG, suites.CONFIRMED)
        tables = (accuracy_table(rows), difference_table(rows), budget_table(rows, _SMALL_BUDGETS))
        parts += [f"**{data}, {suites.LONG} epochs**", *tables]
    return "\n\n".join(parts)


def _beta_rows(small: Found) -> dict[str, dict[float, Row]]:
    found: dict[str, dict[float, Row]] = {}
    for name in ("dfs", "dfs_trunk_only"):
        methods = [name if beta == 0.5 else f"{name}_beta{beta}" for beta in suites.BETAS]
        rows = {b: _with(small, [m])[-1] for b, m in zip(suites.BETAS, methods, strict=True)}
        found[title(name)] = {beta: row for beta, row in rows.items() if row.asked}
    return found


def _beta(small: Found) -> str:
    by_name = _beta_rows(small)
    (reference,) = _with(small, [])[:1]
    swept = [row for by_beta in by_name.values() for row in by_beta.values()]
    per_exit = _with(small, suites.PER_EXIT)[len(suites.PAIR) :]
    return accuracy_table([reference, *swept, *per_exit])


def _byot(small: Found) -> str:
    return _titled(
        _beside_dsn,
        {
            data: small.rows(_NETWORK, data, suites.SHORT, ("dsn", *suites.WITH_BYOT))
            for data in suites.SETS
        },
    )


def _published_recipe(small: Found) -> str:
    methods = ("dsn", *suites.PUBLISHED)
    return _beside_dsn(small.rows(_NETWORK, suites.SETS[0], suites.LONG, methods))


def _beside_dsn(rows: Sequence[Row]) -> str:
    """Returns tables of DSN and other methods, and differences from the first of them."""
    tables = (accuracy_table(rows), difference_table(rows[1:], rows[1]), conflict_table(rows))
    return "\n\n".join(tables)


def _exits(small: Found) -> str:
    parts = []
    for network in (_NETWORK, *suites.FEWER_EXITS):
        rows = _seed0(small.rows(network, *_ON_CIFAR, suites.PAIR))
        parts += [f"**{network}**", accuracy_table(rows), conflict_table(rows)]
    return "\n\n".join(parts)


def _networks(small: Found) -> str:
    by_network = {
        network: small.rows(network, *_ON_CIFAR, methods)
        for network, methods in suites.OTHER_NETWORKS.items()
    }
    return _titled(accuracy_table, by_network)


def _search(search: Found) -> str:
    tables = {}
    for network, epochs, methods in (
        (_NETWORK, suites.SHORT, suites.CANDIDATES),
        (_NETWORK, suites.LONG, suites.LONG_CANDIDATES),
        (suites.TWO_EXITS, suites.LONG, suites.LONG_OF_TWO_EXITS),
    ):
        for data in suites.SETS:
            name = f"{network}, {data}, {epochs} epoch" + "s" * (epochs > 1)
            tables[name] = search.rows(network, data, epochs, methods)
    asked = {name: rows for name, rows in tables.items() if any(row.asked for row in rows)}
    return _titled(accuracy_table, asked)


def _paper(paper: Found) -> str:
    parts = []
    for network, (methods, epochs, _) in suites.PUBLISHED_SETTINGS.items():
        data = next(cell.data for cell in paper.suite.cells if cell.network == network)
        rows = paper.rows(network, data, epochs, methods)
        parts.append(f"**{network}**\n\n{published_table(rows, PUBLISHED[network])}")
    return "\n\n".join(parts)


def _status(found: Found) -> str:
    """Describes how much of a suite is finished, what failed, and the machines and hours."""
    suite, records = found.suite, found.current()
    text = f"`{suite.name}`: {len(records)} of {len(suite.cells)} cells"
    if records:
        hours = sum(record["seconds"] for record in records.values()) / 3600
        machines = sorted({_machine(record) for record in records.values()})
        text += f", {hours:.1f} hours in all, on {'; '.join(machines)}"
    failed = [
        f"`{cell.name}` failed ({found.records[cell.name]['reason']})"
        for cell in suite.cells
        if found.records.get(cell.name, {}).get("status") == FAILED
    ]
    return ". ".join([text, *failed]) + "."


def _machine(record: Record) -> str:
    hardware, versions = record["hardware"], record["versions"]
    return (
        f"{hardware['cores']} core(s) of {hardware['processor']}, {hardware['devices']} "
        f"{hardware['kind']} device(s), jax {versions['jax']}, dfs_jax {versions['dfs_jax']}"
    )
