"""Decodes many files or encoded images into one uint8 array."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from dfs_jax.data.decoding import Encoded, UnreadableImage, decode_image
from dfs_jax.types import UserError

_CHUNK = 256
# Below this many bytes per image, Python's own work dominates and threads only wait.
_SMALL_IMAGE_BYTES = 8192
# Largest size of a set in memory; larger sets are streamed.
MAX_BYTES = 16 * 2**30
MOST_NAMED = 20  # unreadable images named in one message
_MOST_SIZES = 5  # sizes named in one message

_log = logging.getLogger(__name__)


class Unreadable:
    """Collects the unreadable images of a set, so that one message names them all.

    Args:
      allowed: number of images that may be left out.
      remedy: advice at the end of the message.
    """

    def __init__(self, allowed: int = 0, remedy: str = "replace or remove them"):
        self._allowed, self._remedy = allowed, remedy
        self._found: list[str] = []

    def add(self, name: str, reason: str) -> None:
        """Records an image's name and the reason why it cannot be read."""
        self._found.append(f"{name} ({reason})")

    def check(self) -> None:
        """Raises UserError if there are more than `allowed`; otherwise warns of those left out."""
        if not self._found:
            return
        count, named = len(self._found), "; ".join(self._found[:MOST_NAMED])
        more = f" and {count - MOST_NAMED} more" if count > MOST_NAMED else ""
        if count > self._allowed:
            raise UserError(
                f"{count} image{'s' * (count > 1)} cannot be read: {named}{more}; {self._remedy}"
            )
        _log.warning("%d images cannot be read and are left out: %s%s", count, named, more)


def decode_images(
    encoded: Iterable[Encoded],
    count: int,
    image_size: int | None,
    describe: Callable[[int], str],
) -> np.ndarray:
    """Returns the images as one array; grey images get three equal channels.

    Args:
      encoded: contents of image files, or their paths, or uint8 arrays
        `[height, width, 1 or 3]`; read lazily.
      count: number of images.
      image_size: side in pixels; the shorter side is scaled to it (antialiased), followed by a
        centre crop. None keeps images unchanged, which must then have one size.
      describe: function that names the image at a position, for messages.

    Returns:
      uint8 `[count, height, width, 3]`.

    Raises:
      UserError: images that cannot be read (all are named), sizes that vary without an
        `image_size`, or too much data.
    """
    unreadable = Unreadable()
    images, _ = decode_readable(encoded, count, image_size, describe, unreadable)
    unreadable.check()
    return images


def decode_readable(
    encoded: Iterable[Encoded],
    count: int,
    image_size: int | None,
    describe: Callable[[int], str],
    unreadable: Unreadable,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the readable images and their positions; adds the others to `unreadable`.

    Arguments and errors are those of `decode_images`.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1, got {image_size}")
    if image_size is not None:
        _check_memory(count, image_size, image_size)
    images, positions = np.empty((0, 0, 0, 3), np.uint8), []
    sizes: Counter[str] = Counter()
    for position, image in enumerate(_decode_all(encoded, image_size)):
        if isinstance(image, UnreadableImage):
            unreadable.add(describe(position), str(image))
            continue
        if not positions:
            _check_memory(count, *image.shape[:2])
            images = np.empty((count, *image.shape), np.uint8)
        sizes[_size(image)] += 1
        if len(sizes) == 1:
            images[len(positions)] = image
        positions.append(position)
    if len(sizes) > 1:
        raise UserError(_varying(sizes))
    return images[: len(positions)], np.array(positions, int)


def _decode_all(
    encoded: Iterable[Encoded], image_size: int | None
) -> Iterator[np.ndarray | UnreadableImage]:
    def decode(item: Encoded) -> np.ndarray | UnreadableImage:
        try:
            return _decode(item, image_size)
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor() as pool:
        items = iter(encoded)
        # In chunks, so that the pool does not run far ahead of the stored images.
        while chunk := list(itertools.islice(items, _CHUNK)):
            run = map if _is_small(chunk[0]) else pool.map
            yield from run(decode, chunk)


def _is_small(item: Encoded) -> bool:
    return isinstance(item, np.ndarray) or (
        isinstance(item, bytes) and len(item) < _SMALL_IMAGE_BYTES
    )


def _decode(encoded: Encoded, image_size: int | None) -> np.ndarray:
    image = decode_image(encoded)
    if image_size is not None and image.size != (image_size, image_size):
        image = _resize_and_centre_crop(image, image_size)
    return np.asarray(image)


def _resize_and_centre_crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Pillow's resize antialiases: its filter widens with the scale.
    return image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )


def memory_needed(count: int, height: int, width: int) -> int:
    """Returns the size of a number of images in memory, in bytes.

    >>> memory_needed(2, 5, 7)
    210
    """
    return count * height * width * 3


def _check_memory(count: int, height: int, width: int) -> None:
    needed = memory_needed(count, height, width)
    if needed > MAX_BYTES:
        raise UserError(
            f"{count} images of {width}x{height} pixels would take {needed / 2**30:.0f} GiB of "
            f"memory (at most {MAX_BYTES // 2**30}): set a smaller data.image_size, or "
            f"data.streamed=True to read them from disk while training runs"
        )


def _varying(sizes: Counter[str]) -> str:
    named = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(_MOST_SIZES))
    more = f" and {len(sizes) - _MOST_SIZES} other sizes" if len(sizes) > _MOST_SIZES else ""
    return f"images vary in size: {named}{more}; set data.image_size to scale them to one"


def _size(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    return f"{width}x{height}"
