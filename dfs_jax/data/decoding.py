"""Decodes one image, from a file or encoded bytes, to uint8 RGB, in any format that Pillow reads.

orientation     rotated as the camera's EXIF tag says
transparency    composited on white
16 bits         scaled to 8: round(v * 255 / 65535)
floats          0..1 scaled to 0..255; 0..255 unchanged
CMYK, palettes, grey, black and white     converted to RGB
animations      first frame
"""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Encoded = bytes | Path | np.ndarray

# File name extensions searched for in folders; the format is read from the content.
SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "bmp", "dib", "webp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "pfm", "tga", "ico", "jp2", "j2k", "qoi", "avif", "avifs"),
    )
)
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels
_RUN_CODE = ("EPS", "PS")  # formats whose readers start other programs
_MOST_PIXELS = 178_956_970  # under a gigabyte as RGBA; Pillow's own limit
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
)
_BOXES = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}

# Images up to the limit above are accepted, so Pillow's warning at half of it is turned off.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """Raised for an image that cannot be decoded; the message names the kind of the file."""


def decode_image(encoded: Encoded) -> Image.Image:
    """Returns an image as RGB with 8 bits per channel.

    Args:
      encoded: path of a file, content of a file, or uint8 array `[height, width, 1 or 3]`.

    Raises:
      UnreadableImage: the file is missing, damaged, not an image, or too large.
    """
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded[..., 0] if encoded.shape[-1] == 1 else encoded).convert(
            "RGB"
        )
    source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with Image.open(source, formats=_formats()) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UnreadableImage(f"{image.width}x{image.height} pixels, too many")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    # Decoders raise exceptions of all kinds for damaged files.
    except Exception as error:
        raise UnreadableImage(_reason(encoded, error)) from error


def kind_of(content: bytes) -> str:
    """Returns the kind of a file, by its first bytes.

    >>> kind_of(b"GIF89a..."), kind_of(b"<!DOCTYPE html>"), kind_of(b"")
    ('GIF', 'HTML', 'empty')
    """
    if not content:
        return "empty"
    for signature, name in _SIGNATURES:
        if content.startswith(signature):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    if content[4:8] == b"ftyp":
        return _BOXES.get(content[8:12], "video")
    text = content.lstrip()[:200].lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if text.startswith((b"<svg", b"<?xml")):
        return "SVG or XML"
    if not any(content):
        return "zeros"
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in content)
    return "text" if is_text and b"\x7f" not in content else "no known format"


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns the formats that Pillow reads without other programs."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - set(_RUN_CODE)))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        pixels = image.convert("RGBA")
        background = Image.new("RGBA", pixels.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, pixels).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255.0
    elif mode == "F" and low >= 0 and high <= 255:
        scaled = values
    elif mode != "F" and low >= 0 and high <= 65535:
        scaled = values * (255 / 65535)
    else:
        raise UnreadableImage(f"values from {low:g} to {high:g}, of which no scale is known")
    return np.rint(scaled).astype(np.uint8)


def _reason(encoded: bytes | Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {_MOST_PIXELS} pixels"
    try:
        content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    except OSError as missing:
        return missing.strerror or "cannot be opened"
    kind = kind_of(content[:4096])
    is_image = kind in {"JPEG", "PNG", "GIF", "BMP", "TIFF", "WebP", "AVIF"}
    return f"damaged {kind}" if is_image else kind
