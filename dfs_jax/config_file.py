"""The flag `--config`: a Python file whose `get_config()` returns a run's configuration."""

# ruff: noqa: E402
from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from dfs_jax.extras import require

require("ml_collections")

from absl import flags
from ml_collections import ConfigDict, config_flags

from dfs_jax.guard import fail
from dfs_jax.paths import input_file, shown
from dfs_jax.types import Config, UserError


class BadConfig(Exception):
    """Error in a config file, as a sentence; not a ValueError, which absl would rewrite."""


def load_config(file: Path, *arguments: str) -> Config:
    """Returns the result of a config file's `get_config(*arguments)`.

    Raises:
      UserError: the file does not exist, fails, or returns no `ConfigDict`.
    """
    if file.suffix != ".py" or not file.exists():
        raise UserError(f"there is no config file {shown(file)}: give the path of a .py file")
    path = input_file(file, "config file")
    try:
        get_config = getattr(_load_module(path), "get_config", None)
        if not callable(get_config):
            raise UserError(f"config file {shown(file)} defines no function get_config: add one")
        config = get_config(*arguments)
    except UserError:
        raise
    except Exception as error:  # config files are arbitrary programs
        raise UserError(_describe(error, file, path)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config file {shown(file)}: get_config must return an ml_collections.ConfigDict, "
            f"got {type(config).__name__}"
        )
    return config


class ConfigFlag:
    """The flag `--config`, whose file is read by `load_config`.

    Args:
      help_text: help of the flag.
      settle: function `(config, before, fields)` that changes the parsed config in place, given the
        config as its file returned it and the fields that flags set.
    """

    def __init__(self, help_text: str, settle: Callable[[Config, Config, list[str]], None]):
        try:
            self._flag = config_flags.DEFINE_config_file("config", None, help_text)
        except flags.Error as error:  # absl reads flag files at once
            sys.exit(fail(str(error).removeprefix("ERROR:: ")))
        self._settle = settle
        self._parser = _Parser()
        flags.FLAGS["config"].parser = self._parser

    @property
    def value(self) -> Config:
        """The config, with the fields that flags set."""
        config, before = self._flag.value, self._parser.before
        if before is not None:
            fields = config_flags.get_override_values(flags.FLAGS["config"])
            self._settle(config, before, list(fields))
            self._parser.before = None
        return config


class _Parser(flags.ArgumentParser):
    """Reads FILE.py or FILE.py:ARGUMENT.

    Attributes:
      before: copy of the config that the file returned.
    """

    before: Config | None = None

    def parse(self, argument: str) -> Config:
        file, colon, argument = argument.partition(":")
        try:
            if not file:
                raise UserError("--config is empty: give the path of a .py file")
            config = load_config(Path(file).expanduser(), *([argument] if colon else []))
        except (UserError, RuntimeError) as error:
            raise BadConfig(str(error)) from error
        self.before = config.copy_and_resolve_references()
        return config.lock()


def _load_module(path: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("_config", str(path))
    spec = importlib.util.spec_from_file_location("_config", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _describe(error: Exception, file: Path, path: Path) -> str:
    """Describes an exception on one line, with its line in the file."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, KeyError) and " " in text:  # an unknown argument of `get_config`
        return text
    if isinstance(error, SyntaxError):
        return f"config file {shown(file)} is not Python, see line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f" at line {lines[-1]}" if lines else ""
    return f"config file {shown(file)} fails{where}: {type(error).__name__} {text}".rstrip()
