"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dfs_jax.types import UserError


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file and its missing directories so that the old content or all of the new is there.

    Raises:
      UserError: it could not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} could not be written: {error.strerror}") from error
    return path
