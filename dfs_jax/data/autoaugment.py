"""AutoAugment's policy for CIFAR-10, on the device and batched.

Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019, table 7.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.data.augmentation import check_level
from dfs_jax.data.image_operations import Operation, apply_operations, encode_operation

# One line a sub-policy: two times (operation, probability, magnitude in 0..9).
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

_MAGNITUDES = 10
_STAGES = 2
_SIGNS = (-1, 1)


def operation_value(name: str, magnitude: int, sign: int, height: int, width: int) -> float:
    """Returns an operation's parameter at a magnitude, in the units of `encode_operation`.

    The ranges are those of the PyTorch program that most published CIFAR runs use; like the
    policy's own authors, and unlike one of that program's two versions, rotations go both ways.
    Shears take the nearest pixel (that program: bicubic).

    Args:
      name: of the operation.
      magnitude: in 0..9.
      sign: -1 or 1, the direction of operations that have one.
      height: of the images; the longest translation is 150/331 of it.
      width: likewise.

    >>> operation_value("rotate", 9, -1, 32, 32), operation_value("posterize", 7, 1, 32, 32)
    (-30.0, 5.0)
    """
    strength = magnitude / (_MAGNITUDES - 1)
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
    """Each image goes through one of 25 sub-policies: two operations, each by chance.

    Args:
      fill: level of pixels that come from outside of the image.

    Example:
      >>> images = jnp.full((2, 8, 8, 3), 100, jnp.uint8)
      >>> jax.eval_shape(AutoAugment(fill=128), images, jax.random.key(0)).shape
      (2, 8, 8, 3)
    """

    fill: int = 128

    def __post_init__(self):
        check_level("autoaugment_fill", self.fill)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Augments uint8 `[batch, height, width, 3]`."""
        batch, height, width, _ = images.shape
        policy_key, chance_key, sign_key = jax.random.split(key, 3)
        policies = jax.random.randint(policy_key, (batch,), 0, len(CIFAR10_POLICY))
        signs = jax.random.randint(sign_key, (batch, _STAGES), 0, len(_SIGNS))
        chances = jax.random.uniform(chance_key, (batch, _STAGES))
        probabilities = jnp.array([[p for _, p, _ in pair] for pair in CIFAR10_POLICY])
        table = _operation_table(height, width)
        rows = (policies[:, None] * _STAGES + jnp.arange(_STAGES)) * len(_SIGNS) + signs
        rows = jnp.where(chances < probabilities[policies], rows, len(table.value) - 1)

        chosen = Operation(*(jnp.asarray(column)[rows] for column in table))
        stages = [Operation(*(column[:, k] for column in chosen)) for k in range(_STAGES)]
        return apply_operations(images, *stages, fill=self.fill)


def _operation_table(height: int, width: int) -> Operation:
    """Rows `[policy, stage, sign]`, flat, then one that leaves an image as it is."""
    rows = [
        encode_operation(name, operation_value(name, magnitude, sign, height, width), height, width)
        for pair in CIFAR10_POLICY
        for name, _, magnitude in pair
        for sign in _SIGNS
    ]
    rows.append(encode_operation(None, 0.0, height, width))
    return Operation(*(np.stack(column) for column in zip(*rows, strict=True)))
