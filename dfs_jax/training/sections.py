"""The sections of a config: a component's name, and the options of every component of its kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dfs_jax.config_file import ConfigFlag
from dfs_jax.data import load_dataset
from dfs_jax.data.augmentation import create_augmentation
from dfs_jax.data.streaming import Streaming
from dfs_jax.forks import FORKS
from dfs_jax.gradients import RULES
from dfs_jax.losses import LOSSES
from dfs_jax.models import MODELS
from dfs_jax.options import REQUIRED, Option, options_of, takes_any
from dfs_jax.registry import Registry
from dfs_jax.training.optimizer import OPTIMIZERS, SCHEDULES
from dfs_jax.training.regimes import REGIMES
from dfs_jax.types import Config, UserError


class Section(NamedTuple):
    """One section of a config.

    Attributes:
      registry: components to choose from by `name`; None for a section without a choice.
      own: options of the section itself, whichever component is chosen.
      given: arguments of the components that the run gives.
      functions: functions whose arguments are options of the section.
      needs: attribute of the component that must be true, for an option of the section itself.
    """

    registry: Registry | None
    own: tuple[Option, ...] = ()
    given: tuple[str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    needs: Mapping[str, str] = MappingProxyType({})


SECTIONS = {
    "model": Section(
        MODELS,
        (Option("exits_at", tuple, None, "submodules to add exits at, for a module without."),),
        given=(
            "num_classes",
            "adapt_features",
            "remat",
            "dtype",
            "batch_norm_groups",
            "frozen_trunk",
        ),
    ),
    "fork": Section(FORKS),
    "loss": Section(LOSSES),
    "gradients": Section(
        RULES,
        (Option("exits", str, None, 'way through the exits: "vmap", "unroll" or "scan".'),),
        needs={"exits": "takes_exit_gradients"},
    ),
    "data": Section(
        None,
        (
            Option("augmentation", str, "crop,flip", "augmentations in their order, or none."),
            Option("on_device", bool, None, "whether device memory holds the images."),
            Option("streamed", bool, None, "whether images are decoded while training runs."),
        ),
        given=("streaming", "names", "mean", "augmentations"),
        functions=(load_dataset, Streaming, create_augmentation),
    ),
    "regime": Section(REGIMES),
    "optimizer": Section(
        OPTIMIZERS,
        (
            Option("learning_rate", float, 0.1, "learning rate before any decay."),
            Option("gradient_clip", float, None, "largest global norm of the gradients."),
            Option("ema_decay", float, None, "decay of a moving average that is evaluated."),
        ),
        given=("learning_rate",),
    ),
    "schedule": Section(
        SCHEDULES,
        (Option("warmup_epochs", float, None, "epochs in which the learning rate rises."),),
        given=("learning_rate", "total_epochs", "steps_per_epoch"),
    ),
}


@functools.cache
def section_options(kind: str, name: str | None = None) -> Mapping[str, Option]:
    """Returns a section's options by name: for one component, or for all of the registry.

    Args:
      kind: name of the section, one of `SECTIONS`.
      name: name of the component; None for all.
    """
    section, components, found = SECTIONS[kind], [], {}
    if section.registry is not None:
        names = section.registry.table if name is None else [name]
        components = [section.registry.resolve(name) for name in names]
    for option in section.own:
        attribute = section.needs.get(option.name)
        if attribute is None or any(getattr(c, attribute, False) for c in components):
            found[option.name] = option
    for component in (*section.functions, *components):
        for option in options_of(component, section.given).values():
            found.setdefault(option.name, option)
    return MappingProxyType(found)


_DATA_SETS = "digits, folder, any image classification set of TFDS"


def create_section(kind: str, name: str, **values: Any) -> ConfigDict:
    """Returns a section with every option of its kind; those that are not in `values` are None.

    An option that is None has its component's own default.

    Args:
      kind: name of the section, one of `SECTIONS`.
      name: name of the chosen component.
      values: options that are set.

    Example:
      >>> section = create_section("schedule", "multistep", decay_epochs=(3, 5))
      >>> section.decay_epochs, section.decay_factor
      ((3, 5), None)
    """
    section = ConfigDict({"name": name})
    for option in section_options(kind).values():
        section[option.name] = placeholder(option.kind)
        if option.name in values:
            section[option.name] = values[option.name]
    return section


def define_config_flag(help_text: str) -> ConfigFlag:
    """Defines the flag `--config`; a component that flags replace takes its options with it."""
    return ConfigFlag(help_text, drop_replaced_options)


def drop_replaced_options(config: Config, before: Config, flags: Iterable[str]) -> None:
    """Unsets the options of components that flags replaced, where the new ones lack them.

    Options that both components take stay, as do those that flags set.

    Args:
      config: config of the run, changed in place.
      before: config as its file returned it.
      flags: fields that flags set, such as "schedule.name".

    Example:
      >>> multistep = create_section("schedule", "multistep", decay_epochs=(3,))
      >>> before = ConfigDict({"schedule": multistep})
      >>> config = before.copy_and_resolve_references()
      >>> config.schedule.name = "cosine"
      >>> drop_replaced_options(config, before, ["schedule.name"])
      >>> config.schedule.decay_epochs is None
      True
    """
    chosen = set(flags)
    for kind in SECTIONS:
        section, old = config.get(kind, {}), before.get(kind, {})
        if section.get("name") == old.get("name"):
            continue
        accepted = _accepted(kind, section.name)
        for field, value in section.items():
            lost = accepted is not None and field != "name" and field not in accepted
            if value is not None and lost and f"{kind}.{field}" not in chosen:
                section[field] = None


def _accepted(kind: str, name: str) -> set[str] | None:
    """Returns the options that a component takes; None if it takes any, or is not known."""
    section = SECTIONS[kind]
    try:
        component = section.registry.resolve(name) if section.registry else None
        if component is None or takes_any(component):
            return None
    except UserError:  # said when it is created
        return None
    return set(section_options(kind, name))


def describe_config(config: Config, run_docs: Mapping[str, str]) -> str:
    """Returns every field that can be set in a config, with its type, value and documentation.

    Args:
      config: config of a run.
      run_docs: documentation of the fields outside of the sections of components, by name.
    """
    lines = []
    order = [*run_docs, *config]
    for field in sorted(config, key=order.index):
        if not isinstance(config[field], ConfigDict):
            doc = run_docs.get(field, "")
            lines += _described(field, _kind_of(config, field), config[field], doc)
    for kind, tree in config.items():
        if not isinstance(tree, ConfigDict):
            continue
        section = SECTIONS.get(kind, Section(None))
        lines += ["", f"[{kind}]"]
        if "name" in tree:
            known = _DATA_SETS if section.registry is None else ", ".join(section.registry.table)
            doc = f'one of {known}, or your own "package.module:attribute"'
            lines += _described(f"{kind}.name", str, tree.name, doc)
        known = section_options(kind, str(tree.name)) if kind in SECTIONS else {}
        for field in sorted(set(tree) - {"name"}):
            if kind in SECTIONS and field not in known:
                continue
            option = known.get(field, Option(field, _kind_of(tree, field), None, ""))
            value = option.default if tree[field] is None else tree[field]
            doc = option.doc or run_docs.get(f"{kind}.{field}", "")
            lines += _described(f"{kind}.{field}", option.kind, value, doc)
    return "\n".join(lines)


def _described(field: str, kind: type, value: Any, doc: str) -> list[str]:
    shown = "required" if value is REQUIRED else "unset" if value is None else str(value)
    type_name = "any" if kind is object else kind.__name__
    doc = doc[:1].upper() + doc[1:].rstrip(".") + "." if doc else ""
    return [f"--config.{field}={shown}  ({type_name})", *([f"    {doc}"] if doc else [])]


def _kind_of(tree: Config, field: str) -> type:
    return tree.get_type(field)
