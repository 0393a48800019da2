"""Standard output that may be strict, closed or gone, without making a program fail."""

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

# A shell's status of a program ended by SIGPIPE.
CLOSED_PIPE_STATUS = 128 + signal.SIGPIPE
_GONE = (errno.EIO, errno.ENXIO, errno.EBADF)  # of a terminal: a lost SSH line


def say(text: str) -> None:
    """Prints a line.

    Exits with `CLOSED_PIPE_STATUS` if the reader has gone (`| head -1`), as usual for programs;
    ignores a terminal that is gone.

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
    """Prints a line to standard error; ignores a stream that cannot be written."""
    stream = sys.stderr
    show(stream, lambda: stream.write(f"{text}\n"))


def show(stream: TextIO, write: Callable[[], object]) -> OSError | None:
    """Calls `write()` and flushes the stream; a stream that cannot be written is silenced.

    Returns:
      The error of the stream; None if there was none.
    """
    try:
        write()
        stream.flush()
    except OSError as error:
        silence(stream)
        return error
    return None


def silence(stream: TextIO) -> None:
    """Discards further output to a stream, including that of libraries in other languages."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Runs a program with streams that accept any text, and ends it quietly on a closed pipe.

    Characters that a stream's encoding lacks, such as those of file names that are not UTF-8, are
    escaped; a stream that was closed at the start is replaced by one that discards output.
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
