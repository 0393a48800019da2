"""Augmentation of batches on the device, inside jit, with independent randomness by example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from dfs_jax.registry import Registry
from dfs_jax.types import UserError

# uint8 [batch, height, width, 3], key -> the same shape and type.
Augmentation: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def create_augmentation(
    names: str | None,
    *,
    crop_padding: int | None = None,
    crop_fill: int | None = None,
    autoaugment_fill: int | None = None,
    autoaugment_policy: str | None = None,
    randaugment_operations: int | None = None,
    randaugment_magnitude: int | None = None,
    randaugment_fill: int | None = None,
    cutout_size: int | None = None,
    cutout_fill: int | str | None = None,
    mean: Sequence[float] | None = None,
) -> Augmentation:
    """Returns the augmentations in `names` as one function, for use inside jit.

    Args:
      names: comma-separated list of `crop`, `flip`, `autoaugment`, `randaugment`, `cutout`, or of
        "package.module:attribute" (a callable without arguments that returns an augmentation), in
        the order of application; None, "" or "none" is the identity.
      crop_padding: number of pixels that `crop` adds on every side, 4.
      crop_fill: level of that padding, 128.
      autoaugment_fill: level of pixels that `autoaugment` takes from outside of the image, 128.
      autoaugment_policy: "cifar10" or "imagenet", the set that it was found on; "cifar10".
      randaugment_operations: number of operations that `randaugment` applies, 2.
      randaugment_magnitude: strength of these operations, 0..30, 9.
      randaugment_fill: as `autoaugment_fill`.
      cutout_size: side of the square in pixels, 16.
      cutout_fill: level of the square in 0..255, or "mean" for the mean colour (see `Cutout`); 0.
      mean: mean of the set by channel, in units in which white is 1; used only for "mean".

    Raises:
      UserError: an unknown name, an option of an augmentation that is not in the list, or a value
        out of range.

    Example:
      >>> augment = jax.jit(create_augmentation("crop,flip,cutout", cutout_size=3))
      >>> augment(jnp.zeros((5, 7, 11, 3), jnp.uint8), jax.random.key(0)).shape
      (5, 7, 11, 3)
    """
    options = {
        "crop": {"padding": crop_padding, "fill": crop_fill},
        "autoaugment": {"fill": autoaugment_fill, "policy": autoaugment_policy},
        "randaugment": {
            "operations": randaugment_operations,
            "magnitude": randaugment_magnitude,
            "fill": randaugment_fill,
        },
        "cutout": {"size": cutout_size, "fill": _cutout_level(cutout_fill, mean)},
    }
    chosen = [name.strip() for name in (names or "none").split(",")]
    chosen = [] if chosen == ["none"] else chosen
    _check_options_are_used(chosen, options)
    stages = [AUGMENTATIONS.create(name, **options.get(name, {})) for name in chosen]

    def augment(images: jax.Array, key: jax.Array) -> jax.Array:
        for number, stage in enumerate(stages):
            images = stage(images, jax.random.fold_in(key, number))
        return images

    return augment


def _cutout_level(
    fill: int | str | None, mean: Sequence[float] | None
) -> int | str | tuple[int, ...] | None:
    if fill != "mean":
        return fill
    if mean is None:
        raise UserError("cutout_fill 'mean' needs the data set's mean")
    return tuple(round(255 * channel) for channel in mean)


def _check_options_are_used(chosen: list[str], options: dict[str, dict]) -> None:
    for name, values in options.items():
        for option, value in values.items():
            if value is not None and name not in chosen:
                raise UserError(
                    f"{name}_{option} is set (to {value!r}) but {name!r} is not among the "
                    f"augmentations, {', '.join(chosen) or 'none'}"
                )


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Pads every side, then crops a random window of the image's size.

    Args:
      padding: number of pixels; offsets are uniform in `[0, 2 * padding]` on both axes.
      fill: level of the padding.
    """

    padding: int = 4
    fill: int = 128

    def __post_init__(self):
        if self.padding < 0:
            raise UserError(f"crop_padding must not be negative, got {self.padding}")
        check_level("crop_fill", self.fill)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Augments uint8 `[batch, height, width, channels]`."""
        batch, height, width, channels = images.shape
        sides = (self.padding, self.padding)
        padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)), constant_values=self.fill)
        offsets = jax.random.randint(key, (batch, 2), 0, 2 * self.padding + 1)

        def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, channels))

        return jax.vmap(cut)(padded, offsets)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors an image left to right with probability one half."""

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Augments uint8 `[batch, height, width, channels]`."""
        mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        return jnp.where(mirrored, images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Cutout:
    """Covers a square whose centre is uniform in the image, clipped at the borders.

    Published programs apply it before normalisation (black, with AutoAugment) or after it (0 there,
    the mean colour, as in the original). The default here is the first.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    2017.

    Args:
      size: side of the square in pixels.
      fill: level of the square, or one for each channel.
    """

    size: int = 16
    fill: int | Sequence[int] = 0

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"cutout_size must be at least 1, got {self.size}")
        check_level("cutout_fill", self.fill)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Augments uint8 `[batch, height, width, channels]`."""
        batch, height, width, _ = images.shape
        y_key, x_key = jax.random.split(key)
        rows = self._covered(y_key, batch, height)[:, :, None, None]
        columns = self._covered(x_key, batch, width)[:, None, :, None]
        return jnp.where(rows & columns, jnp.array(self.fill, jnp.uint8), images)

    def _covered(self, key: jax.Array, batch: int, length: int) -> jax.Array:
        """Returns which of `length` pixels the square covers on one axis, for each example."""
        start = jax.random.randint(key, (batch, 1), 0, length) - self.size // 2
        position = jnp.arange(length)
        return (position >= start) & (position < start + self.size)


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns `(images / 255 - mean) / std` as float32 (float64 if that is JAX's default).

    Args:
      images: uint8 `[..., channels]`.
      mean: mean of each channel, in units in which white is 1.
      std: standard deviation of each channel, in the same units.
    """
    # One multiplication and one subtraction for each value.
    scale = 1 / (255 * jnp.asarray(std, float))
    shift = jnp.asarray(mean, float) / jnp.asarray(std, float)
    return images.astype(float) * scale - shift


def check_level(option: str, value: int | str | Sequence[int]) -> None:
    """Raises `UserError` unless `value` is a level in 0..255, or one for each channel."""
    levels = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(level, int) and 0 <= level <= 255 for level in levels):
        raise UserError(f"{option} must be a whole number in 0..255, got {value!r}")


AUGMENTATIONS = Registry(
    "augmentation",
    {
        "crop": RandomCrop,
        "flip": RandomFlip,
        "autoaugment": "dfs_jax.data.autoaugment:AutoAugment",
        "randaugment": "dfs_jax.data.autoaugment:RandAugment",
        "cutout": Cutout,
    },
)
