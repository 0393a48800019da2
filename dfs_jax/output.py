"""Standard output that may be strict, closed or gone: no program fails for it in the middle."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from dfs_jax.paths import reason
from dfs_jax.types import UserError

# What a shell reports of a program that SIGPIPE ended.
CLOSED_PIPE_STATUS = 128 + signal.SIGPIPE
_GONE = (errno.EIO, errno.ENXIO, errno.EBADF)  # of a terminal: a lost SSH line


def say(text: str) -> None:
    """Prints a line.

    Exits with `CLOSED_PIPE_STATUS` where nobody reads on (`| head -1`), as programs do; passes over
    a terminal that is gone.

    Raises:
      UserError: standard output cannot be written, for instance to a full disk.
    """
    stream = sys.stdout
    error = show(stream, lambda: stream.write(f"{text}\n"))
    if isinstance(error, BrokenPipeError):
        sys.exit(CLOSED_PIPE_STATUS)
    if error is not None and error.errno not in _GONE:
        raise UserError(f"standard output cannot be written: {reason(error)}") from error


def warn(text: str) -> None:
    """Prints a line to standard error; passes over one that takes no more."""
    stream = sys.stderr
    show(stream, lambda: stream.write(f"{text}\n"))


def show(stream: TextIO, write: Callable[[], object]) -> OSError | None:
    """Calls `write()` and flushes the stream; one that takes no more is silenced.

    Returns:
      Why the stream takes no more; None where all went well.
    """
    try:
        write()
        stream.flush()
    except OSError as error:
        silence(stream)
        return error
    return None


def silence(stream: TextIO) -> None:
    """Sends what is written to a stream nowhere, what other languages' libraries write too."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Runs a program with streams that take every text, and ends it quietly where nobody reads.

    Characters that a stream's encoding lacks, such as those of file names that are no UTF-8, are
    written as escapes; a stream that was closed at the start is there and says nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream = sys.stdout
        if isinstance(show(stream, lambda: None), BrokenPipeError):
            sys.exit(CLOSED_PIPE_STATUS)
