"""Registries: lazy, helpful about mistakes, open to a user's own components."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from dfs_jax.registry import Registry
from dfs_jax.types import UserError


@dataclasses.dataclass
class Component:
    size: int = 3
    shape: str = "round"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size must not be negative, got {self.size}")


def anything(**options):
    return options


HERE = __name__
PARTS = Registry(
    "part",
    {
        "component": f"{HERE}:Component",
        "anything": f"{HERE}:anything",
        "absent": "no_such_package.inside:Thing",
    },
)


def test_create_passes_the_options_that_are_set():
    assert PARTS.create("component", size=None, shape="flat") == Component(3, "flat")
    assert PARTS.create("component", 5) == Component(5)
    assert PARTS.create("component", size=0, shape="") == Component(0, "")  # set, if to nothing
    assert PARTS.create("anything", x=1, y=None) == {"x": 1}


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"unknown part 'wheel': .* absent, anything, component,"):
        PARTS.resolve("wheel")


@pytest.mark.parametrize("name", [None, 3])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(UserError, match="unknown part"):
        PARTS.resolve(name)


def test_unknown_option_lists_the_valid_ones_and_the_value():
    with pytest.raises(UserError, match=r"no option 'colour' \(given 'red'\): it takes shape, si"):
        PARTS.create("component", colour="red")


def test_a_refused_value_becomes_a_user_error():
    with pytest.raises(UserError, match="part 'component': size must not be negative, got -1"):
        PARTS.create("component", size=-1)


def test_nothing_is_imported_before_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "lazy_part.py").write_text("class Lazy:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("part", {"lazy": "lazy_part:Lazy"})
    assert "lazy_part" not in sys.modules
    assert registry.resolve("lazy").__name__ == "Lazy"
    monkeypatch.delitem(sys.modules, "lazy_part")


def test_a_users_own_component_by_module_and_attribute():
    assert PARTS.resolve(f"{HERE}:Component") is Component
    assert PARTS.create(f"{HERE}:Component", size=7).size == 7


def test_a_users_missing_module_or_attribute_is_told():
    with pytest.raises(UserError, match="there is no module 'no_such_package'"):
        PARTS.resolve("no_such_package.models:Mine")
    with pytest.raises(UserError, match=f"{HERE} has no 'Mine'"):
        PARTS.resolve(f"{HERE}:Mine")


def test_a_module_that_the_users_own_lacks_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_part.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        PARTS.resolve("broken_part:Mine")


def test_a_broken_table_is_our_mistake_not_the_users():
    with pytest.raises(ModuleNotFoundError):
        PARTS.resolve("absent")
