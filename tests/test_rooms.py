"""How the house is built: who may import whom, and that every registered name is tested."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfs_jax.registry import Registry

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "dfs_jax"
# A room imports only from rooms above it, and from itself.
ROOMS = (
    "types",
    "extras",
    "paths",
    "files",
    "output",
    "tables",
    "stopwatch",
    "guard",
    "config_file",
    "program",
    "launch",
    "registry",
    "options",
    "surgery",
    "tracing",
    "onnx",
    "forks",
    "layers",
    "models",
    "losses",
    "exits",
    "gradients",
    "costs",
    "data",
    "interop",
    "training",
    "inference",
    "reports",
)
# What stands on top of the package: it never imports them.
ON_TOP = {"benchmarks", "configs", "eval", "tests", "train"}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("configs/**/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str) -> set[str]:
    """Every module a source imports, wherever in it; `from a import b` counts as `a` and `a.b`."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            modules.add(str(node.module))
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def rooms_of(modules: set[str]) -> set[str]:
    """The rooms among them; what the package itself defines (its version) is no room."""
    inside = {name.split(".")[1] for name in modules if name.startswith("dfs_jax.")}
    return inside - {"__version__"}


def refused(room: str, modules: set[str]) -> set[str]:
    """The rooms that a room imports, but that do not lie above it."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return rooms_of(modules) - set(allowed)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_room_imports_only_from_rooms_above_it(path):
    room = module_name(path).split(".")[1]
    assert room in ROOMS, "a new room: give it its place in ROOMS"
    modules = imported_modules(path.read_text())
    assert not refused(room, modules)
    assert not {name.split(".")[0] for name in modules} & ON_TOP


def test_the_rule_can_be_broken():
    source = "def f():\n    from dfs_jax.reports import plots\n    import dfs_jax.types\n"
    assert refused("models", imported_modules(source)) == {"reports"}
    assert not refused("reports", imported_modules(source))
    assert rooms_of(imported_modules("from dfs_jax import __version__, losses")) == {"losses"}


def test_one_module_imports_matplotlib():
    importers = {
        module_name(path)
        for path in [*SOURCES, *SCRIPTS]
        if any(name.split(".")[0] == "matplotlib" for name in imported_modules(path.read_text()))
    }
    assert importers == {"dfs_jax.reports.figures"}


def test_surgery_imports_jax_and_the_standard_library_alone():
    modules = imported_modules((PACKAGE / "surgery.py").read_text())
    outside = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert outside == {"jax"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_jit_is_called_as_the_oldest_jax_allows(path):
    """`jax.jit(static_argnums=1)` without a function, as a decorator, came with jax 0.8."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert all(call.args for call in calls if ast.unparse(call.func) == "jax.jit")


def registries() -> Iterator[tuple[str, Registry]]:
    """Every registry that a module of the package defines, under its module's and own name."""
    for path in SOURCES:
        if "Registry(" not in path.read_text():
            continue
        module = importlib.import_module(module_name(path))
        for name, value in vars(module).items():
            if isinstance(value, Registry):
                yield f"{module.__name__}:{name}", value


REGISTRIES = dict(registries())


@pytest.mark.parametrize("where", REGISTRIES)
def test_every_registered_name_resolves_within_its_room_or_above(where):
    room = where.partition(":")[0].split(".")[1]
    for name, target in REGISTRIES[where].table.items():
        if isinstance(target, str):
            assert not refused(room, {target.partition(":")[0]}), target
        assert REGISTRIES[where].resolve(name) is not None


def row_names(node: ast.expr) -> set[str]:
    """The names in a table literal: a dict's keys, a list's texts, its tuples' first texts."""
    if isinstance(node, ast.Dict):
        firsts = [key for key in node.keys if key is not None]
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        firsts = [first_item(item) for item in node.elts]
    else:
        return set()
    return {x.value for x in firsts if isinstance(x, ast.Constant) and isinstance(x.value, str)}


def first_item(node: ast.expr) -> ast.expr:
    """The first item of a row that is a tuple or a `pytest.param(...)`, else the row itself."""
    if isinstance(node, ast.Tuple | ast.List):
        items = node.elts
    else:
        items = node.args if isinstance(node, ast.Call) else []
    return items[0] if items else node


@functools.cache
def tables_in_tests() -> list[set[str]]:
    """The names in every table of the tests: a module's constant or a `parametrize` argument."""
    tables = []
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                tables.append(row_names(node.value))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize"):
                tables += [row_names(argument) for argument in node.args[1:]]
    return tables


@pytest.mark.parametrize("where", REGISTRIES)
def test_every_registered_name_has_its_row_in_a_table_of_the_tests(where):
    """One table that has them all: what is registered is put through the same tests."""
    names = set(REGISTRIES[where].table)
    best = max(tables_in_tests(), key=lambda table: len(names & table))
    assert names <= best, f"{where}: no table of the tests has rows for {sorted(names - best)} too"


def test_the_registries_are_found():
    kinds = {registry.kind for registry in REGISTRIES.values()}
    assert {"model", "fork", "loss"} <= kinds
