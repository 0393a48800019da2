"""Start and end of this project's programs: flags, and one sentence for a user's mistake."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from dfs_jax.config_file import BadConfig
from dfs_jax.guard import INTERRUPTED_STATUS, fail, guarded
from dfs_jax.output import lasting_streams, say, warn
from dfs_jax.types import UserError

__all__ = ["run", "say", "use_compilation_cache", "warn"]

COMPILATION_CACHE = "~/.cache/dfs_jax/compiled"


def run(main: Callable[[], int | None]) -> None:
    """Parses absl flags, calls `main()` and exits with its result, see `guarded`."""
    with lasting_streams():
        app.run(lambda argv: guarded(_without_arguments(main, argv)), flags_parser=_parse_flags)


def _without_arguments(
    main: Callable[[], int | None], argv: Sequence[str]
) -> Callable[[], int | None]:
    def checked() -> int | None:
        if not flags.FLAGS["verbosity"].present:  # libraries log much at the default level
            logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
        return main()

    return checked


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags with status 2 for mistakes; absl has 1, and ml_collections a traceback."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sentence = " ".join(str(error).split()).rstrip(".")
        sys.exit(fail(f"{sentence}: --helpshort lists the flags"))
    except BadConfig as error:
        sys.exit(fail(str(error)))
    except AttributeError as error:
        sys.exit(fail(f"the config has no such field: {_innermost(error)}"))
    except KeyError as error:
        sys.exit(fail(f"the config has no such section: {_innermost(error)}"))
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(INTERRUPTED_STATUS)
    except Exception as error:  # values are parsed as Python, which raises many types
        sys.exit(fail(f"the config takes no such value: {_innermost(error)}"))


def _innermost(error: BaseException) -> str:
    """Returns the innermost of wrapped exceptions on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    lines = str(error.args[0] if error.args else error).strip().splitlines()
    return ". ".join(lines[-1:] if len(lines) > 3 else lines)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, in `JAX_COMPILATION_CACHE_DIR` or ~/.cache/dfs_jax/compiled.

    A restarted run then starts without compilation. The cache is off if `JAX_COMPILATION_CACHE_DIR`
    is empty or its directory cannot be written.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR", COMPILATION_CACHE)
    directory = os.path.expanduser(given)
    if "://" not in directory and not _can_hold_files(directory):
        directory = ""
    jax.config.update("jax_compilation_cache_dir", directory or None)


def _can_hold_files(directory: str) -> bool:
    with contextlib.suppress(OSError):
        Path(directory).mkdir(parents=True, exist_ok=True)
    return os.access(directory, os.W_OK | os.X_OK)
