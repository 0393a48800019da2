"""Every kind of image to uint8 RGB: orientation, depth, transparency, colour spaces."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dfs_jax.data.decoding import UnreadableImage, decode_image, kind_of
from dfs_jax.data.photographs import decode_photograph

# Red, green, blue and white quarters of 16 pixels, so that JPEG's blocks do not mix them.
QUARTERS = np.zeros((32, 48, 3), np.uint8)
QUARTERS[:16, :24, 0] = QUARTERS[:16, 24:, 1] = QUARTERS[16:, :24, 2] = 255
QUARTERS[16:, 24:] = 255
ORIENTATION = 0x0112
# How a camera that notes the orientation holds the picture: stored = turned(seen).
TURNED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen),
    7: lambda seen: np.rot90(seen, 2).transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def both(content):
    """What sets in memory and streamed sets are given."""
    in_memory, streamed = np.asarray(decode_image(content)), decode_photograph(content)
    assert streamed is not None
    assert in_memory.shape == streamed.shape
    assert in_memory.dtype == streamed.dtype == np.uint8
    np.testing.assert_allclose(in_memory, streamed, atol=6)
    return in_memory


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_the_orientation_that_a_camera_noted_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    content = encoded(TURNED[orientation](QUARTERS), kind, exif=exif, **options)
    np.testing.assert_allclose(both(content), QUARTERS, atol=60)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    values = np.array([[0, 128, 257], [32768, 65534, 65535]], np.uint16)
    expected = np.rint(values * (255 / 65535))
    np.testing.assert_array_equal(both(encoded(values, kind))[..., 1], expected)


def test_floats_are_scaled_by_their_range():
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(both(encoded(unit, "TIFF"))[..., 0], [[0, 128, 255]])
    bytes_ = np.array([[0.0, 100.4, 255.0]], np.float32)
    np.testing.assert_array_equal(both(encoded(bytes_, "TIFF"))[..., 0], [[0, 100, 255]])
    with pytest.raises(UnreadableImage, match="values from -1 to 1, of which no scale is known"):
        decode_image(encoded(2 * unit - 1, "TIFF"))


def test_transparency_shows_white_whatever_lies_under_it():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = (200, 0, 0, 0), (200, 0, 0, 255), (200, 0, 0, 128)
    expected = [[255, 255, 255], [200, 0, 0], [227, 127, 127]]
    np.testing.assert_allclose(both(encoded(pixels))[0], expected, atol=1)
    grey = Image.fromarray(pixels[..., :2].copy(), "LA")
    assert both(encoded(grey))[0, :, 0].tolist() == [255, 255, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    found = both(encoded(palette, transparency=0))[0]
    assert found.tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_spaces(mode):
    grey = Image.fromarray(np.full((9, 7, 3), 255, np.uint8)).convert(mode)
    kind = "PNG" if mode in ("1", "L", "P") else "JPEG"
    np.testing.assert_allclose(both(encoded(grey, kind)), 255, atol=2)


def test_cmyk_photographs_keep_their_colours():
    content = encoded(Image.fromarray(QUARTERS).convert("CMYK"), "JPEG", quality=100)
    np.testing.assert_allclose(both(content), QUARTERS, atol=60)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (5, 7), color) for color in ((255, 255, 255), (0, 0, 0))]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(both(content), 255, atol=2)


BROKEN = {
    "empty": b"",
    "HTML": b"  <HTML><body>404",
    "text": b"a note\n",
    "zeros": bytes(300),
    "PDF": b"%PDF-1.7",
    "ZIP archive": b"PK\x03\x04rest",
    "HEIC": b"\0\0\0\x18ftypheic",
    "video": b"\0\0\0\x18ftypisom",
    "SVG or XML": b"<?xml version='1.0'?>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 7\n",
    "damaged PNG": encoded(QUARTERS)[:70],
    "damaged JPEG": encoded(QUARTERS, "JPEG")[:500],
    "damaged GIF": b"GIF89a",
    "no known format": bytes(range(1, 200)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_image_is_told_by_what_it_is(kind, tmp_path):
    with pytest.raises(UnreadableImage, match=f"^{kind}$"):
        decode_image(BROKEN[kind])
    assert decode_photograph(BROKEN[kind]) is None
    assert kind.removeprefix("damaged ") == kind_of(BROKEN[kind])
    (tmp_path / "file").write_bytes(BROKEN[kind])
    with pytest.raises(UnreadableImage, match=f"^{kind}$"):
        decode_image(tmp_path / "file")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        decode_image(tmp_path / "absent.png")
    with pytest.raises(UnreadableImage, match="Is a directory"):
        decode_image(tmp_path)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    header = encoded(Image.new("1", (30_000, 30_000)))
    with pytest.raises(UnreadableImage, match="pixels"):
        decode_image(header)
    assert decode_photograph(header) is None
