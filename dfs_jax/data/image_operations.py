"""Pillow's image operations on a whole batch, with a different operation for each example.

There is no branching by example: every image is transformed by an affine map (often the identity),
and one of its recoloured versions is then selected.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
RECOLOURINGS = (
    "color",
    "sharpness",
    "brightness",
    "contrast",
    "invert",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
OPERATIONS = (*WARPS, *RECOLOURINGS)

_LEVELS = 256
_HIGHEST = 255
# Pillow's nearest-neighbour affine transform counts in 1/65536 pixel.
_FIXED_BITS = 16
_IDENTITY_MAP = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Operation(NamedTuple):
    """One operation for each example (or row of a table); see `encode_operation`.

    Attributes:
      affine: int32 `[..., 6]`, output pixel to input pixel in fixed point.
      kind: int32 `[...]`, 0 to keep the colours, else 1 + the index in `RECOLOURINGS`.
      value: float32 `[...]`, the parameter of a recolouring.
    """

    affine: jax.Array | np.ndarray
    kind: jax.Array | np.ndarray
    value: jax.Array | np.ndarray


def encode_operation(name: str | None, value: float, height: int, width: int) -> Operation:
    """Returns one operation as a row of numbers, computed in double precision on the host.

    Args:
      name: one of `OPERATIONS`; None leaves the image unchanged.
      value: shear: slope; translate: pixels, positive moves the image left or up; rotate: degrees
        counter-clockwise; color, sharpness, brightness, contrast: factor, 1 leaves the image
        unchanged; posterize: bits kept; solarize: threshold in levels; unused by the others.
      height: height of the images, in pixels.
      width: width of the images, in pixels.
    """
    affine = _affine_map(name, value, height, width) if name in WARPS else _IDENTITY_MAP
    kind = 1 + RECOLOURINGS.index(name) if name in RECOLOURINGS else 0
    return Operation(
        affine=np.array(_fixed_point(*affine), np.int32),
        kind=np.array(kind, np.int32),
        value=np.array(value, np.float32),
    )


def apply_operations(images: jax.Array, *stages: Operation, fill: int) -> jax.Array:
    """Applies one operation of every stage to each image, within one level of Pillow's result.

    Args:
      images: uint8 `[batch, height, width, 3]`.
      *stages: operations of each stage in order, one for each example.
      fill: level of pixels that a geometric operation takes from outside of the image.

    Returns:
      Images of the same shape and type.
    """
    # Planes, [batch, channels, height, width], keep the pixels that are processed alike adjacent.
    planes = jnp.moveaxis(images, -1, 1)
    for operations in stages:
        planes = _recolour(planes, operations)
        planes = _warp_nearest(planes, operations.affine, fill)
    return jnp.moveaxis(planes, 1, -1)


def _recolour(planes: jax.Array, operations: Operation) -> jax.Array:
    kind, value = (
        jnp.asarray(column)[:, None, None, None] for column in (operations.kind, operations.value)
    )
    pixels = planes.astype(jnp.int32)
    grey = _grey(pixels)
    is_equalize = kind == 1 + RECOLOURINGS.index("equalize")
    results = {
        "color": _blend(grey, pixels, value),
        "sharpness": _blend(_smooth(pixels), pixels, value),
        "brightness": _blend(jnp.zeros_like(pixels), pixels, value),
        "contrast": _blend(_rounded_mean(grey), pixels, value),
        "invert": 255 - pixels,
        "posterize": pixels & (256 - jnp.exp2(8 - value).astype(jnp.int32)),
        "solarize": jnp.where(pixels < value, pixels, 255 - pixels),
        "autocontrast": _autocontrast(pixels),
        # The condition also keeps XLA from fusing the look-up with the rest, which would prevent
        # vectorisation on a CPU.
        "equalize": jax.lax.cond(is_equalize.any(), _equalize, lambda same: same, pixels),
    }
    choices = [pixels, *(results[name] for name in RECOLOURINGS)]
    return jax.lax.select_n(
        jnp.broadcast_to(kind, pixels.shape), *(choice.astype(jnp.uint8) for choice in choices)
    )


def _affine_map(name: str, value: float, height: int, width: int) -> tuple[float, ...]:
    """Returns (a, b, c, d, e, f): output (x, y) takes input (a x + b y + c, d x + e y + f)."""
    if name == "rotate":
        angle = -math.radians(value % 360)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos
    return {
        "shear_x": (1.0, value, 0.0, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, value, 1.0, 0.0),
        "translate_x": (1.0, 0.0, value, 0.0, 1.0, 0.0),
        "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, value),
    }[name]


def _fixed_point(
    a: float, b: float, c: float, d: float, e: float, f: float
) -> tuple[int, int, int, int, int, int]:
    """Returns the same map between pixel indices, whose centres lie at half-integers."""
    moved = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)
    a, b, c, d, e, f = (math.floor(v * 2**_FIXED_BITS + 0.5) for v in moved)
    return a, b, c, d, e, f


def _warp_nearest(planes: jax.Array, affine: jax.Array | np.ndarray, fill: int) -> jax.Array:
    affine = jnp.asarray(affine)
    batch, channels, height, width = planes.shape

    def warp(planes: jax.Array) -> jax.Array:
        a, b, c, d, e, f = jnp.moveaxis(affine, -1, 0)[:, :, None, None]
        y, x = jnp.arange(height)[:, None], jnp.arange(width)
        source_x = (a * x + b * y + c) >> _FIXED_BITS
        source_y = (d * x + e * y + f) >> _FIXED_BITS
        inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
        index = jnp.where(inside, source_y * width + source_x, 0).reshape(batch, 1, -1)
        flat = planes.reshape(batch, channels, -1)
        taken = jnp.take_along_axis(flat, index, axis=-1, mode="promise_in_bounds")
        return jnp.where(inside[:, None], taken.reshape(planes.shape), jnp.uint8(fill))

    identity = jnp.array(_fixed_point(*_IDENTITY_MAP), jnp.int32)
    # Like the condition above, this one ends a fusion, so that its operand is computed once.
    return jax.lax.cond((affine != identity).any(), warp, lambda same: same, planes)


def _grey(pixels: jax.Array) -> jax.Array:
    """Returns luma (ITU-R 601), `[batch, 1, height, width]`, in Pillow's integer arithmetic."""
    red, green, blue = jnp.moveaxis(pixels, 1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[:, None]


def _rounded_mean(grey: jax.Array) -> jax.Array:
    count = grey.shape[2] * grey.shape[3]
    return (2 * grey.sum((2, 3), keepdims=True) + count) // (2 * count)


def _blend(degenerate: jax.Array, pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Interpolates or extrapolates from the degenerate image to the image; truncates fractions."""
    start = degenerate.astype(jnp.float32)
    value = start + factor * (pixels.astype(jnp.float32) - start)
    return jnp.clip(value, 0, _HIGHEST).astype(jnp.int32)


def _smooth(pixels: jax.Array) -> jax.Array:
    """Returns the 3x3 mean with weight five at the centre; the border is unchanged."""
    height, width = pixels.shape[2:]
    padded = jnp.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = padded[:, :, :height] + padded[:, :, 1 : height + 1] + padded[:, :, 2:]
    total = rows[..., :width] + rows[..., 1 : width + 1] + rows[..., 2:] + 4 * pixels
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inner = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inner, _floor_divide(2 * total + 13, 26), pixels)


def _autocontrast(pixels: jax.Array) -> jax.Array:
    """Stretches each channel to the full range, except channels with a single level."""
    low, high = pixels.min((2, 3), keepdims=True), pixels.max((2, 3), keepdims=True)
    stretched = _floor_divide((pixels - low) * _HIGHEST, jnp.maximum(high - low, 1))
    return jnp.where(high > low, stretched, pixels)


def _equalize(pixels: jax.Array) -> jax.Array:
    """Makes each channel's cumulative histogram linear, with Pillow's integer step."""
    batch, channels, height, width = pixels.shape
    levels = jnp.arange(_LEVELS)
    counts = _histogram(pixels)
    highest = jnp.where(counts > 0, levels, 0).max(-1, keepdims=True)
    at_highest = jnp.take_along_axis(counts, highest, axis=-1)
    step = (height * width - at_highest) // _HIGHEST
    # The cumulative sum is a product; integers below 2^24 are exact in float32.
    lower = jnp.triu(jnp.ones((_LEVELS, _LEVELS), jnp.float32), 1)
    precision = jax.lax.Precision.HIGHEST
    below = jnp.matmul(counts.astype(jnp.float32), lower, precision=precision).astype(jnp.int32)
    straight = _floor_divide(step // 2 + below, jnp.maximum(step, 1))
    table = jnp.where(step > 0, jnp.minimum(straight, _HIGHEST), levels)
    flat = pixels.reshape(batch, channels, -1)
    return jnp.take_along_axis(table, flat, axis=-1, mode="promise_in_bounds").reshape(pixels.shape)


def _histogram(pixels: jax.Array) -> jax.Array:
    """Returns the number of pixels of each level, int32 `[batch, channels, 256]`."""
    channels = pixels.shape[1]
    # One flat scatter-add: 40 times as fast on a CPU as comparing with every level.
    row = jnp.arange(channels)[:, None, None]

    def of_image(pixels: jax.Array) -> jax.Array:
        counts = jnp.zeros(channels * _LEVELS, jnp.int32)
        counts = counts.at[(row * _LEVELS + pixels).ravel()].add(1, mode="promise_in_bounds")
        return counts.reshape(channels, _LEVELS)

    # Image by image, because devices that share a batch would otherwise sum all of its counts.
    return jax.vmap(of_image)(pixels)


def _floor_divide(numerator: jax.Array, denominator: jax.Array | int) -> jax.Array:
    """Returns the integer quotient, computed in float32, which CPUs vectorise.

    It is exact here: numerators lie below 2^24 and quotients below 2^10, so that a quotient that is
    not an integer is further from the next integer than float32's rounding error.
    """
    quotient = numerator.astype(jnp.float32) / jnp.asarray(denominator, jnp.float32)
    return jnp.floor(quotient).astype(jnp.int32)
