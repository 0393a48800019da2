"""A set of one's own: one directory for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dfs_jax.data.dataset import ImageFile, Origin, RawDataset, Split
from dfs_jax.data.images import decode_images
from dfs_jax.paths import local_path
from dfs_jax.types import UserError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_VALIDATION_NAMES = ("validation", "val")


def load_folder(data_dir: str | None = None, image_size: int | None = None) -> RawDataset:
    """Reads `data_dir/SPLIT/CLASS/*.{png,jpg,jpeg,bmp,webp}`.

    Splits: `train`; `test`; `validation` or `val`. With no `test`, the validation directory is the
    test set, as in ImageNet, and validation examples are held out of train like any other set's.
    Classes are numbered in the sorted order of their directories. Names that start with a dot, and
    files with other suffixes, are passed over.

    Args:
      data_dir: the directory.
      image_size: side in pixels that images are scaled to; needed where sizes vary.

    Raises:
      UserError: a directory that is missing or empty; classes that differ between splits; a file
        that is not an image.
    """
    if data_dir is None:
        raise UserError("data set 'folder' needs data_dir, which holds train/CLASS and test/CLASS")
    root = local_path(data_dir, "data_dir")
    if not root.is_dir():
        raise UserError(f"data_dir {data_dir!r} does not exist or is no directory")
    validation_dir = _validation_directory(root)
    test_dir = root / "test"
    if not test_dir.is_dir():
        if validation_dir is None:
            raise UserError(f"{root} holds neither test/ nor validation/ nor val/")
        test_dir, validation_dir = validation_dir, None
    class_names = _classes(root / "train")
    directories = {"train": root / "train", "test": test_dir}
    if validation_dir is not None:
        directories["validation"] = validation_dir
    files = {split: _files_of(where, class_names) for split, where in directories.items()}
    splits = {
        split: read_files(root, some, class_names, image_size) for split, some in files.items()
    }
    return RawDataset(class_names=class_names, origin=Origin(files), **splits)


def list_files(directory: Path) -> tuple[ImageFile, ...]:
    """Returns the files of one split's directory, class by class, without reading the images.

    Raises:
      UserError: a directory that is missing or holds no images.
    """
    return tuple(
        ImageFile(path.relative_to(directory.parent).as_posix(), path.stat().st_size)
        for name in _classes(directory)
        for path in _image_paths(directory / name)
    )


def read_files(
    root: Path, files: Sequence[ImageFile], class_names: Sequence[str], image_size: int | None
) -> Split:
    """Reads files below `root`; a file's label is the place of its class in `class_names`.

    Raises:
      UserError: a file that is missing or is not an image; sizes that vary without `image_size`.
    """
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[file.class_name] for file in files], np.int32)
    # Named by path: every message about an image then says which file it is.
    paths = [root / file.path for file in files]
    return Split(decode_images(paths, len(paths), image_size, lambda i: str(paths[i])), labels)


def _validation_directory(root: Path) -> Path | None:
    found = [root / name for name in _VALIDATION_NAMES if (root / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"{root} holds both validation/ and val/: keep one of them")
    return found[0] if found else None


def _classes(directory: Path) -> tuple[str, ...]:
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}")
    names = sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    if not names:
        raise UserError(f"{directory} holds no directories: it needs one for each class")
    return tuple(names)


def _files_of(directory: Path, class_names: tuple[str, ...]) -> tuple[ImageFile, ...]:
    found = _classes(directory)
    if found != class_names:
        different = ", ".join(sorted(set(found) ^ set(class_names)))
        raise UserError(
            f"{directory} holds {len(found)} classes and train/ {len(class_names)}; "
            f"these are in one of them only: {different}"
        )
    return list_files(directory)


def _image_paths(directory: Path) -> list[Path]:
    paths = sorted(
        p for p in directory.iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != "."
    )
    if not paths:
        raise UserError(f"{directory} holds no {', '.join(sorted(_SUFFIXES))} files")
    return paths
