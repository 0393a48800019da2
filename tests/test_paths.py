"""Paths as users write them: expanded, refused in one sentence, and nothing made on the way."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest

from dfs_jax import paths
from dfs_jax.files import what_helps, write_whole
from dfs_jax.paths import (
    input_directory,
    input_file,
    local_path,
    output_directory,
    output_file,
)
from dfs_jax.types import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
READERS, WRITERS = (input_file, input_directory), (output_file, output_directory)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current directory, a home, a file, a directory, a dangling link and a loop of links."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("content")
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("directory")
    return tmp_path


@pytest.mark.parametrize("function", [local_path, *READERS, *WRITERS])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("gs://bucket/run", "is an address"),
        ("s3://bucket", "is an address"),
        ("hdfs://host:9000/x", "is an address"),
        ("file:///tmp/x", "is an address"),
        (Path("gs://bucket/run"), "is an address"),
        ("a\0b", "NUL"),
        ("a\ud800b", "no path may"),
        ("~nobody_of_that_name/x", "no such home directory"),
    ],
)
def test_what_is_no_local_path(place, function, path, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        function(path, "--flag")
    assert str(error.value).startswith("--flag ")
    assert str(error.value).isprintable()
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("function", "path", "message"),
    [
        *((function, "file/below", "file, which is a file") for function in (*READERS, *WRITERS)),
        *((function, "dangling", "is a link to nowhere") for function in (*READERS, *WRITERS)),
        *((function, "dangling/x", "is a link to nowhere") for function in WRITERS),
        *((function, "loop", "cannot be used: ") for function in (*READERS, *WRITERS)),
        *((function, 300 * "n", "File name too long") for function in (*READERS, *WRITERS)),
        (input_file, "directory", "is a directory: name a file"),
        (output_file, "directory", "is a directory: name a file"),
        (output_file, "link", "is a directory: name a file"),
        (output_file, "new/", "is a directory: name a file"),
        (output_file, "/dev/null", "is not a regular file"),
        (input_directory, "file", "is a file: name a directory"),
        (output_directory, "file", "is a file: name a directory"),
        (output_directory, "caf\udce9/run", "is not UTF-8: name another directory"),
        (output_directory, "file/", "is a file: name a directory"),
        (input_file, "missing", "does not exist: name a file"),
        (input_directory, "missing", "does not exist: name a directory"),
    ],
)
def test_what_cannot_be_read_or_written(place, function, path, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        function(path, "--flag")
    assert "\n" not in str(error.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("function", "path"), [(output_file, "x/new"), (output_directory, "x")])
def test_a_directory_without_permission(place, monkeypatch, function, path):
    """The nearest existing directory is checked; root, who may write anywhere, is not refused."""
    asked = []

    def access(path, mode):
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr(paths.os, "access", access)
    with pytest.raises(UserError, match="cannot be written in: permission denied"):
        function(path, "--flag")
    assert asked == [(place, os.W_OK | os.X_OK)]


def test_what_paths_become(place, monkeypatch):
    home = place / "home"
    assert local_path("~", "x") == home
    assert local_path("~/a", "x") == output_directory("~/a/", "x") == home / "a"
    assert local_path("~root", "x").is_absolute()
    assert local_path("a~", "x") == place / "a~"
    assert local_path("c:/x", "x") == place / "c:" / "x"  # one letter is no address
    assert input_directory("link", "x") == place / "link"
    assert output_file("directory", "x", inside="r.json") == place / "directory" / "r.json"
    assert output_file("file", "x", inside="r.json") == place / "file"
    assert not home.exists()
    monkeypatch.delenv("HOME")  # the system's own list of users has it too
    assert local_path("~", "x").is_absolute()


def test_room_is_short_on_full_disks_only(place):
    for number in errno.errorcode:
        full = number in (errno.ENOSPC, errno.EDQUOT)
        assert ("make room" in what_helps(OSError(number, os.strerror(number)))) == full
    library = ValueError("RESOURCE_EXHAUSTED: [OS error 28: No space left on device]")
    assert "make room" in what_helps(library)
    wrapped = RuntimeError("write failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "make room" in what_helps(wrapped)
    assert "make room" not in what_helps(ValueError("shapes differ"))
    with pytest.raises(UserError, match="could not be written: "):
        write_whole(place / "file" / "x", b"")


def test_names_as_long_as_the_system_allows_can_be_written(place):
    path = output_file("n" * 255, "--output")
    assert write_whole(path, b"content").read_bytes() == b"content"
    assert [p.name for p in place.iterdir() if p.suffix == ".tmp"] == []


def calls_of_path_on_flags(source: str) -> list[str]:
    """Every `Path(...)` in a source of what a flag holds: it should go through `dfs_jax.paths`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if ast.unparse(call.func) == "Path" and call.args]
    return [text for text in map(ast.unparse, named) if ".value" in text]


def test_no_program_takes_a_flag_for_a_path_by_itself():
    folders = [REPOSITORY / name for name in ("dfs_jax", "benchmarks")]
    sources = [*REPOSITORY.glob("*.py"), *(p for folder in folders for p in folder.rglob("*.py"))]
    assert not [path for path in sources if calls_of_path_on_flags(path.read_text())]
    assert calls_of_path_on_flags("Path(workdir.value or 'x').absolute()")
