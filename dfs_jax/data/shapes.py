"""Shapes and sizes of well-known data sets, for use without the data."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple, NoReturn

import numpy as np


class DatasetShape(NamedTuple):
    """Number of classes, and `(height, width, channels)` of an image."""

    num_classes: int
    image_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class AbsentSplit:
    """A split without images, with the size and image shape of a `Split`; reading it raises.

    Attributes:
      num_examples: number of examples.
      image_shape: `(height, width, channels)`.
    """

    num_examples: int
    image_shape: tuple[int, int, int]

    def part(self, indices: np.ndarray) -> AbsentSplit:
        """Returns an absent split with as many examples as there are indices."""
        return dataclasses.replace(self, num_examples=len(indices))

    def _refuse(self, *_args: Any, **_options: Any) -> NoReturn:
        raise RuntimeError("a set that is described alone has no images to read")

    take = train_batches = eval_batches = _refuse


_KNOWN_SHAPES = {
    "cifar10": DatasetShape(10, (32, 32, 3)),
    "cifar100": DatasetShape(100, (32, 32, 3)),
    "digits": DatasetShape(10, (32, 32, 3)),
    "imagenet2012": DatasetShape(1000, (224, 224, 3)),
}
# Numbers of training and test examples, as published.
_KNOWN_SIZES = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "imagenet2012": (1_281_167, 50_000),
}


def known_shape(name: str, image_size: int | None = None) -> DatasetShape | None:
    """Returns the shape of a well-known set, at its usual image size; None for other sets.

    Args:
      name: name as in `load_dataset`, optionally with a version (`cifar10:3.0.2`).
      image_size: side in pixels that images are scaled to.

    >>> known_shape("cifar100").num_classes, known_shape("imagenet2012", 160).image_shape
    (100, (160, 160, 3))
    """
    shape = _KNOWN_SHAPES.get(_without_version(name))
    if shape is None or image_size is None:
        return shape
    return shape._replace(image_shape=(image_size, image_size, 3))


def known_splits(
    name: str, image_size: int | None = None
) -> tuple[AbsentSplit, AbsentSplit] | None:
    """Returns the training and test splits of a well-known set that must be downloaded.

    Returns None for other sets. Arguments as in `known_shape`.

    >>> known_splits("cifar100")[0]
    AbsentSplit(num_examples=50000, image_shape=(32, 32, 3))
    """
    shape, sizes = known_shape(name, image_size), _KNOWN_SIZES.get(_without_version(name))
    if shape is None or sizes is None:
        return None
    train, test = (AbsentSplit(count, shape.image_shape) for count in sizes)
    return train, test


def _without_version(name: str) -> str:
    return re.sub(r":\d.*", "", name)
