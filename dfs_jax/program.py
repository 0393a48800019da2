"""How this project's programs start and end: flags in, one sentence out for a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from dfs_jax.types import UserError

USAGE_STATUS = 2
COMPILATION_CACHE = Path("~/.cache/dfs_jax/compiled")


def fail(message: str) -> int:
    """Prints `error: MESSAGE` and returns the exit status of a user's mistake."""
    sys.stderr.write(f"error: {message}\n")
    return USAGE_STATUS


def run(main: Callable[[], int | None]) -> None:
    """Parses absl flags, calls `main()` and exits with what it returns.

    A user's mistake ends the program with one sentence and status 2; everything else keeps its
    traceback.
    """
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)


def _guarded(main: Callable[[], int | None], argv: Sequence[str]) -> int:
    if not flags.FLAGS["verbosity"].present:  # libraries say much at the default level
        logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
        return main() or 0
    except UserError as error:
        return fail(str(error))


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; ml_collections answers unknown fields and missing files with a traceback."""
    try:
        _check_config_file(argv)
        return app.parse_flags_with_usage(argv)
    except UserError as error:
        sys.exit(fail(str(error)))
    except AttributeError as error:
        sys.exit(fail(f"the config has no such field: {_innermost(error)}"))
    except KeyError as error:  # what a config file says of the argument after its colon
        sys.exit(fail(_innermost(error)))
    except TypeError as error:
        reason = str(error).strip().splitlines()[-1]
        sys.exit(fail(f"the config takes no such value: {reason}"))


def _check_config_file(argv: Sequence[str]) -> None:
    for argument in argv:
        name, is_given, value = argument.lstrip("-").partition("=")
        path = Path(value.partition(":")[0])  # what follows a colon is the config's own argument
        if name == "config" and is_given and (path.suffix != ".py" or not path.is_file()):
            raise UserError(f"there is no config file {path}: give the path of a .py file")


def _innermost(error: BaseException) -> str:
    """Returns on one line what was said first: the library wraps one exception in another."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return ". ".join(str(error.args[0] if error.args else error).splitlines())


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, in `JAX_COMPILATION_CACHE_DIR` or ~/.cache/dfs_jax/compiled.

    A run that is started again then begins at once. An empty `JAX_COMPILATION_CACHE_DIR` turns it
    off.
    """
    import jax

    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(COMPILATION_CACHE.expanduser()))
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)


def warn(text: str) -> None:
    """Prints a line to the standard error stream."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def say(text: str) -> None:
    """Prints a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
