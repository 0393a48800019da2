"""Options of components: read from signatures, set in sections, dropped with their component."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import common
from dfs_jax.options import REQUIRED, documented_arguments, options_of, takes_any
from dfs_jax.training.sections import (
    SECTIONS,
    create_section,
    describe_config,
    drop_replaced_options,
    section_options,
)
from tests.support.helpers import tiny_config

RUN_DOCS = {name: doc for name, (_, doc) in common.RUN.items()}
COMPONENTS = [
    (kind, name)
    for kind, section in SECTIONS.items()
    for name in (section.registry.table if section.registry else [None])
]


class Base:
    """Base.

    Attributes:
      width: width of it.
    """

    width: int = 3

    def __init__(self, width: int = 3, *, depth: int | None = None, rates=(1, 2), name=""):
        """Makes one."""


class Own(Base):
    """Own component.

    Args:
      depth: depth, a
        number. More is said of it.
      rates: rates e.g. of 1.

    Raises:
      width: not an argument.
    """

    def __init__(self, width: int = 5, *, depth: int | None = None, rates=(1, 2), **rest):
        """Makes one."""


def test_options_are_the_keyword_arguments_with_types_defaults_and_docs():
    found = options_of(functools.partial(Own, depth=7), given=("rates",))
    assert list(found) == ["width", "depth"]
    assert found["width"][1:] == (int, 5, "width of it.")
    assert found["depth"][2:] == (7, "depth, a number.")
    assert documented_arguments(Own)["rates"] == "rates e.g. of 1."
    assert takes_any(Own)
    assert not takes_any(Base)


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_option_is_documented_and_has_one_type(kind, name):
    options = section_options(kind, name)
    assert all(option.doc for option in options.values()), [o.name for o in options.values()]
    everything = section_options(kind)
    assert {n: o.kind for n, o in options.items()} == {n: everything[n].kind for n in options}


def test_real_defaults_are_those_of_the_preset():
    options = {name: section_options("model", name) for name in ("vgg7", "vgg16", "vit_tiny")}
    assert options["vgg7"]["stage_sizes"].default == (2, 2, 2)
    assert options["vgg16"]["stage_sizes"].default == (2, 2, 3, 3, 3)
    assert "stage_sizes" not in options["vit_tiny"]
    assert section_options("schedule", "multistep")["decay_epochs"].default is REQUIRED
    assert "exits" in section_options("gradients", "pcgrad")
    assert "exits" not in section_options("gradients", "sum")


def changed_by_flags(config, **fields):
    before = config.copy_and_resolve_references()
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(fields)
    drop_replaced_options(config, before, fields)
    return config


def test_a_replaced_component_takes_its_options_with_it():
    config = tiny_config(
        **{
            "schedule.name": "multistep",
            "schedule.decay_epochs": (1,),
            "schedule.warmup_epochs": 0.5,
            "optimizer.momentum": 0.8,
            "optimizer.weight_decay": 1e-3,
            "gradients.name": "pcgrad",
            "gradients.exits": "scan",
        }
    )
    flags = {"schedule__name": "cosine", "optimizer__name": "adamw", "gradients__name": "sum"}
    changed_by_flags(config, **flags)
    assert (
        config.schedule.decay_epochs is config.optimizer.momentum is config.gradients.exits is None
    )
    assert (config.schedule.warmup_epochs, config.optimizer.weight_decay) == (0.5, 1e-3)


def test_what_a_flag_sets_stays_and_is_refused_by_the_component():
    config = tiny_config(**{"schedule.name": "multistep", "schedule.decay_epochs": (1,)})
    changed_by_flags(config, schedule__name="cosine", schedule__decay_epochs=(2,))
    assert config.schedule.decay_epochs == (2,)


def test_options_stay_where_the_component_stays_or_takes_any_or_is_unknown():
    for name in ("multistep", "tests.test_options:Own", "no.such.module:Thing"):
        config = ConfigDict({"schedule": create_section("schedule", "multistep")})
        config.schedule.decay_epochs = (1,)
        assert changed_by_flags(config, schedule__name=name).schedule.decay_epochs == (1,)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_field_that_a_config_can_set_is_described(path):
    if path.stem == "__init__":
        return
    config = importlib.import_module(f"configs.{path.stem}").get_config()
    lines = describe_config(config, RUN_DOCS).splitlines()
    described = [line.split("=")[0].removeprefix("--config.") for line in lines if "--" in line]
    assert len(set(described)) == len(described)
    assert set(common.RUN) <= set(described)
    for field in described:
        kind, _, option = field.rpartition(".")
        assert option in (config[kind] if kind else config)
    assert sum(line.startswith("    ") for line in lines) == len(described)


def test_help_config_prints_the_fields_and_trains_nothing(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/cifar100_resnet18.py:dsn"]
    command += ["--config.schedule.name=cosine", "--config.model.width=5", "--help_config"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--config.model.width=5  (int)\n    Number of channels" in ended.stdout
    assert "--config.batch_size=500  (int)\n    Examples in a training step" in ended.stdout
    assert "--config.schedule.name=cosine  (str)\n    One of constant, multistep" in ended.stdout
    assert "decay_epochs" not in ended.stdout
    assert "--config.fork.referencing" not in ended.stdout  # the plain fork has none
