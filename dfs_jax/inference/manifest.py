"""The manifest of an exported network, `model.json`, and the files that it names.

Every file has a checksum in the manifest, which is written last and checked first: a directory
whose export was interrupted, mixed with another or damaged is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfs_jax.files import write_whole
from dfs_jax.inference import policy as policies
from dfs_jax.paths import reason
from dfs_jax.types import UserError

VERSION = 2
FILE = "model.json"
STABLEHLO, ONNX = "stablehlo", "onnx"
_DTYPES = ("uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool")


def write_export(
    directory: Path, contents: Mapping[str, bytes], about: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Writes files and their manifest, the manifest last; returns the paths.

    Args:
      directory: directory to write.
      contents: content of each file, by name.
      about: fields of the manifest.
    """
    manifest = {
        "version": VERSION,
        **about,
        "sha256": {name: _checksum(content) for name, content in contents.items()},
    }
    _remove(directory / FILE)
    text = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()
    written = [*contents.items(), (FILE, text)]
    return tuple(write_whole(directory / name, content) for name, content in written)


class Manifest:
    """A manifest that has been read, and its files.

    Args:
      directory: directory of the export.

    Attributes:
      path: the manifest's path.
      content: its fields.

    Raises:
      UserError: no manifest, or one that this program cannot use.
    """

    def __init__(self, directory: Path):
        self.path = directory / FILE
        if not self.path.is_file():
            raise UserError(
                f"there is no exported network in {directory}: {FILE} is missing; "
                f"python -m dfs_jax.inference.export writes one"
            )
        self.content = self._parsed(_read(self.path))
        self._check()
        self._read = {
            name: self._checked(name, checksum) for name, checksum in self.content["sha256"].items()
        }

    def file(self, name: str) -> bytes:
        """Returns the content of a file, whose checksum has been compared."""
        return self._read[name]

    @property
    def formats(self) -> dict[str, dict[str, Any]]:
        """Description of each format in the export."""
        return self.content["formats"]

    def _parsed(self, text: bytes) -> dict[str, Any]:
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{self.path} is not JSON: {error}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version not in (1, VERSION) or isinstance(version, bool):
            raise UserError(
                f'{self.path}: its "version" is {version!r}, this program reads 1 to {VERSION}'
            )
        if version == 1 and "stages" in content:  # which knew one format
            content["formats"] = {STABLEHLO: {"stages": content["stages"]}}
        return content

    def _check(self) -> None:
        """Raises UserError unless the manifest has what loading reads, and names only its files."""
        content = self.content
        image = content.get("image")
        formats = content.get("formats")
        good = {
            "sha256": _is_map(content.get("sha256"), str),
            "labels": _is_list(content.get("labels"), str),
            "image": isinstance(image, dict)
            and _is_list(image.get("shape"), int)
            and image.get("dtype") in _DTYPES,
            "formats": _is_map(formats, dict)
            and bool(formats)
            and all(_is_list(f.get("stages"), dict) and f["stages"] for f in formats.values()),
        }
        for field, is_good in good.items():
            if not is_good:
                raise self._refused(f'its field "{field}" is missing or wrong')
        names = [policies.FILE]
        for name, form in content["formats"].items():
            names += [stage.get("file") for stage in form["stages"]]
            names += [form[key] for key in ("weights", "whole") if key in form]
            names += ["weights.safetensors"] if name == STABLEHLO else []
        for name in [*names, *content["sha256"]]:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise self._refused(f"it names {name!r}, which is no file of its directory")
            if name not in content["sha256"]:
                raise self._refused(f"it has no checksum of {name}")

    def _refused(self, why: str) -> UserError:
        return UserError(f"{self.path}: {why}: export again")

    def _checked(self, name: str, checksum: str) -> bytes:
        path = self.path.parent / name
        content = _read(path)
        if _checksum(content) != checksum:
            raise UserError(f"{path} is damaged or of another export: export again")
        return content


def _is_map(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(x, kind) for x in value.values())


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(x, kind) for x in value)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error
