"""Mean and standard deviation for the normalisation of images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dfs_jax.types import UserError


class ChannelStatistics(NamedTuple):
    """Statistics by channel (red, green, blue), in units in which white is 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# From each set's training images; ImageNet's are the values in common use. EfficientNet-Lite's make
# (x - 127) / 128 of a level x.
NAMED_STATISTICS = {
    "cifar10": ChannelStatistics((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "cifar100": ChannelStatistics((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    "efficientnet_lite": ChannelStatistics((127 / 255,) * 3, (128 / 255,) * 3),
    "imagenet2012": ChannelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

_CHUNK = 4096


def named_statistics(name: str) -> ChannelStatistics:
    """Returns the statistics of a well-known set.

    Raises:
      UserError: the set is not in the table.
    """
    if name not in NAMED_STATISTICS:
        known = ", ".join(sorted(NAMED_STATISTICS))
        raise UserError(
            f"there are no statistics named {name!r}: choose one of {known}, "
            f"or none to use the data set's own"
        )
    return NAMED_STATISTICS[name]


def channel_statistics(images: np.ndarray) -> ChannelStatistics:
    """Returns the exact mean and standard deviation over examples and positions.

    Args:
      images: uint8 `[n, height, width, channels]`.

    A channel that is constant gets the standard deviation of one level, 1/255.

    >>> channel_statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    ChannelStatistics(mean=(0.5,), std=(0.5,))
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    # A histogram for each chunk: integer sums are exact, and no float copy of the images is needed.
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(axis=1)
    std = np.maximum(np.sqrt(variance), 1 / 255)
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))
