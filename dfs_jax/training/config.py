"""A run's configuration: checked first, recorded in the run's directory, compared on resume."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dfs_jax.files import replacing
from dfs_jax.paths import local_path, make_directory, reason
from dfs_jax.training import extend
from dfs_jax.training.checkpoint import has_steps
from dfs_jax.training.optimizer import check_optimizer
from dfs_jax.training.processes import by_writer, is_writer
from dfs_jax.types import Config, UserError, check_whole

FILE = "config.json"
SHARED_WITHIN = 30.0  # seconds until one process sees what another has written
# Fields that may differ between a run and its continuation: locations, outputs, measurements,
# devices, and what devices keep in memory.
MAY_CHANGE = (
    "data.data_dir",
    "data.num_workers",
    "data.max_corrupt",
    "data.on_device",
    "init_from",
    "steps_per_dispatch",
    "log_every_steps",
    "checkpoint_every_steps",
    "conflict_every_steps",
    "conflict_examples",
    "remat",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)
# Sections that configs of earlier runs lack, with values that those runs used.
_ADDED_LATER = {
    "gradients": {"name": "sum", "exits": None},
    "mesh": {},
    "regime": {"name": "joint"},
}
MAY_DIFFER = ("data.data_dir", "data.num_workers", "init_from")  # between the machines of a run
_AT_LEAST_ONE = ("batch_size", "eval_batch_size", "epochs", "eval_every_epochs", "log_every_steps")


def check_config(config: Config) -> None:
    """Raises UserError for values that no run can have."""
    for field in _AT_LEAST_ONE:
        if config[field] < 1:
            raise UserError(f"{field} must be at least 1, got {config[field]}")
    if config.checkpoint_every_steps < 0:
        raise UserError(
            f"checkpoint_every_steps must be at least 0, got {config.checkpoint_every_steps}"
        )
    for field, path in (("data.data_dir", config.data.data_dir), ("init_from", config.init_from)):
        if path is not None:
            local_path(path, field)
    if config.get("recalibrate_examples") is not None:
        check_whole("recalibrate_examples", config.recalibrate_examples)
    if config.get("steps_per_dispatch") is not None:
        check_whole("steps_per_dispatch", config.steps_per_dispatch)
    if config.data.get("on_device") not in (None, True, False):
        raise UserError(f"data.on_device is True, False or unset, got {config.data.on_device!r}")
    check_optimizer(config.optimizer)


def completed(config: Config) -> Config:
    """Returns the config with sections added that did not exist when it was written.

    >>> completed(ConfigDict({"seed": 0})).gradients.name
    'sum'
    """
    return ConfigDict({**_ADDED_LATER, **config.to_dict()})


def options(section: Config) -> dict[str, Any]:
    """Returns a component's options: every field of its section except the name."""
    return {key: value for key, value in section.items() if key != "name"}


def open_workdir(workdir: Path, config: Config) -> None:
    """Creates the run's directory and records its config.

    The config of a run that has saved steps is compared, and kept until `record_config`, so that an
    error after this call leaves the run unchanged. The number of epochs may change as long as every
    learning rate so far stays the same.

    Raises:
      UserError: the path is a file or cannot be written, contains a run with another config, or is
        not the same directory for all processes, or these have different configs.
    """
    theirs, recorded = by_writer(_open_workdir, workdir, config)
    if not is_writer():
        _check_same_config(theirs, config)
        _check_shared(workdir, recorded)


def _open_workdir(workdir: Path, config: Config) -> tuple[str, str]:
    """Returns the config of this process and the content of the file in the directory, as JSON."""
    text = _to_json(config)
    make_directory(workdir, "workdir")
    if (workdir / FILE).exists() and has_steps(workdir):
        _check_same_run(workdir, read_config(workdir), config)
        return text, (workdir / FILE).read_text(encoding="utf-8")
    _write_config(workdir, text)
    return text, text


def record_config(workdir: Path, config: Config) -> None:
    """Records the config of a continued run."""
    by_writer(_write_config, workdir, _to_json(config))


def _to_json(config: Config) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def _write_config(workdir: Path, text: str) -> None:
    try:
        with replacing(workdir / FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {reason(error)}") from error


def _check_same_config(written: str, config: Config) -> None:
    """Raises UserError if this process was started with another config than the writer."""
    theirs, own = dict(_flatten(json.loads(written))), dict(_flatten(config.to_dict()))
    for field in sorted(theirs.keys() | own):
        if field not in MAY_DIFFER and theirs.get(field) != own.get(field):
            raise UserError(
                f"the processes of this run have different configs: {field} is {own.get(field)!r} "
                f"here and {theirs.get(field)!r} elsewhere; start all with the same command"
            )


def _check_shared(workdir: Path, written: str) -> None:
    """Raises UserError unless this process can see what the writer wrote."""
    deadline = time.monotonic() + SHARED_WITHIN
    while time.monotonic() < deadline:  # network file systems may need time
        with contextlib.suppress(OSError):
            if (workdir / FILE).read_text(encoding="utf-8") == written:
                return
        time.sleep(0.1)
    raise UserError(
        f"workdir {workdir} is not the same directory for all processes: "
        f"name one on a file system that they share"
    )


def read_config(workdir: Path) -> Config:
    """Returns the config of the run in `workdir`.

    Raises:
      UserError: there is no run there, or its config cannot be read.
    """
    path = local_path(workdir, "workdir") / FILE
    try:
        return completed(ConfigDict(_with_tuples(json.loads(path.read_text(encoding="utf-8")))))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"there is no run in {workdir}: {FILE} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def _check_same_run(workdir: Path, known: Config, config: Config) -> None:
    before, now = dict(_flatten(known.to_dict())), dict(_flatten(config.to_dict()))
    changed = [
        field
        for field in sorted(before.keys() | now)
        if before.get(field) != now.get(field) and field not in MAY_CHANGE
    ]
    if "epochs" in changed and all(field.startswith(extend.FIELDS) for field in changed):
        return extend.check_extension(workdir, known, config)
    different = [f"{field} (was {before.get(field)!r}, is {now.get(field)!r})" for field in changed]
    if different:
        raise UserError(
            f"{workdir} holds a run of another config: {'; '.join(different)}; "
            f"restore these fields or name another --workdir"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _with_tuples(tree: Any) -> Any:
    """Returns a JSON tree with its lists as tuples, which configs have in their place."""
    if isinstance(tree, dict):
        return {key: _with_tuples(value) for key, value in tree.items()}
    return tuple(_with_tuples(value) for value in tree) if isinstance(tree, list) else tree
