"""Folders of images for tests: three classes that differ in colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "fox")
SIZE = 8


def write_folder(root: Path, *, train: int = 11, test: int = 5, classes=CLASSES) -> Path:
    """Writes `root/SPLIT/CLASS/NUMBER.png`; returns the root."""
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            for number in range(count):
                write_image(root / split / name / f"{number}.png")
    return root


def write_image(path: Path, *, size: int = SIZE, shade: int | None = None) -> Path:
    """Writes an image whose colour says its class, and whose noise its path within the split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(list(path.name.encode()))
    channel = CLASSES.index(path.parent.name) if path.parent.name in CLASSES else 0
    pixels = draw.integers(0, 90, (size, size, 3))
    pixels[..., channel] += 120 if shade is None else shade
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path
