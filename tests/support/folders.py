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


def write_two_classes(root: Path) -> Path:
    """Classes `ape` and `bee`; a train and a test split of 4 + 3 and 2 + 1 images of 7x5."""
    pattern = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    files = {
        "train/bee": ("2.png", "1.PNG", "3.bmp"),
        "train/ape": ("a.png", "b.jpg", "c.jpeg", "d.webp"),
        "test/ape": ("x.png", "y.png"),
        "test/bee": ("z.png",),
    }
    for number, (directory, names) in enumerate(files.items()):
        (root / directory).mkdir(parents=True)
        for name in names:
            image = Image.fromarray(pattern + 10 * number)
            image.save(root / directory / name)
        (root / directory / "notes.txt").write_text("not an image")
        (root / directory / ".hidden.png").write_text("not an image either")
    (root / "train" / ".cache").mkdir()
    return root
