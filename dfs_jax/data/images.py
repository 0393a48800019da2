"""Files and encoded bytes to uint8 arrays."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dfs_jax.types import UserError

_CHUNK = 256
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# Below this many bytes an image, Python's own work dominates and threads only wait for each other.
_SMALL_IMAGE_BYTES = 8192
# What a set in memory may take; larger ones are streamed.
MAX_BYTES = 16 * 2**30

Encoded = bytes | Path | np.ndarray


def decode_images(
    encoded: Iterable[Encoded],
    count: int,
    image_size: int | None,
    describe: Callable[[int], str],
) -> np.ndarray:
    """Returns the images as one array; grey ones get three equal channels.

    Args:
      encoded: the contents of image files, or their paths, or uint8 arrays
        `[height, width, 1 or 3]`; read as they are needed.
      count: how many there are.
      image_size: side in pixels; the shorter side is scaled to it (antialiased), then the centre is
        cut out. None keeps images as they are, which must then have one size.
      describe: the name of the image at a position, for messages.

    Returns:
      uint8 `[count, height, width, 3]`.

    Raises:
      UserError: an image cannot be read; sizes vary and no `image_size` is given; too much data.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1, got {image_size}")
    if image_size is not None:
        _check_memory(count, image_size, image_size)
    images = np.empty(0, np.uint8)
    for position, image in enumerate(_decode_all(encoded, image_size, describe)):
        if position == 0:
            _check_memory(count, *image.shape[:2])
            images = np.empty((count, *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"images vary in size: {describe(0)} is {_size(images[0])}, {describe(position)} "
                f"is {_size(image)}; set image_size to scale them to one"
            )
        images[position] = image
    return images


def _decode_all(
    encoded: Iterable[Encoded], image_size: int | None, describe: Callable[[int], str]
) -> Iterator[np.ndarray]:
    def decode(position: int, item: Encoded) -> np.ndarray:
        try:
            return _decode(item, image_size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {describe(position)}: {error}") from error

    with ThreadPoolExecutor() as pool:
        numbered = enumerate(encoded)
        # By chunks, so that the pool never runs far ahead of what has been stored.
        while chunk := list(itertools.islice(numbered, _CHUNK)):
            run = map if _is_small(chunk[0][1]) else pool.map
            yield from run(decode, *zip(*chunk, strict=True))


def _is_small(item: Encoded) -> bool:
    return isinstance(item, np.ndarray) or (
        isinstance(item, bytes) and len(item) < _SMALL_IMAGE_BYTES
    )


def _decode(encoded: Encoded, image_size: int | None) -> np.ndarray:
    if isinstance(encoded, np.ndarray):
        image = Image.fromarray(encoded[..., 0] if encoded.shape[-1] == 1 else encoded)
    else:
        source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
        image = Image.open(source, formats=_FORMATS)
    with image:
        if image.mode[0] in "IF":
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
        if image.mode != "RGB":
            image = image.convert("RGB")
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


def _check_memory(count: int, height: int, width: int) -> None:
    needed = count * height * width * 3
    if needed > MAX_BYTES:
        raise UserError(
            f"{count} images of {width}x{height} pixels would take {needed / 2**30:.0f} GiB of "
            f"memory (at most {MAX_BYTES // 2**30}): set a smaller image_size, or stream the set"
        )


def _size(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    return f"{width}x{height}"
