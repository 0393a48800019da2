"""Ends programs with one sentence for a user's mistake, and quietly on a closed pipe or Ctrl-C."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator

from dfs_jax.extras import remedy
from dfs_jax.output import lasting_streams
from dfs_jax.types import UserError

USAGE_STATUS = 2
INTERRUPTED_STATUS = 128 + signal.SIGINT  # a shell's status of a program ended by Ctrl-C
# Tracing makes millions of objects: with Python's own thresholds, looking for garbage among them
# takes 7 % of a short run of MSDNet.
_RARE_COLLECTIONS = 200_000, 20, 100
_NO_BACKEND = "Unable to initialize backend"


def fail(message: str) -> int:
    """Prints `error: MESSAGE` and returns the exit status of a user's mistake."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        sys.stderr.write(f"error: {message}\n")
    return USAGE_STATUS


def guarded(main: Callable[[], int | None]) -> int:
    """Calls `main()` and returns the exit status.

    A user's mistake or a missing extra ends the program with one sentence and status 2, Ctrl-C with
    one sentence and status 130; other exceptions keep their traceback.
    """
    gc.set_threshold(*_RARE_COLLECTIONS)
    try:
        with usual_numerics():
            return main() or 0
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        missing = remedy(error.name)
        if missing is None:
            raise
        return fail(missing)
    except KeyboardInterrupt:
        fail("interrupted")
        return INTERRUPTED_STATUS
    except RuntimeError as error:
        if not str(error).startswith(_NO_BACKEND):
            raise
        return fail(str(error).splitlines()[0])


def run_plain(main: Callable[[], int | None]) -> None:
    """Calls a `main()` that parses its own arguments, and exits with its result."""
    with lasting_streams():
        sys.exit(guarded(main))


@contextlib.contextmanager
def usual_numerics() -> Iterator[None]:
    """Runs the context under JAX's standard promotion of types and ranks.

    Flax and Optax support no other, whatever `JAX_NUMPY_DTYPE_PROMOTION` and
    `JAX_NUMPY_RANK_PROMOTION` say. A program that has not imported jax may never need it.
    """
    if "jax" not in sys.modules:
        for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
            os.environ.pop(name, None)
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
