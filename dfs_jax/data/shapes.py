"""What well-known sets look like, for those who ask without having the data."""

from __future__ import annotations

import re
from typing import NamedTuple


class DatasetShape(NamedTuple):
    """How many classes there are, and one image's `(height, width, channels)`."""

    num_classes: int
    image_shape: tuple[int, int, int]


_KNOWN_SHAPES = {
    "cifar10": DatasetShape(10, (32, 32, 3)),
    "cifar100": DatasetShape(100, (32, 32, 3)),
    "digits": DatasetShape(10, (32, 32, 3)),
    "imagenet2012": DatasetShape(1000, (224, 224, 3)),
}


def known_shape(name: str, image_size: int | None = None) -> DatasetShape | None:
    """Returns the shape of a well-known set, at its usual image size; None for other sets.

    Args:
      name: as in `load_dataset`, also with a version (`cifar10:3.0.2`).
      image_size: side in pixels that images are scaled to.

    >>> known_shape("cifar100").num_classes, known_shape("imagenet2012", 160).image_shape
    (100, (160, 160, 3))
    """
    shape = _KNOWN_SHAPES.get(re.sub(r":\d.*", "", name))
    if shape is None or image_size is None:
        return shape
    return shape._replace(image_shape=(image_size, image_size, 3))
