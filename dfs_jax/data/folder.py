"""Image folders with one directory for each class, read into memory or streamed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from dfs_jax.data.dataset import AnySplit, ImageFile, Origin, RawDataset, Split
from dfs_jax.data.decoding import SUFFIXES, kind_of
from dfs_jax.data.images import MAX_BYTES, Unreadable, decode_readable, memory_needed
from dfs_jax.data.streaming import StreamedSplit, Streaming
from dfs_jax.paths import local_path, shown
from dfs_jax.types import UserError

_VALIDATION_NAMES = ("validation", "val")
# Files that operating systems add to directories of images.
_LEFT_BY_SYSTEMS = frozenset({"thumbs.db", "desktop.ini"})
_MOST_NAMED = 5
_REMEDY = "replace or remove them, or leave up to N of them out with data.max_corrupt=N"

_log = logging.getLogger(__name__)


def load_folder(
    data_dir: str | None = None,
    image_size: int | None = None,
    max_corrupt: int | None = None,
    streaming: Streaming | None = None,
) -> RawDataset:
    """Reads `data_dir/SPLIT/CLASS/...`, images of any format that Pillow reads.

    Splits: `train`; `test`; `validation` or `val`. Without `test`, the validation directory is the
    test set, as in ImageNet; without both there is no test set, and `data.test_examples` holds one
    out. Classes are numbered in the sorted order of the directories of `train`. Images in nested
    directories belong to the class above. Names that start with a dot are ignored; files with other
    extensions are ignored with a warning that counts them.

    Args:
      data_dir: directory that contains `train`.
      image_size: side in pixels that images are scaled to; required if sizes vary.
      max_corrupt: number of unreadable images that may be left out; None for 0.
      streaming: how images are cropped if they stay on disk; None reads them into memory.

    Raises:
      UserError: a directory that is missing or empty; fewer than two classes; classes of `test`
        that `train` lacks; images that cannot be read.
    """
    if data_dir is None:
        raise UserError("data set 'folder' needs data_dir, which holds train/CLASS and test/CLASS")
    root = local_path(data_dir, "data_dir")
    if not root.is_dir():
        raise UserError(f"data_dir {data_dir!r} does not exist or is not a directory")
    directories = _split_directories(root)
    class_names = _classes(directories["train"])
    if len(class_names) < 2:
        raise UserError(
            f"{directories['train']} holds one class, {', '.join(class_names)}: a classifier needs "
            f"at least two directories, one for each class"
        )
    files = {split: _files_of(where, split, class_names) for split, where in directories.items()}
    if streaming is not None:
        return _raw(_streams(root, files, class_names, streaming), class_names, Origin(files))
    unreadable = Unreadable(max_corrupt or 0, _REMEDY)
    splits: dict[str, AnySplit] = {}
    kept = {}
    for split, some in files.items():
        splits[split], kept[split] = _read(root, some, class_names, image_size, unreadable)
    unreadable.check()
    left_out = {f for some in files.values() for f in some} - {
        f for some in kept.values() for f in some
    }
    return _raw(splits, class_names, Origin(kept, left_out=tuple(sorted(left_out))))


def _raw(
    splits: Mapping[str, AnySplit], class_names: tuple[str, ...], origin: Origin
) -> RawDataset:
    train, test, validation = (splits.get(part) for part in ("train", "test", "validation"))
    assert train is not None
    return RawDataset(train, test, class_names, validation, origin)


def list_files(directory: Path) -> tuple[ImageFile, ...]:
    """Returns the files of one split's directory, class by class, without reading the images.

    Raises:
      UserError: a directory that is missing or holds no images.
    """
    names = _classes(directory)
    files = tuple(
        _image_file(directory, path)
        for name in names
        for path in _class_files(directory / name).images
    )
    if not files:
        raise UserError(f"{directory} holds no images: its classes are {', '.join(names)}")
    return files


def read_files(
    root: Path,
    files: Sequence[ImageFile],
    class_names: Sequence[str],
    image_size: int | None,
    streaming: Streaming | None = None,
) -> AnySplit:
    """Returns files below `root` as a split, labelled by their class's index in `class_names`.

    Raises:
      UserError: a file is missing or not an image, or sizes vary without `image_size`.
    """
    if streaming is not None:
        return _streams(root, {"files": files}, class_names, streaming)["files"]
    unreadable = Unreadable()
    split, _ = _read(root, files, class_names, image_size, unreadable)
    unreadable.check()
    return split


def exceeds_memory(data_dir: str | None, image_size: int) -> bool:
    """Returns whether the scaled images of a folder would not fit into memory."""
    if data_dir is None:
        return False
    paths = walk_files(local_path(data_dir, "data_dir"))
    count = sum(path.suffix.lower() in SUFFIXES for path in paths)
    return memory_needed(count, image_size, image_size) > MAX_BYTES


class FolderRecords:
    """Encoded files of a split, as `StreamedSplit` reads them.

    Args:
      root: directory that paths are relative to.
      files: files of the split.
      labels: label of each file.
    """

    def __init__(self, root: Path, files: Sequence[ImageFile], labels: Sequence[int]):
        self._root, self._paths, self._labels = root, [f.path for f in files], list(labels)

    @property
    def name(self) -> str:
        return str(self._root)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns the content and label of each file; no bytes if it cannot be opened."""
        return [(self._content(i), self._labels[i]) for i in positions]

    def describe(self, position: int) -> str:
        """Returns a file's path and kind."""
        return f"{self._paths[position]} ({kind_of(self._content(position)[:4096])})"

    def _content(self, position: int) -> bytes:
        try:
            return (self._root / self._paths[position]).read_bytes()
        except OSError:
            return b""


def _streams(
    root: Path,
    files: Mapping[str, Sequence[ImageFile]],
    class_names: Sequence[str],
    streaming: Streaming,
) -> dict[str, AnySplit]:
    """Returns splits of one set of records, so that examples can move between splits."""
    whole = [file for some in files.values() for file in some]
    records = FolderRecords(root, whole, _labels(whole, class_names))
    splits: dict[str, AnySplit] = {}
    start = 0
    for split, some in files.items():
        splits[split] = StreamedSplit(records, streaming, np.arange(start, start + len(some)))
        start += len(some)
    return splits


def _read(
    root: Path,
    files: Sequence[ImageFile],
    class_names: Sequence[str],
    image_size: int | None,
    unreadable: Unreadable,
) -> tuple[Split, tuple[ImageFile, ...]]:
    """Returns the readable images as a split, and their files."""
    paths = [root / file.path for file in files]
    # Names are paths, so that every message about an image contains its file.
    describe = [shown(path) for path in paths].__getitem__
    pixels, kept = decode_readable(paths, len(paths), image_size, describe, unreadable)
    labels = np.array(_labels(files, class_names), np.int32)[kept]
    return Split(pixels, labels), tuple(files[i] for i in kept)


def _labels(files: Sequence[ImageFile], class_names: Sequence[str]) -> list[int]:
    number = {name: label for label, name in enumerate(class_names)}
    return [number[file.class_name] for file in files]


def _split_directories(root: Path) -> dict[str, Path]:
    directories = {"train": root / "train"}
    validation = [root / name for name in _VALIDATION_NAMES if (root / name).is_dir()]
    if len(validation) > 1:
        raise UserError(f"{root} holds both validation/ and val/: keep one of them")
    if (root / "test").is_dir():
        directories["test"] = root / "test"
    if validation:
        directories["validation" if "test" in directories else "test"] = validation[0]
    return directories


def _classes(directory: Path) -> tuple[str, ...]:
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}")
    try:
        names = sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        _refuse(error)
    if not names:
        raise UserError(f"{directory} holds no directories: it needs one for each class")
    return tuple(names)


def _files_of(directory: Path, split: str, class_names: tuple[str, ...]) -> tuple[ImageFile, ...]:
    """Returns the files of a split in the order of the classes; warns of ignored files."""
    found = _classes(directory)
    strange = sorted(set(found) - set(class_names))
    if strange:
        raise UserError(
            f"{directory} holds {len(strange)} class(es) that train/ lacks: {', '.join(strange)}; "
            f"rename them to classes of train/, or remove them"
        )
    listings = {name: _class_files(directory / name) for name in found}
    empty = [name for name in class_names if name not in listings or not listings[name].images]
    if empty and (split == "train" or len(empty) == len(class_names)):
        raise UserError(
            f"{directory} holds no images of the class(es) {', '.join(empty)}: images end in "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    if empty:
        _log.warning("%s has no images of %s", directory, ", ".join(empty))
    _tell(directory, "in nested directories, read as the class", listings, "nested")
    _tell(directory, "passed over, no images by their ending", listings, "others")
    return tuple(_image_file(directory, path) for name in found for path in listings[name].images)


def _image_file(directory: Path, path: Path) -> ImageFile:
    try:
        size = path.stat().st_size
    except OSError:  # a broken link, reported when it is read
        size = 0
    return ImageFile(path.relative_to(directory.parent).as_posix(), size)


class _ClassFiles(NamedTuple):
    """Files below a class's directory: images, images in nested directories, and other files."""

    images: list[Path]
    nested: list[Path]
    others: list[Path]


def _class_files(directory: Path) -> _ClassFiles:
    files = sorted(walk_files(directory))
    images = [p for p in files if p.suffix.lower() in SUFFIXES]
    return _ClassFiles(
        images,
        [path for path in images if path.parent != directory],
        [path for path in files if path.suffix.lower() not in SUFFIXES],
    )


def walk_files(directory: Path) -> Iterator[Path]:
    """Yields the files below a directory except hidden ones; follows a loop of links once.

    Raises:
      UserError: a directory cannot be listed.
    """
    seen = set()
    for where, below, names in os.walk(directory, onerror=_refuse, followlinks=True):
        place = os.stat(where)
        if (place.st_dev, place.st_ino) in seen:
            below.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        below[:] = sorted(name for name in below if name[0] != ".")
        for name in names:
            if name[0] != "." and name.lower() not in _LEFT_BY_SYSTEMS:
                yield Path(where, name)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot list the directory {error.filename}: {error.strerror}; make it readable, or move "
        f"it out of the data"
    ) from error


def _tell(directory: Path, what: str, listings: dict[str, _ClassFiles], field: str) -> None:
    paths = [path for files in listings.values() for path in getattr(files, field)]
    if paths:
        named = ", ".join(shown(path.relative_to(directory)) for path in paths[:_MOST_NAMED])
        more = ", ..." if len(paths) > _MOST_NAMED else ""
        _log.warning("%s: %d file(s) %s: %s%s", directory, len(paths), what, named, more)
