"""AutoAugment's policies and RandAugment, batched on the device.

Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019, appendix.
Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space",
NeurIPS 2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.data.augmentation import check_level
from dfs_jax.data.image_operations import Operation, apply_operations, encode_operation
from dfs_jax.types import UserError, check_whole

# One sub-policy on each line: two triples (operation, probability, magnitude in 0..9).
CIFAR10_POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)

IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)

POLICIES = {"cifar10": CIFAR10_POLICY, "imagenet": IMAGENET_POLICY}

# Operations of RandAugment; None leaves the image unchanged.
RANDAUGMENT_OPERATIONS = (
    None,
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)

_STRONGEST = 9  # AutoAugment's magnitudes are 0..9
_STRONGEST_RANDAUGMENT = 30
_STAGES = 2
_SIGNS = (-1, 1)


def operation_value(
    name: str, magnitude: int, sign: int, height: int, width: int, *, strongest: int = _STRONGEST
) -> float:
    """Returns an operation's parameter at a magnitude, in the units of `encode_operation`.

    The ranges are those of the PyTorch program that most published CIFAR runs use. As in the
    authors' own policy, and unlike in one of that program's two versions, rotations go both ways.
    Shears take the nearest pixel (that program: bicubic).

    Args:
      name: name of the operation.
      magnitude: magnitude in 0..`strongest`.
      sign: -1 or 1, the direction of operations that have one.
      height: height of the images; the longest translation is 150/331 of it.
      width: width of the images, likewise.
      strongest: largest magnitude, 9 in AutoAugment and 30 in RandAugment.

    >>> operation_value("rotate", 9, -1, 32, 32), operation_value("posterize", 7, 1, 32, 32)
    (-30.0, 5.0)
    """
    strength = magnitude / strongest
    values = {
        "shear_x": sign * 0.3 * strength,
        "shear_y": sign * 0.3 * strength,
        "translate_x": sign * 150 / 331 * strength * width,
        "translate_y": sign * 150 / 331 * strength * height,
        "rotate": sign * 30 * strength,
        "color": 1 + sign * 0.9 * strength,
        "contrast": 1 + sign * 0.9 * strength,
        "brightness": 1 + sign * 0.9 * strength,
        "sharpness": 1 + sign * 0.9 * strength,
        "posterize": float(round(8 - 4 * strength)),
        "solarize": 256 * (1 - strength),
    }
    return values.get(name, 0.0)


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """Applies one of 25 random sub-policies to each image: two operations with probabilities.

    Args:
      fill: level of pixels that come from outside of the image.
      policy: policy found on "cifar10" or on "imagenet".

    Raises:
      UserError: a level outside 0..255, or an unknown policy.

    Example:
      >>> images = jnp.full((2, 8, 8, 3), 100, jnp.uint8)
      >>> jax.eval_shape(AutoAugment(fill=128), images, jax.random.key(0)).shape
      (2, 8, 8, 3)
    """

    fill: int = 128
    policy: str = "cifar10"

    def __post_init__(self):
        check_level("autoaugment_fill", self.fill)
        if self.policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise UserError(f"autoaugment_policy must be one of {known}, got {self.policy!r}")

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Augments uint8 `[batch, height, width, 3]`."""
        batch, height, width, _ = images.shape
        sub_policies = POLICIES[self.policy]
        policy_key, chance_key, sign_key = jax.random.split(key, 3)
        policies = jax.random.randint(policy_key, (batch,), 0, len(sub_policies))
        signs = jax.random.randint(sign_key, (batch, _STAGES), 0, len(_SIGNS))
        chances = jax.random.uniform(chance_key, (batch, _STAGES))
        probabilities = jnp.array([[p for _, p, _ in pair] for pair in sub_policies])
        named = [(name, magnitude) for pair in sub_policies for name, _, magnitude in pair]
        table = _operation_table([*named, (None, 0)], _STRONGEST, height, width)
        rows = policies[:, None] * _STAGES + jnp.arange(_STAGES)
        rows = jnp.where(chances < probabilities[policies], rows, len(named))
        return _apply_rows(images, table, rows * len(_SIGNS) + signs, self.fill)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies random operations out of 14 to each image, all at one magnitude.

    Args:
      operations: number of operations, applied one after another.
      magnitude: strength of the operations, an integer in 0..30. Operations with a direction take
        either; posterize keeps 8 bits at 0 and 4 at 30.
      fill: level of pixels that come from outside of the image.

    Raises:
      UserError: a number out of range.
    """

    operations: int = 2
    magnitude: int = 9
    fill: int = 128

    def __post_init__(self):
        check_whole("randaugment_operations", self.operations)
        check_whole("randaugment_magnitude", self.magnitude, at_least=0)
        if self.magnitude > _STRONGEST_RANDAUGMENT:
            raise UserError(
                f"randaugment_magnitude must be at most {_STRONGEST_RANDAUGMENT}, "
                f"got {self.magnitude}"
            )
        check_level("randaugment_fill", self.fill)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Augments uint8 `[batch, height, width, 3]`."""
        batch, height, width, _ = images.shape
        named = [(name, self.magnitude) for name in RANDAUGMENT_OPERATIONS]
        table = _operation_table(named, _STRONGEST_RANDAUGMENT, height, width)
        rows = jax.random.randint(key, (batch, self.operations), 0, len(table.value))
        return _apply_rows(images, table, rows, self.fill)


def _apply_rows(images: jax.Array, table: Operation, rows: jax.Array, fill: int) -> jax.Array:
    """Applies to each image the rows `[batch, stages]` of a table of operations."""
    chosen = Operation(*(jnp.asarray(column)[rows] for column in table))
    stages = [Operation(*(column[:, k] for column in chosen)) for k in range(rows.shape[1])]
    return apply_operations(images, *stages, fill=fill)


def _operation_table(
    named: Sequence[tuple[str | None, int]], strongest: int, height: int, width: int
) -> Operation:
    """Returns a flat table of rows `[operation, sign]`, given operations and magnitudes."""

    def encoded(name: str | None, magnitude: int, sign: int) -> Operation:
        if name is None:
            return encode_operation(None, 0.0, height, width)
        value = operation_value(name, magnitude, sign, height, width, strongest=strongest)
        return encode_operation(name, value, height, width)

    rows = [encoded(name, magnitude, sign) for name, magnitude in named for sign in _SIGNS]
    return Operation(*(np.stack(column) for column in zip(*rows, strict=True)))
