"""Loads a data set by name, holds out a validation split, and computes its statistics."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dfs_jax.data.dataset import (
    AnySplit,
    Dataset,
    ImageFile,
    Origin,
    RawDataset,
    Split,
    check_raw_dataset,
)
from dfs_jax.data.shapes import known_shape, known_splits
from dfs_jax.data.statistics import (
    NAMED_STATISTICS,
    ChannelStatistics,
    channel_statistics,
    named_statistics,
)
from dfs_jax.data.streaming import StreamedSplit, Streaming
from dfs_jax.registry import Registry
from dfs_jax.types import UserError

FOLDER = "folder"
DATASETS = Registry(
    "data set",
    {
        "digits": "dfs_jax.data.digits:load_digits",
        FOLDER: "dfs_jax.data.folder:load_folder",
    },
)

# "package.module:attribute"; in a TFDS name a colon is followed by a version's digits.
_USERS_OWN = re.compile(r"[\w.]+:[^\W\d][\w.]*")
_VALIDATION_EXAMPLES = {"cifar10": 5000, "cifar100": 5000, "imagenet2012": 50_000}
# For a set on disk: enough to estimate mean and standard deviation to a hundredth.
_STATISTICS_EXAMPLES = 1024


def load_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    validation_examples: int | None = None,
    split_seed: int = 0,
    image_size: int | None = None,
    statistics: str | None = None,
    streaming: Streaming | None = None,
    test_examples: int | float | None = None,
    max_corrupt: int | None = None,
) -> Dataset:
    """Reads an image classification set into memory, or prepares it for streaming from disk.

    Args:
      name: `digits`, `folder`, a TFDS name (`cifar10`, `cifar100`, `name/config`, `name:1.2.3`),
        or `package.module:attribute`, a function of your own that returns a `RawDataset` and
        receives `data_dir` and `image_size` if they are set.
      data_dir: directory of the set; for TFDS names its parent directory, None for TFDS's default.
      validation_examples: number of training examples to hold out. None: the set's own validation
        split if it has one, otherwise 5,000 for CIFAR, 50,000 for ImageNet and a tenth of others.
        0: no validation split, all are used for training. Any other number is held out of train
        and validation together.
      split_seed: random seed of the held-out examples, independent of all others.
      image_size: side in pixels that images are scaled to; required if their sizes vary.
      statistics: name of a set whose mean and standard deviation replace this set's own (published
        CIFAR-100 runs used those of `cifar10`). A set's own come from a table or from its training
        examples (1,024 of them if it is streamed).
      streaming: how the images of a TFDS set or a folder are cropped as they are read; None reads
        all into memory.
      test_examples: number of training examples held out as the test split of a set without one,
        or a fraction below 1; drawn with `split_seed`.
      max_corrupt: number of unreadable images of a folder in memory that may be left out.

    Raises:
      UserError: no such set, option or statistics, or too few examples to hold out.

    Example:
      >>> digits = load_dataset("digits")
      >>> digits.image_shape, len(digits.train.labels), len(digits.validation.labels)
      ((32, 32, 3), 1197, 300)
    """
    chosen = _statistics_of(name, statistics)
    raw = _read(name, data_dir, image_size, streaming, max_corrupt)
    raw = hold_out_test(name, raw, test_examples, split_seed)
    return _divided(name, raw, validation_examples, split_seed, chosen)


def describe_dataset(
    name: str,
    *,
    validation_examples: int | None = None,
    split_seed: int = 0,
    image_size: int | None = None,
    statistics: str | None = None,
) -> Dataset | None:
    """Returns a well-known set as published, without its images; None for other sets.

    Everything except reading examples works as with the set itself. Arguments and errors as in
    `load_dataset`.

    Example:
      >>> cifar = describe_dataset("cifar100")
      >>> cifar.num_classes, cifar.image_shape, cifar.train.num_examples
      (100, (32, 32, 3), 45000)
    """
    shape, splits = known_shape(name, image_size), known_splits(name, image_size)
    if shape is None or splits is None:
        return None
    raw = RawDataset(*splits, class_names=tuple(map(str, range(shape.num_classes))))
    chosen = _statistics_of(name, statistics)
    return _divided(name, raw, validation_examples, split_seed, chosen)


def dataset_from_raw(
    name: str,
    raw: RawDataset,
    *,
    validation_examples: int | None = None,
    split_seed: int = 0,
    statistics: str | None = None,
) -> Dataset:
    """Returns the data set that `load_dataset` would make from these examples.

    Args:
      name: name of the set, which determines defaults for held-out examples and statistics.
      raw: examples of the set.
      validation_examples: as in `load_dataset`, like all arguments that follow, and the errors.
    """
    chosen = _statistics_of(name, statistics)
    return _divided(name, check_raw_dataset(name, raw), validation_examples, split_seed, chosen)


def _divided(
    name: str,
    raw: RawDataset,
    validation_examples: int | None,
    split_seed: int,
    chosen: ChannelStatistics | None,
) -> Dataset:
    held_out = _default_held_out(_known_as(name), raw, validation_examples)
    train, validation = hold_out(raw, held_out, split_seed)
    mean, std = chosen or _own_statistics(train)
    origin = _divided_origin(raw, held_out, split_seed)
    assert raw.test is not None, "held out before"
    return Dataset(name, train, validation, raw.test, raw.class_names, mean, std, origin)


def _divided_origin(raw: RawDataset, validation_examples: int | None, split_seed: int) -> Origin:
    """Returns the files of each split, divided as `hold_out` divides the examples."""
    if validation_examples is None or "train" not in raw.origin.files:
        return raw.origin
    files = dict(raw.origin.files)
    whole = (*files["train"], *files.pop("validation", ()))
    kept, held_out = held_out_indices(len(whole), validation_examples, split_seed)
    files["train"] = tuple(whole[i] for i in kept)
    if len(held_out):
        files["validation"] = tuple(whole[i] for i in held_out)
    return raw.origin._replace(files=files)


def _statistics_of(name: str, asked: str | None) -> ChannelStatistics | None:
    """Returns the statistics asked for, or the set's own if a table has them."""
    return NAMED_STATISTICS.get(_known_as(name)) if asked is None else named_statistics(asked)


def _known_as(name: str) -> str:
    """Returns a set's name without the version of a TFDS name."""
    return name if _USERS_OWN.fullmatch(name) else name.partition(":")[0]


def is_tfds_name(name: str) -> bool:
    """Returns whether a name is TFDS's: neither registered here nor `package.module:attribute`."""
    return name not in DATASETS.table and _USERS_OWN.fullmatch(name) is None


def _own_statistics(train: AnySplit) -> ChannelStatistics:
    if isinstance(train, Split):
        return channel_statistics(train.images)
    count = min(_STATISTICS_EXAMPLES, train.num_examples)
    spread = np.linspace(0, train.num_examples - 1, count).astype(int)
    return channel_statistics(train.take(spread).images)


def _read(
    name: str,
    data_dir: str | None,
    image_size: int | None,
    streaming: Streaming | None,
    max_corrupt: int | None,
) -> RawDataset:
    if not is_tfds_name(name):
        options = {"data_dir": data_dir, "image_size": image_size}
        if name == FOLDER:
            options |= {"max_corrupt": max_corrupt, "streaming": streaming}
        elif streaming is not None:
            raise UserError(
                f"data set {name!r} cannot be streamed: only TFDS sets and folders can, leave "
                f"data.streamed and what goes with it unset"
            )
        raw = DATASETS.create(name, **options)
        return raw if streaming is not None else check_raw_dataset(name, raw)
    # Imported here because TFDS takes two seconds to import.
    from dfs_jax.data.tfds_source import load_tfds

    raw = load_tfds(name, data_dir=data_dir, image_size=image_size, streaming=streaming)
    return raw if streaming is not None else check_raw_dataset(name, raw)


def _default_held_out(name: str, raw: RawDataset, asked: int | None) -> int | None:
    if asked is not None or raw.validation is not None:
        return asked
    return _VALIDATION_EXAMPLES.get(name, max(1, raw.train.num_examples // 10))


def hold_out_test(
    name: str, raw: RawDataset, test_examples: float | None, split_seed: int
) -> RawDataset:
    """Returns the set with a test split, held out of train if it has none of its own.

    Args:
      name: name of the set, for messages.
      raw: the set as published.
      test_examples: number of examples, or a fraction below 1; None where the set has a test split.
      split_seed: random seed of the split.

    Raises:
      UserError: no test split and no `test_examples`, both of them, or a number out of range.
    """
    if raw.test is not None and test_examples is None:
        return raw
    count = raw.train.num_examples
    if raw.test is not None:
        raise UserError(
            f"data.test_examples={test_examples} is for sets without test images, and {name!r} has "
            f"{raw.test.num_examples}: leave it unset"
        )
    if test_examples is None:
        raise UserError(
            f"data set {name!r} has no test images: add them (a directory test/), or hold out a "
            f"part of train with data.test_examples, such as 0.2"
        )
    wanted = round(test_examples * count) if 0 < test_examples < 1 else test_examples
    if not 0 < wanted < count or wanted != int(wanted):
        raise UserError(
            f"data.test_examples must be a fraction below 1 or a whole number below {count}, the "
            f"number of images, got {test_examples}"
        )
    # Another permutation than that of the validation examples, which are drawn from the rest.
    kept, held_out = held_out_indices(count, int(wanted), split_seed, stream=1)
    files = dict(raw.origin.files)
    if "train" in files:
        whole = files["train"]
        files |= {"train": _at(whole, kept), "test": _at(whole, held_out)}
    return raw._replace(
        train=raw.train.part(kept),
        test=raw.train.part(held_out),
        origin=raw.origin._replace(files=files),
    )


def _at(files: Sequence[ImageFile], indices: np.ndarray) -> tuple[ImageFile, ...]:
    return tuple(files[i] for i in indices)


def hold_out(
    raw: RawDataset, validation_examples: int | None, split_seed: int
) -> tuple[AnySplit, AnySplit | None]:
    """Returns the training examples, and the validation split or None.

    Args:
      raw: the set as published.
      validation_examples: None keeps the set's own validation split; a number draws that many
        examples of train and validation together, without replacement.
      split_seed: random seed of the held-out examples.

    Raises:
      UserError: a negative number, or one that leaves no training examples.
    """
    if validation_examples is None:
        return raw.train, raw.validation
    whole = raw.train if raw.validation is None else _join(raw.train, raw.validation)
    if not 0 <= validation_examples < whole.num_examples:
        raise UserError(
            f"validation_examples must lie in [0, {whole.num_examples}), the number of training "
            f"examples, got {validation_examples}"
        )
    if validation_examples == 0:
        return whole, None
    kept, held_out = held_out_indices(whole.num_examples, validation_examples, split_seed)
    return whole.part(kept), whole.part(held_out)


def held_out_indices(
    count: int, held_out: int, split_seed: int, *, stream: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the kept and the held-out ones of `count` examples, both ascending.

    Permutations of one seed and different streams are independent.

    >>> [len(part) for part in held_out_indices(7, 2, split_seed=0)]
    [5, 2]
    """
    entropy = (split_seed, stream) if stream else split_seed
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    order = generator.permutation(count)
    # Sorted, so that they are read from memory in order.
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _join(first: AnySplit, second: AnySplit) -> AnySplit:
    if (
        isinstance(first, StreamedSplit)
        and isinstance(second, StreamedSplit)
        and first.records is second.records  # of a folder
    ):
        indices = np.concatenate([first.indices, second.indices])
        return StreamedSplit(first.records, first.streaming, indices)
    if not (isinstance(first, Split) and isinstance(second, Split)):
        raise UserError(
            "a streamed set keeps its own validation part: leave validation_examples unset"
        )
    return Split(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))
