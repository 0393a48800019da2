"""Paths given by a user, expanded and checked before anything is created or computed."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from dfs_jax.types import UserError

# A single letter is a drive; pathlib merges two slashes into one.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")

UserPath = str | os.PathLike[str]


def local_path(path: UserPath, name: str) -> Path:
    """Returns the absolute path, with `~` and `~user` expanded to home directories.

    Args:
      path: path as the user wrote it; all uses of it must go through one of these functions.
      name: flag or field that contains it, for messages.

    Raises:
      UserError: the path is empty, a URL such as `gs://bucket/run`, or not a valid path.

    >>> local_path("/data/../runs", "--workdir")
    PosixPath('/data/../runs')
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError(f"{name} is empty: name a path")
    if _ADDRESS.match(text):
        raise UserError(
            f"{name} {shown(text)} is an address, and files are read and written on this machine's "
            f"file systems alone: name a local path, or mount it"
        )
    if "\0" in text:
        raise UserError(f"{name} {shown(text)} holds a NUL character, which no path may")
    try:
        os.fsencode(text)
        return Path(text).expanduser().absolute()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {shown(text)} holds characters that no path may") from error
    except RuntimeError as error:
        raise UserError(f"{name} {shown(text)}: there is no such home directory") from error
    except OSError as error:  # the current directory no longer exists
        raise UserError(f"{name} {shown(text)} cannot be used: {reason(error)}") from error


def input_file(path: UserPath, name: str) -> Path:
    """Returns the path of a file to read, see `local_path`.

    Raises:
      UserError: the file does not exist, is a directory, or is not readable.
    """
    found = local_path(path, name)
    mode = _mode(found, name)
    if mode is None:
        raise UserError(f"{name} {shown(found)} does not exist: name a file")
    if stat.S_ISDIR(mode):
        raise UserError(f"{name} {shown(found)} is a directory: name a file")
    return _permitted(found, name, os.R_OK, "read")


def input_directory(path: UserPath, name: str) -> Path:
    """Returns the path of a directory to read, see `local_path`.

    Raises:
      UserError: the directory does not exist, is a file, or is not readable.
    """
    found = local_path(path, name)
    mode = _mode(found, name)
    if mode is None:
        raise UserError(f"{name} {shown(found)} does not exist: name a directory")
    if not stat.S_ISDIR(mode):
        raise UserError(f"{name} {shown(found)} is a file: name a directory")
    return _permitted(found, name, os.R_OK | os.X_OK, "read")


def output_file(path: UserPath, name: str, *, inside: str | None = None) -> Path:
    """Returns the path of a file to write, see `local_path`; creates nothing.

    Args:
      path: path as the user wrote it.
      name: flag or field that contains it, for messages.
      inside: name of the file to write if the path is a directory; None if it must not be one.

    Raises:
      UserError: the path is a directory or a device, or its directory cannot be created or written.
    """
    found = local_path(path, name)
    mode = _mode(found, name)
    if os.fspath(path).endswith("/") or (mode is not None and stat.S_ISDIR(mode)):
        if inside is not None:
            return output_file(found / inside, name)
        raise UserError(f"{name} {shown(found)} is a directory: name a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise UserError(f"{name} {shown(found)} is not a regular file: name another")
    _writable(found.parent, name)
    return found


def output_directory(path: UserPath, name: str) -> Path:
    """Returns the path of a directory to write in, see `local_path`; creates nothing.

    Raises:
      UserError: the path is a file or not UTF-8, which libraries that write there need, or the
        directory cannot be created or written.
    """
    found = local_path(path, name)
    try:
        str(found).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {shown(found)} is not UTF-8: name another directory") from error
    return _writable(found, name)


def make_directory(path: Path, name: str) -> None:
    """Creates a directory and its missing parents.

    Raises:
      UserError: it cannot be created.
    """
    output_directory(path, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {shown(path)} cannot be written: {reason(error)}") from error


def shown(path: UserPath) -> str:
    """Returns a path in a form that any terminal can show on one line.

    >>> shown("new\\nline")
    "'new\\\\nline'"
    """
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def reason(error: OSError) -> str:
    """Returns the system's description of an error, such as "Permission denied"."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def _writable(directory: Path, name: str) -> Path:
    """Returns the directory if it, or its nearest existing parent, is writable."""
    for place in (directory, *directory.parents):
        mode = _mode(place, name)
        if mode is not None:
            break
    else:
        return directory
    if not stat.S_ISDIR(mode):
        raise UserError(f"{name} {shown(place)} is a file: name a directory")
    _permitted(place, name, os.W_OK | os.X_OK, "written in")
    return directory


def _permitted(path: Path, name: str, mode: int, done: str) -> Path:
    if not os.access(path, mode):
        raise UserError(f"{name} {shown(path)} cannot be {done}: permission denied")
    return path


def _mode(path: Path, name: str) -> int | None:
    """Returns the type bits of a path's file; None if it does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        target = shown(os.readlink(path))
        raise UserError(
            f"{name} {shown(path)} is a link to {target}, which does not exist: mend the link or "
            f"name another path"
        ) from None
    except NotADirectoryError:
        file = next(parent for parent in path.parents if os.path.lexists(parent))
        raise UserError(
            f"{name} {shown(path)} lies below {shown(file)}, which is a file: name another path"
        ) from None
    except OSError as error:
        raise UserError(f"{name} {shown(path)} cannot be used: {reason(error)}") from error
