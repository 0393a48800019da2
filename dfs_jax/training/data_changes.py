"""Detects changes of a data set since a run was trained, and which of them the run can accept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from dfs_jax.data.dataset import Dataset, ImageFile
from dfs_jax.data.regroup import regrouped, relabelled
from dfs_jax.training.run_data import PARTS, RunData, describe_data
from dfs_jax.types import Config, UserError

TRAIN = "train"  # directory and split of the training examples
# Fraction of a class's files that a renamed class must contain to be recognised.
_SAME_CLASS = 0.5


class ClassMatch(NamedTuple):
    """Correspondence of the data set's present classes with those of a run.

    Attributes:
      renamed: present name of each class of the run that was renamed.
      changes: description of each change, as a clause of a sentence.
      refusal: reason why a network with the run's outputs cannot use these classes, or None.
    """

    renamed: Mapping[str, str]
    changes: tuple[str, ...] = ()
    refusal: str | None = None


def as_known(
    dataset: Dataset, known: RunData, *, workdir: Path, section: Config, accept: bool = False
) -> Dataset:
    """Returns a data set with the class order, statistics and held-out examples of the run.

    New images join the training examples; images that the run trained on never move to validation
    or test.

    Args:
      dataset: present data set of the config.
      known: record of the run's data.
      workdir: directory of the run, for messages.
      section: section `data` of the run's config.
      accept: whether to continue with changed data, where possible.

    Raises:
      UserError: training or validation data changed, and this is not accepted or not possible.
    """
    match = match_classes(known, dataset.class_names, training_files(dataset.origin.files))
    if match.refusal is None:
        names = tuple(match.renamed.get(name, name) for name in known.class_names)
        dataset = in_class_order(dataset, names)
    now = describe_data(dataset, section)
    changes, refusal = find_changes(known, now, match)
    refuse(changes, refusal, workdir=workdir, section=section, accept=accept)
    warn_of_test(known, now)
    parts = {
        _renamed(file.path, match.renamed): part
        for part, files in known.files.items()
        for file in files
    }

    def part_of(part: str, file: ImageFile) -> str:
        return parts.get(file.path, TRAIN if _top(file) == TRAIN else part)

    return dataclasses.replace(regrouped(dataset, part_of), mean=known.mean, std=known.std)


def refuse(
    changes: Sequence[str],
    refusal: str | None,
    *,
    workdir: Path,
    section: Config,
    accept: bool,
) -> None:
    """Raises UserError for changes that are not accepted or that no run can use."""
    if not changes or (accept and refusal is None):
        return
    where = section.data_dir or f"data set {section.name!r}"
    remedy = (
        "put it back as it was, or add --accept_data_changes to go on (class order, mean and "
        "deviation and held-out images stay those of the run, new images are trained on)"
        if refusal is None
        else f"{refusal}: put it back as it was, or train anew in another --workdir"
    )
    raise UserError(
        f"{where} is not what the run in {workdir} was trained on: {'; '.join(changes)}; {remedy}"
    )


def match_classes(
    known: RunData, class_names: Collection[str], files: Collection[ImageFile]
) -> ClassMatch:
    """Finds the present name of each class of the run; a renamed directory is found by its files.

    Args:
      known: record of the run's data.
      class_names: present class names.
      files: present training and validation files; empty if the set is not stored as files.
    """
    gone = [name for name in known.class_names if name not in class_names]
    new = [name for name in class_names if name not in known.class_names]
    found: Mapping[str, str] = {}
    if gone and len(gone) == len(new):
        found = (
            _by_files(known, gone, new, files) if known.files else dict(zip(gone, new, strict=True))
        )
    changes = [f"class {old!r} was renamed to {name!r}" for old, name in found.items()]
    changes += [f"class {name!r} was removed" for name in gone if name not in found]
    changes += [f"class {name!r} was added" for name in new if name not in found.values()]
    if len(found) == len(gone) == len(new):
        return ClassMatch(found, tuple(changes))
    names = ", ".join(known.class_names[:20])
    more = ", ..." if len(known.class_names) > 20 else ""
    return ClassMatch(
        found,
        tuple(changes),
        f"the network's {len(known.class_names)} outputs stand for {names}{more}",
    )


def find_changes(
    known: RunData, now: RunData, match: ClassMatch
) -> tuple[tuple[str, ...], str | None]:
    """Returns the changes of training and validation data, and the reason why no run can use them.

    Args:
      known: record of the run's data.
      now: record of the present data, with classes in the run's order.
      match: correspondence of the classes.

    Returns:
      Clauses of a sentence, none if nothing changed, and a reason or None.
    """
    changes, refusal = [*match.changes], match.refusal
    if now.image_shape != known.image_shape:
        now_, then = ("x".join(map(str, d.image_shape[1::-1])) for d in (now, known))
        changes.append(f"its images are {now_} pixels, they were {then}")
        refusal = refusal or f"the network takes images of {then} pixels"
    if now.version != known.version:
        changes.append(f"it is version {now.version}, it was {known.version}")
    if known.files:
        clauses, held_out = _file_changes(known, now, match)
        changes += clauses
        if not held_out and "validation" in known.files:
            refusal = refusal or "none of the images that the run held out is left"
        return tuple(changes), refusal
    for part in ("train", "validation"):
        before, after = known.splits.get(part), now.splits.get(part)
        if before is None or after is None or before == after:
            continue
        if before.examples != after.examples:
            changes.append(
                f"its {part} split has {after.examples} examples, it had {before.examples}"
            )
            if "validation" in known.splits:
                refusal = refusal or "the held-out examples are known by their position alone"
        elif None not in (before.fingerprint, after.fingerprint):
            changes.append(f"the labels of its {part} split changed")
    return tuple(changes), refusal


def training_files(files: Mapping[str, Sequence[ImageFile]]) -> tuple[ImageFile, ...]:
    """Returns the files of train and validation, and test files that are held out of train."""
    return tuple(
        file
        for part in PARTS
        for file in files.get(part, ())
        if part != "test" or _top(file) == TRAIN
    )


def warn_of_test(known: RunData, now: RunData) -> None:
    """Logs a warning if the test split differs from the one that the run recorded."""
    before, after = known.splits.get("test"), now.splits.get("test")
    if before != after and before is not None and after is not None:
        logging.warning(
            "the test split of %s changed since the run began (%d examples now, %d then)",
            known.name,
            after.examples,
            before.examples,
        )


def in_class_order(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Returns the data set with labels that index `names`, which contains all of its classes."""
    labels = [names.index(name) for name in dataset.class_names]
    splits = {part: getattr(dataset, part) for part in PARTS}
    splits = {part: split and relabelled(split, labels) for part, split in splits.items()}
    return dataclasses.replace(dataset, class_names=tuple(names), **splits)


def _file_changes(known: RunData, now: RunData, match: ClassMatch) -> tuple[list[str], int]:
    """Returns clauses on changed files, and the number of validation images that remain."""
    classes = {match.renamed.get(name, name) for name in known.class_names}
    before = {_renamed(f.path, match.renamed): f.size for f in training_files(known.files)}
    after = {f.path: f.size for f in training_files(now.files) if f.class_name in classes}
    present = {f.class_name for f in training_files(now.files)}
    gone = [p for p in before if p not in after and p.split("/")[1] in present]
    changed = [p for p in before if p in after and before[p] != after[p]]
    clauses = [
        _count(paths, verb)
        for paths, verb in (
            ([p for p in after if p not in before], "added"),
            (gone, "removed"),
            (changed, "changed"),
        )
        if paths
    ]
    held_out = known.files.get("validation", ())
    return clauses, sum(_renamed(f.path, match.renamed) in after for f in held_out)


def _count(paths: Sequence[str], verb: str) -> str:
    """Describes a number of changed paths.

    >>> _count(["train/a/1.png"], "added"), _count(["x", "y"], "removed")
    ('1 image was added (train/a/1.png)', '2 images were removed (such as x)')
    """
    if len(paths) == 1:
        return f"1 image was {verb} ({paths[0]})"
    return f"{len(paths)} images were {verb} (such as {min(paths)})"


def _by_files(
    known: RunData, gone: Sequence[str], new: Sequence[str], files: Collection[ImageFile]
) -> dict[str, str]:
    """Matches classes whose directories hold the same files under another name."""
    before = {name: Counter[tuple[str, int]]() for name in gone}
    after = {name: Counter[tuple[str, int]]() for name in new}
    for some, counts in ((training_files(known.files), before), (files, after)):
        for file in some:
            if file.class_name in counts:
                counts[file.class_name][_within_class(file), file.size] += 1
    shared = {(old, new): (before[old] & after[new]).total() for old in before for new in after}
    found: dict[str, str] = {}
    for (old, name), count in shared.items():
        rivals = [n for pair, n in shared.items() if (pair[0] == old) != (pair[1] == name)]
        is_most = count > _SAME_CLASS * before[old].total()
        if is_most and all(count > rival for rival in rivals):
            found[old] = name
    return found


def _top(file: ImageFile) -> str:
    return file.path.split("/")[0]


def _within_class(file: ImageFile) -> str:
    top, _, *rest = file.path.split("/")
    return "/".join((top, *rest))


def _renamed(path: str, renamed: Mapping[str, str]) -> str:
    top, name, *rest = path.split("/")
    return "/".join((top, renamed.get(name, name), *rest))
