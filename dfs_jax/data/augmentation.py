"""Augmentation on the device, inside jit: whole batches, one key, a draw for each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dfs_jax.types import UserError

# uint8 [batch, height, width, 3], key -> the same shape and type.
Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def random_crop(images: jax.Array, key: jax.Array, *, padding: int, fill: int) -> jax.Array:
    """Pads every side by `padding` pixels of value `fill`, cuts a window out at random.

    Args:
      images: uint8 `[batch, height, width, channels]`.
      key: each example draws its own offset, uniform in `[0, 2 * padding]` on both axes.

    Returns:
      The shape of `images`.
    """
    batch, height, width, channels = images.shape
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)), constant_values=fill)
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, channels))

    return jax.vmap(cut)(padded, offsets)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors every other image, by chance, left to right.

    Args:
      images: uint8 `[batch, height, width, channels]`.
      key: one fair coin an example.
    """
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns `(images / 255 - mean) / std` as float32.

    Args:
      images: uint8 `[..., channels]`.
      mean: by channel, in units in which white is 1.
      std: likewise.
    """
    # One multiplication and one addition a value.
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return images.astype(jnp.float32) * scale - shift


def create_augmentation(
    names: str | None, *, crop_padding: int | None = None, crop_fill: int | None = None
) -> Augmentation:
    """Returns the augmentations called `names`, one after the other.

    Args:
      names: a comma list of `crop`, `flip`; None, "" or "none" is the identity.
      crop_padding: pixels that `crop` adds on every side, 4.
      crop_fill: their value, 128.

    Raises:
      UserError: an unknown name, an option of an augmentation that is not in the list.
    """
    padding = 4 if crop_padding is None else crop_padding
    fill = 128 if crop_fill is None else crop_fill
    table: dict[str, Augmentation] = {
        "crop": lambda images, key: random_crop(images, key, padding=padding, fill=fill),
        "flip": random_flip,
    }
    chosen = [name.strip() for name in (names or "none").split(",")]
    for name in chosen:
        if name not in table and chosen != ["none"]:
            raise UserError(f"unknown augmentation {name!r}: choose from {', '.join(table)}, none")
    stages = [table[name] for name in chosen if name != "none"]

    def augment(images: jax.Array, key: jax.Array) -> jax.Array:
        for number, stage in enumerate(stages):
            images = stage(images, jax.random.fold_in(key, number))
        return images

    return augment
