"""Builds the data set and its augmentation from a config's section `data`."""

from __future__ import annotations

from typing import Any

from dfs_jax.data import Dataset, Streaming, folder, load_dataset
from dfs_jax.data.augmentation import Augmentation, create_augmentation
from dfs_jax.data.sources import FOLDER, describe_dataset, is_tfds_name
from dfs_jax.data.streaming import FLIP, RANDOM_CUT
from dfs_jax.types import Config, UserError

_DESCRIPTION_OPTIONS = ("validation_examples", "split_seed", "image_size", "statistics")
_LOAD_OPTIONS = ("data_dir", *_DESCRIPTION_OPTIONS, "test_examples", "max_corrupt")
_STREAMING_OPTIONS = ("crop_area", "centre_fraction", "num_workers", "max_corrupt")


def dataset_from_config(section: Config) -> Dataset:
    """Returns the data set that a config's section `data` describes."""
    options = {key: section.get(key) for key in _LOAD_OPTIONS}
    return load_dataset(section.name, streaming=streaming_from_config(section), **options)


def described_dataset_from_config(section: Config) -> Dataset:
    """Returns a well-known set without its images; other sets are read."""
    options = {key: section[key] for key in _DESCRIPTION_OPTIONS}
    described = describe_dataset(section.name, **options)
    return dataset_from_config(section) if described is None else described


def streaming_from_config(section: Config) -> Streaming | None:
    """Returns how the set is streamed; None if it is read into memory.

    Raises:
      UserError: `random_resized_crop` or an option of streaming for a set in memory, or a streamed
        set without an image size.
    """
    chosen = {k: section.get(k) for k in _STREAMING_OPTIONS if section.get(k) is not None}
    if not is_streamed(section):
        if section.name == FOLDER:  # which may leave out unreadable images in memory too
            chosen.pop("max_corrupt", None)
        needless = [*chosen, *({RANDOM_CUT} & set(_names(section)))]
        if needless:
            raise UserError(
                f"{', '.join(needless)} need(s) a streamed set: data set {section.name!r} is read "
                f"into memory (data.streamed is {section.get('streamed')})"
            )
        return None
    if section.image_size is None:
        raise UserError(f"data set {section.name!r} is streamed: set data.image_size, such as 224")
    on_host, _ = _divided(section)
    return Streaming(section.image_size, on_host, **chosen)


def is_streamed(section: Config) -> bool:
    """Returns whether images stay on disk: as `data.streamed` says, or by default.

    By default, TFDS sets and folders are streamed if they use `random_resized_crop` or exceed
    memory.
    """
    is_folder = section.name == FOLDER
    if section.get("streamed") is not None or not (is_folder or is_tfds_name(section.name)):
        return bool(section.get("streamed"))
    if RANDOM_CUT in _names(section):
        return True
    if section.image_size is None:
        return False
    if is_folder:
        return folder.exceeds_memory(section.data_dir, section.image_size)
    # Imported here because TFDS takes two seconds to import.
    from dfs_jax.data.tfds_source import exceeds_memory

    return exceeds_memory(section.name, section.data_dir, section.image_size)


def augmentation_from_config(section: Config, mean: tuple[float, ...]) -> Augmentation:
    """Returns the augmentation of batches on the device; a streamed set is cropped before."""
    other = {"name", "augmentation", "streamed", "on_device", *_LOAD_OPTIONS, *_STREAMING_OPTIONS}
    chosen: dict[str, Any] = {k: value for k, value in section.items() if k not in other}
    names = _divided(section)[1] if is_streamed(section) else _names(section)
    return create_augmentation(",".join(names), mean=mean, **chosen)


def _divided(section: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the augmentations of a streamed set at decoding, and those on the device."""
    names = _names(section)
    first_on_device = next((i for i, n in enumerate(names) if n not in (RANDOM_CUT, FLIP)), None)
    on_host, on_device = names[:first_on_device], names[len(names[:first_on_device]) :]
    if RANDOM_CUT in (*on_device, *on_host[1:]):
        raise UserError(f"{RANDOM_CUT} comes first among data.augmentation, got {','.join(names)}")
    return on_host, on_device


def _names(section: Config) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (section.augmentation or "none").split(","))
    return () if names == ("none",) else names
