"""Writes an unfinished run as pieces of limited size, and reads it again.

    OUTPUT/run.json      the cell, its step, the run's small files, the content of the pieces
    OUTPUT/run.1, ...    the numbers of the state, byte by byte

The bytes of float32 numbers are stored separately: sign and exponent compress well, the others
hardly. If the exact state exceeds the size limit, the last byte of every parameter and the last two
of the optimizer's state are rounded away; such a run continues from an approximate state, which its
record says.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfs_jax.files import write_whole
from dfs_jax.types import PyTree, UserError

MANIFEST = "run.json"
SMALL_FILES = ("metrics.jsonl", "sessions.json")
_EXACT = 4  # bytes of a float32
_ROUNDED = {".params": 3, ".averaged": 3, ".opt_state": 2}
_MIB = 2**20


def save_run(
    run: Path,
    state: PyTree,
    about: dict[str, Any],
    output: Path,
    *,
    piece_mib: float,
    pieces_mib: float,
) -> dict[str, Any]:
    """Writes the pieces of a run's state, then the manifest, which is returned.

    Args:
      run: directory of the run, whose small files are included.
      state: state after the last saved step.
      about: further content of the manifest, such as the cell and the step.
      output: destination.
      piece_mib: largest size of a piece.
      pieces_mib: largest size of all pieces.

    Raises:
      UserError: even the rounded state is larger.
    """
    remove_run(output)
    for rounded in (False, True):
        leaves, content = _encode(state, rounded=rounded)
        if len(content) <= pieces_mib * _MIB:
            break
    else:
        raise UserError(
            f"the run takes {len(content) / _MIB:.1f} MiB even when rounded, and at most "
            f"{pieces_mib:g} may travel: raise --pieces_mib"
        )
    size = max(1, int(piece_mib * _MIB))
    pieces = {}
    for number, start in enumerate(range(0, len(content), size), start=1):
        piece = content[start : start + size]
        write_whole(output / f"run.{number}", piece)
        pieces[f"run.{number}"] = hashlib.sha256(piece).hexdigest()
    files = {
        name: (run / name).read_text(encoding="utf-8")
        for name in SMALL_FILES
        if (run / name).exists()
    }
    manifest = {**about, "rounded": rounded, "leaves": leaves, "pieces": pieces, "files": files}
    write_whole(output / MANIFEST, json.dumps(manifest))
    return manifest


def read_run(directory: Path) -> tuple[dict[str, Any], bytes] | None:
    """Returns the manifest and the pieces' content; None if there is no run.

    Raises:
      UserError: a piece is missing or damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    content = b""
    for name, expected in manifest["pieces"].items():
        piece = directory / name
        found = piece.read_bytes() if piece.exists() else b""
        if hashlib.sha256(found).hexdigest() != expected:
            raise UserError(f"the piece {piece} is missing or damaged: copy it again")
        content += found
    return manifest, content


def restore_state(manifest: dict[str, Any], content: bytes, target: PyTree) -> PyTree:
    """Returns the saved state, on the devices.

    Args:
      manifest, content: results of `read_run`.
      target: pytree of `jax.ShapeDtypeStruct` with shardings, with the state's structure.

    Raises:
      UserError: the state is of another model or optimizer.
    """
    described = jax.tree_util.tree_leaves_with_path(target)
    names = [jax.tree_util.keystr(path) for path, _ in described]
    shapes = [[list(leaf.shape), str(leaf.dtype)] for _, leaf in described]
    stored = manifest["leaves"]
    if names != [leaf["name"] for leaf in stored] or shapes != [
        [leaf["shape"], leaf["dtype"]] for leaf in stored
    ]:
        raise UserError(f"the run of {manifest.get('cell')} is of another network: start it anew")
    arrays = _decode(stored, content)
    placed = [
        jax.device_put(array, leaf.sharding)
        for array, (_, leaf) in zip(arrays, described, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def remove_run(directory: Path) -> None:
    """Removes the manifest, then the pieces, of a run from a directory."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.glob("run.[0-9]*"):
        path.unlink()


def _encode(state: PyTree, *, rounded: bool) -> tuple[list[dict[str, Any]], bytes]:
    leaves, streams = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name, array = jax.tree_util.keystr(path), np.asarray(leaf)
        kept = _EXACT
        if rounded:
            kept = next((n for start, n in _ROUNDED.items() if name.startswith(start)), _EXACT)
        planes = list(_planes(array, kept))
        sizes = [len(plane) for plane in planes]
        about = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype)}
        leaves.append({**about, "kept": kept, "sizes": sizes})
        streams += planes
    return leaves, b"".join(streams)


def _planes(array: np.ndarray, kept: int) -> Iterator[bytes]:
    """Yields an array's bytes, compressed; for float32, its leading bytes, one plane after another.

    >>> [zlib.decompress(plane).hex() for plane in _planes(np.float32([1.0, -2.0]), 2)]
    ['3fc0', '8000']
    """
    if array.dtype != np.float32:
        yield zlib.compress(array.tobytes(), 1)
        return
    bits = np.ascontiguousarray(array).view(np.uint32).ravel()
    dropped = 8 * (_EXACT - kept)
    if dropped:
        bits = (bits + np.uint32(1 << (dropped - 1))) >> np.uint32(dropped)
    for place in reversed(range(kept)):
        plane = (bits >> np.uint32(8 * place)) & np.uint32(255)
        yield zlib.compress(plane.astype(np.uint8).tobytes(), 1)


def _decode(leaves: list[dict[str, Any]], content: bytes) -> list[np.ndarray]:
    arrays, start = [], 0
    for leaf in leaves:
        planes = []
        for size in leaf["sizes"]:
            planes.append(zlib.decompress(content[start : start + size]))
            start += size
        dtype = np.dtype(leaf["dtype"])
        if dtype != np.float32:
            arrays.append(np.frombuffer(planes[0], dtype).reshape(leaf["shape"]))
            continue
        bits = np.zeros(len(planes[0]), np.uint32)
        for plane in planes:
            bits = (bits << np.uint32(8)) | np.frombuffer(plane, np.uint8)
        bits <<= np.uint32(8 * (_EXACT - leaf["kept"]))
        arrays.append(bits.view(np.float32).reshape(leaf["shape"]))
    return arrays
