"""A small image set in a few files: strips of lossless WebP in zip archives.

    DIR/cifar100.json           names, counts, and a checksum of every part and of all pixels
    DIR/cifar100.part1.zip      strips of images one below another, and their labels
    DIR/cifar100.part2.zip      ...

Reading needs only numpy and Pillow. Images of a strip share code tables, which makes small images a
tenth smaller than one file for each.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dfs_jax.data.dataset import RawDataset, Split
from dfs_jax.files import write_whole
from dfs_jax.types import UserError, check_whole

IMAGES_A_STRIP = 20  # longer strips save little, and take longer to encode
SPLITS = ("train", "test")


def pack(raw: RawDataset, name: str, directory: Path, *, parts: int = 2) -> list[Path]:
    """Writes a set in memory, and returns the paths of its files.

    Args:
      raw: set with splits `train` and `test`, images uint8 `[n, height, width, 3]`.
      name: first part of the files' names.
      directory: destination, created if missing.
      parts: number of archives of about equal size.

    Raises:
      UserError: fewer parts than one, or a file that could not be written.
    """
    check_whole("parts", parts)
    splits: dict[str, Any] = {split: getattr(raw, split) for split in SPLITS}
    strips = [strip for split in SPLITS for strip in _strips(split, splits[split].images)]
    groups = np.array_split(np.arange(len(strips)), parts)
    paths = [directory / f"{name}.part{i}.zip" for i in range(1, parts + 1)]
    for path, group in zip(paths, groups, strict=True):
        write_whole(path, _archive([strips[i] for i in group]))
    about = {
        "name": name,
        "class_names": list(raw.class_names),
        "image_shape": list(raw.train.image_shape),
        "labels": {split: np.asarray(part.labels).tolist() for split, part in splits.items()},
        "pixels_sha256": {split: _sha256(part.images) for split, part in splits.items()},
        "parts": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
    }
    return [write_whole(directory / f"{name}.json", json.dumps(about)), *paths]


def unpack(name: str, directory: Path) -> RawDataset:
    """Reads a packed set into memory, with the examples in their packed order.

    Raises:
      UserError: a file is missing, or differs from the packed one.
    """
    about = _read_description(name, directory)
    height, width, channels = about["image_shape"]
    images = {
        split: np.empty((len(labels), height, width, channels), np.uint8)
        for split, labels in about["labels"].items()
    }
    with ThreadPoolExecutor() as pool:
        for part, expected in about["parts"].items():
            strips = _read_part(directory / part, expected)
            for place, strip in pool.map(_decode, strips.items()):
                split, start = place
                pixels = strip.reshape(-1, height, width, channels)
                images[split][start : start + len(pixels)] = pixels
    for split, expected in about["pixels_sha256"].items():
        if _sha256(images[split]) != expected:
            raise UserError(
                f"the images of {name} {split} in {directory} are not those that were packed: "
                f"pack the set again"
            )
    labels = {split: np.array(values, np.int32) for split, values in about["labels"].items()}
    train, test = (Split(images[split], labels[split]) for split in SPLITS)
    return RawDataset(train, test, tuple(about["class_names"]))


def _read_description(name: str, directory: Path) -> dict[str, Any]:
    path = directory / f"{name}.json"
    if not path.is_file():
        raise UserError(
            f"there is no packed set {path}: make it with "
            f"`python -m benchmarks.gpu.pack --output={directory}` where the set is"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not {"class_names", "image_shape", "labels", "pixels_sha256", "parts"} <= about.keys():
            raise ValueError("fields are missing")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from error
    return about


def _strips(split: str, images: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Yields the name of each strip (its split and first image) and its encoded pixels."""
    for start in range(0, len(images), IMAGES_A_STRIP):
        some = images[start : start + IMAGES_A_STRIP]
        file = io.BytesIO()
        strip = Image.fromarray(some.reshape(-1, *some.shape[2:]))
        strip.save(file, "WEBP", lossless=True, quality=100, method=4)
        yield f"{split}-{start}.webp", file.getvalue()


def _archive(strips: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in strips:
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def _read_part(path: Path, expected: str) -> dict[str, bytes]:
    if not path.is_file():
        raise UserError(f"the part {path} is missing: copy every part into one directory")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"the part {path} is damaged (its checksum differs): copy it again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _decode(strip: tuple[str, bytes]) -> tuple[tuple[str, int], np.ndarray]:
    name, content = strip
    split, _, start = name.removesuffix(".webp").partition("-")
    with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
        return (split, int(start)), np.asarray(image.convert("RGB"))


def _sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
