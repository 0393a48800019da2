"""Builds a run's data set from its record alone; images are read on first use."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from dfs_jax.data import Dataset
from dfs_jax.data.dataset import AnySplit, ImageFile, Origin
from dfs_jax.data.deferred import DeferredSplit
from dfs_jax.data.folder import list_files, read_files
from dfs_jax.training.data_changes import (
    TRAIN,
    as_known,
    find_changes,
    in_class_order,
    match_classes,
    refuse,
    training_files,
    warn_of_test,
)
from dfs_jax.training.input_config import dataset_from_config, streaming_from_config
from dfs_jax.training.run_data import (
    RunData,
    SplitRecord,
    describe_data,
    files_fingerprint,
    read_run_data,
)
from dfs_jax.types import Config, UserError


def recorded_dataset(known: RunData, section: Config) -> Dataset:
    """Returns the data set of a run; a split's images are read on first use only.

    Training and validation images are those that the run recorded. Test images are those present
    now, matched by the names of their classes.

    Args:
      known: record of the run's data.
      section: section `data` of the run's config, with the present directory of the data.
    """
    if known.files:
        read = functools.partial(_read_files, known, section)
    else:
        whole = functools.cache(functools.partial(_read_whole, known, section))

        def read(part: str) -> AnySplit:
            return _part_of(whole(), known, part)

    splits = {
        part: DeferredSplit(record.examples, known.image_shape, functools.partial(read, part))
        for part, record in known.splits.items()
    }
    return Dataset(
        known.name,
        splits["train"],
        splits.get("validation"),
        splits["test"],
        known.class_names,
        known.mean,
        known.std,
        Origin(known.files, known.version),
    )


def check_unchanged(workdir: Path, section: Config, *, accept: bool = False) -> None:
    """Raises UserError if training or validation data are not what the run recorded.

    Files are listed, not read; sets of other kinds are read.

    Args:
      workdir: directory of the run.
      section: section `data` of the run's config, with the present directory of the data.
      accept: whether to accept changes that a run can use.
    """
    known = read_run_data(workdir)
    if known is None:
        return
    if not known.files:
        as_known(
            dataset_from_config(section), known, workdir=workdir, section=section, accept=accept
        )
        return
    root = _root(section)
    tops = sorted({_top(file) for file in training_files(known.files)})
    _check_there(root, tops, TRAIN)
    listed = (file for top in tops for file in list_files(root / top))
    files = {"train": tuple(file for file in listed if file.path not in known.left_out)}
    names = tuple(dict.fromkeys(file.class_name for file in files["train"]))
    match = match_classes(known, names, files["train"])
    now = known.replace(class_names=names, files=files)
    changes, refusal = find_changes(known, now, match)
    refuse(changes, refusal, workdir=workdir, section=section, accept=accept)


def _read_files(known: RunData, section: Config, part: str) -> AnySplit:
    root, files = _root(section), known.files[part]
    tops = {_top(file) for file in files}
    if part == "test" and TRAIN not in tops:
        _check_there(root, tops, part)
        listed = (file for top in sorted(tops) for file in list_files(root / top))
        files = tuple(file for file in listed if file.path not in known.left_out)
        names = tuple(dict.fromkeys(file.class_name for file in files))
        _check_outputs(known, names, f"{part} split in {root}")
        record = SplitRecord(len(files), files_fingerprint(files))
        warn_of_test(known, known.replace(splits={**known.splits, part: record}))
    missing = [file.path for file in files if not (root / file.path).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(files)} images of the run's {part} split are not in "
            f"{root} (such as {missing[0]}): put them back, or name their directory with --data_dir"
        )
    streaming = streaming_from_config(section)
    split = read_files(root, files, known.class_names, section.image_size, streaming)
    return _checked_shape(split, known, f"{part} split in {root}")


def _check_there(root: Path, tops: Iterable[str], part: str) -> None:
    for top in tops:
        if not (root / top).is_dir():
            raise UserError(
                f"the run's {part} images are not in {root / top}: put them there, or name the "
                f"directory that holds {top}/ with --data_dir"
            )


def _read_whole(known: RunData, section: Config) -> Dataset:
    dataset = dataset_from_config(section)
    _check_outputs(known, dataset.class_names, f"data set {known.name!r}")
    now = describe_data(in_class_order(dataset, known.class_names), section)
    warn_of_test(known, now)
    return dataset


def _part_of(dataset: Dataset, known: RunData, part: str) -> AnySplit:
    split: AnySplit | None = getattr(in_class_order(dataset, known.class_names), part)
    expected = known.splits[part].examples
    if split is None or (part != "test" and split.num_examples != expected):
        found = 0 if split is None else split.num_examples
        raise UserError(
            f"the {part} split of data set {known.name!r} has {found} examples, the run's had "
            f"{expected}: which ones it trained on is unknown, use the set as it was"
        )
    return _checked_shape(split, known, f"{part} split of data set {known.name!r}")


def _check_outputs(known: RunData, names: Sequence[str], where: str) -> None:
    """Raises UserError if there is a class for which the network has no output."""
    strange = [name for name in names if name not in known.class_names]
    if strange:
        absent = [name for name in known.class_names if name not in names]
        hint = f" (and {', '.join(map(repr, absent[:5]))} is not there)" if absent else ""
        raise UserError(
            f"the {where} has the class {', '.join(map(repr, strange[:5]))}{hint}, for which the "
            f"network has no output: rename it to a class of the run, or leave it out"
        )


def _checked_shape(split: AnySplit, known: RunData, where: str) -> AnySplit:
    if split.image_shape != known.image_shape:
        now, then = ("x".join(map(str, s[1::-1])) for s in (split.image_shape, known.image_shape))
        raise UserError(
            f"the {where} has images of {now} pixels, the network takes {then}: scale the images"
        )
    return split


def _root(section: Config) -> Path:
    return Path(section.data_dir).expanduser()


def _top(file: ImageFile) -> str:
    return file.path.split("/")[0]
