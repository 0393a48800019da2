"""Decodes, crops and scales one photograph to a square of pixels, on the host."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.data.decoding import UnreadableImage, decode_image

# Range of width over height of a random crop, and the number of tries before a centre crop.
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# Markers of JPEG frames; C4, C8 and CC in this range have another meaning.
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode_photograph(encoded: bytes) -> np.ndarray | None:
    """Returns uint8 `[height, width, 3]` in RGB order; None if the bytes are not a whole image.

    JPEG files of one or three channels are decoded by OpenCV, twice as fast as by Pillow; all
    others by `decode_image`. Both apply the EXIF orientation.

    Args:
      encoded: content of an image file.
    """
    if not _is_plain_jpeg(encoded):
        try:
            return np.asarray(decode_image(encoded))
        except UnreadableImage:
            return None
    cv2 = _opencv()
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # sides that no image can have
        return None


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Returns whether bytes are a JPEG file of one or three channels, by its frame header."""
    if encoded[:2] != b"\xff\xd8":
        return False
    place = 2
    while place + 9 < len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker in _FRAME_HEADERS:
            return encoded[place + 9] in (1, 3)
        place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    return False


def cut_out(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Returns `box` of an image scaled to `[size, size, 3]`.

    Reduction to half the size or less averages the pixels of each output pixel, which avoids
    aliasing; otherwise bilinear interpolation is used, which is twice as fast.
    """
    cv2 = _opencv()
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    leaves_pixels_out = min(box.height, box.width) >= 2 * size
    method = cv2.INTER_AREA if leaves_pixels_out else cv2.INTER_LINEAR
    return cv2.resize(part, (size, size), interpolation=method)


def mirrored(image: np.ndarray) -> np.ndarray:
    """Returns the image mirrored left to right, `[height, width, 3]` (a copy)."""
    return _opencv().flip(image, 1)


def centre_box(height: int, width: int, fraction: float = 1.0) -> Box:
    """Returns the centred square whose side is `fraction` of the shorter side.

    >>> centre_box(100, 60, 0.5)
    Box(top=35, left=15, height=30, width=30)
    """
    side = max(1, round(min(height, width) * fraction))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def random_box(
    generator: np.random.Generator, height: int, width: int, area: tuple[float, float]
) -> Box:
    """Returns a rectangle of random area, shape and position (Inception's random resized crop).

    The area is uniform in `area`, a fraction of the image; the logarithm of width over height is
    uniform between those of 3/4 and 4/3. A rectangle that does not fit is drawn again, up to ten
    times; then the largest centred rectangle of an allowed shape is used.

    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015.

    >>> random_box(np.random.default_rng(0), 75, 100, (1.0, 1.0))
    Box(top=0, left=0, height=75, width=100)
    """
    low, high = (math.log(ratio) for ratio in _ASPECT_RATIOS)
    for _ in range(_ATTEMPTS):
        pixels = generator.uniform(*area) * height * width
        ratio = math.exp(generator.uniform(low, high))
        wide, tall = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 1 <= wide <= width and 1 <= tall <= height:
            top = int(generator.integers(height - tall + 1))
            left = int(generator.integers(width - wide + 1))
            return Box(top, left, tall, wide)
    ratio = min(max(width / height, _ASPECT_RATIOS[0]), _ASPECT_RATIOS[1])
    tall, wide = min(height, round(width / ratio)), min(width, round(height * ratio))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)


@functools.cache
def _opencv() -> Any:
    """Returns OpenCV, imported on first use; single-threaded, as photographs run in parallel."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
