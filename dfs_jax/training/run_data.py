"""Record of the data that a run was trained on, written when training starts.

    data.json            class names in the order of the network's outputs, image shape, mean and
                         standard deviation, sizes and fingerprints of the splits, parameters of
                         the validation split
    data_files.json.gz   for sets that are stored as files: relative path and size of each, by split

A network is evaluated, exported and resumed with this record, even if the data directory changes.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.data.dataset import AnySplit, Dataset, ImageFile, Split
from dfs_jax.files import write_whole
from dfs_jax.training.checkpoint import has_steps
from dfs_jax.training.processes import by_writer, is_writer
from dfs_jax.types import Config, UserError

FILE, FILES_FILE = "data.json", "data_files.json.gz"
VERSION = 1
PARTS = ("train", "validation", "test")


class SplitRecord(NamedTuple):
    """One split of a run's data.

    Attributes:
      examples: number of examples.
      fingerprint: checksum of its files, or of its labels if it is not stored as files; None for a
        TFDS set, which its version identifies.
    """

    examples: int
    fingerprint: str | None


@dataclasses.dataclass(frozen=True)
class RunData:
    """Record of the data that a run was trained on.

    Attributes:
      name: name of the set in the config.
      version: version of a TFDS set.
      class_names: names of the classes, in the order of the network's outputs.
      image_shape: `(height, width, channels)`.
      mean: mean of each channel, in units in which white is 1.
      std: standard deviation of each channel, in the same units.
      split_seed: random seed of the held-out examples.
      validation_examples: number of held-out examples in the config.
      splits: record of each split of the run.
      files: files of each split that is stored as files, in the order of its examples.
      left_out: paths of files that are not readable images.
    """

    name: str
    version: str | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split_seed: int
    validation_examples: int | None
    splits: Mapping[str, SplitRecord]
    files: Mapping[str, tuple[ImageFile, ...]]
    left_out: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> RunData:
        """Returns a record with other values for some fields."""
        return dataclasses.replace(self, **changes)


def describe_data(dataset: Dataset, section: Config) -> RunData:
    """Returns a run's record of its data set.

    Args:
      dataset: data set that the run is trained on.
      section: section `data` of the run's config.
    """
    files = dataset.origin.files
    splits = {part: getattr(dataset, part) for part in PARTS}
    return RunData(
        name=dataset.name,
        version=dataset.origin.version,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        mean=tuple(map(float, dataset.mean)),
        std=tuple(map(float, dataset.std)),
        split_seed=section.split_seed,
        validation_examples=section.validation_examples,
        splits={
            part: SplitRecord(split.num_examples, _fingerprint(dataset, part, split))
            for part, split in splits.items()
            if split is not None
        },
        files={part: tuple(files[part]) for part in PARTS if part in files},
        left_out=tuple(sorted(file.path for file in dataset.origin.left_out)),
    )


def files_fingerprint(files: Iterable[tuple[str, int]]) -> str:
    """Returns a checksum of relative paths and sizes, independent of their order.

    Example:
      >>> files_fingerprint([("a", 1), ("b", 2)]) == files_fingerprint([("b", 2), ("a", 1)])
      True
    """
    checksum = hashlib.sha256()
    for path, size in sorted(files):
        checksum.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
    return f"files:{checksum.hexdigest()}"


def labels_fingerprint(labels: np.ndarray) -> str:
    """Returns a checksum of labels `[n]` in their order."""
    return f"labels:{zlib.crc32(np.ascontiguousarray(labels, np.int32).tobytes()):08x}"


def _fingerprint(dataset: Dataset, part: str, split: AnySplit) -> str | None:
    if part in dataset.origin.files:
        return files_fingerprint(dataset.origin.files[part])
    if dataset.origin.version is None and isinstance(split, Split):
        return labels_fingerprint(split.labels)
    return None


def record_data(workdir: Path, data: RunData) -> None:
    """Writes the record of a run's data into its directory, unless there is one already.

    Raises:
      UserError: it cannot be written, or this process reads other data than the writer.
    """
    text = to_json(data)
    written = by_writer(_write, workdir, data, text)
    if not is_writer() and written != text:
        raise UserError(
            f"this process reads another data set {data.name!r} than the others of the run: "
            f"copy one to all machines, or name its directory with data.data_dir"
        )


def _write(workdir: Path, data: RunData, text: str) -> str:
    path = workdir / FILE
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        if data.files:
            listing = json.dumps(dict(data.files))
            write_whole(workdir / FILES_FILE, gzip.compress(listing.encode(), mtime=0))
        write_whole(path, text)
    return text


def known_data(workdir: Path) -> RunData | None:
    """Returns the data record of a run with checkpoints; None for a new run, or an older one."""
    return read_run_data(workdir) if has_steps(workdir) else None


def read_run_data(workdir: Path) -> RunData | None:
    """Returns the data record of the run in `workdir`; None for runs of versions without one.

    Raises:
      UserError: the record is damaged, or has a version that this program does not know.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    remedy = (
        f"restore it from a copy of the run, or delete {FILE} to take class names, statistics and "
        f"held-out images from the data directory again"
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version != VERSION:
            raise UserError(f'{path}: its "version" is {version!r}, this program reads {VERSION}')
        return _from_content(workdir, content)
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}): {remedy}") from error


def to_json(data: RunData) -> str:
    """Returns the record without its files, which are written to a separate file."""
    content = {
        "version": VERSION,
        "name": data.name,
        "set_version": data.version,
        "class_names": data.class_names,
        "image_shape": data.image_shape,
        "mean": data.mean,
        "std": data.std,
        "split_seed": data.split_seed,
        "validation_examples": data.validation_examples,
        "splits": {part: record._asdict() for part, record in data.splits.items()},
        "files": FILES_FILE if data.files else None,
        "left_out": data.left_out,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _from_content(workdir: Path, content: dict[str, Any]) -> RunData:
    splits = {part: SplitRecord(**record) for part, record in content["splits"].items()}
    files: dict[str, tuple[ImageFile, ...]] = {}
    if content["files"] is not None:
        listing = json.loads(gzip.decompress((workdir / content["files"]).read_bytes()))
        files = {part: tuple(ImageFile(*file) for file in some) for part, some in listing.items()}
    for part, some in files.items():
        if files_fingerprint(some) != splits[part].fingerprint:
            raise ValueError(f"{content['files']} belongs to another run")
    height, width, channels = content["image_shape"]
    return RunData(
        name=content["name"],
        version=content["set_version"],
        class_names=tuple(content["class_names"]),
        image_shape=(height, width, channels),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        split_seed=content["split_seed"],
        validation_examples=content["validation_examples"],
        splits=splits,
        files=files,
        left_out=tuple(content.get("left_out", ())),
    )
