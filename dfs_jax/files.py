"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from dfs_jax.paths import reason, shown
from dfs_jax.types import UserError

# Messages of a full disk from libraries in other languages, in exceptions without a number.
_FULL = re.compile("no space left|quota exceeded", re.IGNORECASE)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `path` after the context.

    At any time `path` has either its old content or all of the new content.

    Raises:
      OSError: the file could not be written.
    """
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident():x}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> Path:
    """Writes a file atomically, and creates its missing parent directories.

    Raises:
      UserError: it could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{shown(path)} could not be written: {reason(error)}") from error
    return path


def what_helps(error: BaseException) -> str:
    """Returns advice for a run's file that could not be written; space matters only on full disks.

    >>> what_helps(OSError(errno.ENOSPC, "No space left on device"))
    'make room and start the same command again'
    >>> what_helps(OSError(errno.EROFS, "Read-only file system"))
    'start the same command again when it can be written'
    """
    if _is_full(error):
        return "make room and start the same command again"
    return "start the same command again when it can be written"


def _is_full(error: BaseException | None) -> bool:
    """Returns whether a full disk or a used-up quota caused an exception."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
