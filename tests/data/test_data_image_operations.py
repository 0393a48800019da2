"""Every batched image operation against Pillow, image by image."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dfs_jax.data.autoaugment import (
    CIFAR10_POLICY,
    IMAGENET_POLICY,
    POLICIES,
    RANDAUGMENT_OPERATIONS,
    AutoAugment,
    RandAugment,
    operation_value,
)
from dfs_jax.data.image_operations import OPERATIONS, Operation, apply_operations, encode_operation

HEIGHT, WIDTH, FILL = 19, 23, 128
MAGNITUDES = (0, 1, 2, 3, 5, 7, 8, 9)


def example_images(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Noise, smooth images, few levels, one level, full range: uint8 `[8, height, width, 3]`."""
    random = np.random.default_rng(7)
    noise = random.integers(0, 256, (2, height, width, 3))
    y, x, c = np.ogrid[:height, :width, :3]
    smooth = 128 + 90 * np.sin(x / 7 + c) * np.cos(y / 5 - c)
    dark = 20 + 60 * np.sin(x / 3 - c) ** 2 + y
    steps = 37 * ((x + y + c) % 3) + 100
    ramp = (x + width * y + c) * 255 / (width * height + 2)
    mixed = np.where(c == 1, 77, random.integers(40, 200, (height, width, 3)))
    constant = np.full((height, width, 3), 93)
    rest = np.stack([smooth, dark, steps + 0 * smooth, ramp, mixed, constant])
    return np.concatenate([noise, rest]).astype(np.uint8)


def by_pillow(name: str, value: float, pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    grey = (FILL, FILL, FILL)

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=grey)

    operations = {
        "shear_x": lambda: affine(1, value, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, value, 1, 0),
        "translate_x": lambda: affine(1, 0, value, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, value),
        "rotate": lambda: image.rotate(value, fillcolor=grey),
        "color": lambda: ImageEnhance.Color(image).enhance(value),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "posterize": lambda: ImageOps.posterize(image, int(value)),
        "solarize": lambda: ImageOps.solarize(image, value),
        "invert": lambda: ImageOps.invert(image),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    assert set(operations) == set(OPERATIONS)
    return np.asarray(operations[name]())


def stack(rows: list[Operation]) -> Operation:
    return Operation(*(np.stack(column) for column in zip(*rows, strict=True)))


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda images, operations: apply_operations(images, operations, fill=FILL))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows_within_one_level(name, apply):
    images = example_images()
    values = [
        operation_value(name, magnitude, sign, HEIGHT, WIDTH)
        for magnitude in MAGNITUDES
        for sign in (-1, 1)
    ]
    # All values in one batch, so that each example must take its own.
    batch = np.concatenate([images] * len(values))
    rows = [encode_operation(name, v, HEIGHT, WIDTH) for v in values for _ in images]
    got = np.asarray(apply(batch, stack(rows)))
    expected = np.stack([by_pillow(name, v, image) for v in values for image in images])
    assert got.dtype == np.uint8
    difference = np.abs(got.astype(int) - expected)
    assert difference.max() <= 1
    # Rounding at the edge of a level is rare; geometric operations have none of it.
    assert (difference > 0).mean() < 0.005
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "equalize"):
        np.testing.assert_array_equal(got, expected)


def test_examples_of_one_batch_take_operations_of_their_own(apply):
    images = np.concatenate([example_images()] * 16)
    random = np.random.default_rng(11)
    chosen = [
        (str(name), operation_value(str(name), int(m), int(s), HEIGHT, WIDTH))
        for name, m, s in zip(
            random.choice(OPERATIONS, len(images)),
            random.integers(0, 10, len(images)),
            random.choice([-1, 1], len(images)),
            strict=True,
        )
    ]
    rows = [encode_operation(name, value, HEIGHT, WIDTH) for name, value in chosen]
    got = np.asarray(apply(images, stack(rows)))
    expected = np.stack([by_pillow(*c, image) for c, image in zip(chosen, images, strict=True)])
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_no_operation_leaves_every_level_as_it_is(apply):
    images = np.concatenate([example_images()] * 16)
    rows = [encode_operation(None, 0.0, HEIGHT, WIDTH)] * len(images)
    np.testing.assert_array_equal(apply(images, stack(rows)), images)


@pytest.mark.parametrize("pixels", [2, 200, 255, 256])
def test_equalize_of_few_pixels_is_pillows(pixels):
    images = np.random.default_rng(pixels).integers(0, 256, (3, 1, pixels, 3)).astype(np.uint8)
    rows = [encode_operation("equalize", 0.0, 1, pixels)] * 3
    expected = np.stack([np.asarray(ImageOps.equalize(Image.fromarray(i))) for i in images])
    got = jax.jit(lambda i, o: apply_operations(i, o, fill=0))(images, stack(rows))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_have_the_published_shape(policy):
    assert len(POLICIES[policy]) == 25
    for pair in POLICIES[policy]:
        assert len(pair) == 2
        for name, probability, magnitude in pair:
            assert name in OPERATIONS
            assert 0 <= probability <= 1
            assert magnitude in range(10)


def test_policies_have_the_operations_that_the_papers_tables_count():
    assert counted(CIFAR10_POLICY) == {
        "equalize": 9,
        "autocontrast": 7,
        "translate_y": 5,
        "sharpness": 5,
        "brightness": 4,
        "color": 5,
        "solarize": 4,
        "invert": 3,
        "contrast": 2,
        "translate_x": 2,
        "shear_y": 2,
        "posterize": 1,
        "rotate": 1,
    }

    assert counted(IMAGENET_POLICY) == {
        "equalize": 17,
        "color": 6,
        "rotate": 6,
        "solarize": 7,
        "posterize": 5,
        "invert": 3,
        "contrast": 2,
        "autocontrast": 2,
        "sharpness": 1,
        "shear_x": 1,
    }


def counted(policy):
    return collections.Counter(name for pair in policy for name, _, _ in pair)


def policy_outcomes(image: np.ndarray, policy: str) -> dict[bytes, float]:
    """Every image that a policy can make of one, with its probability; by Pillow."""
    outcomes: dict[bytes, float] = {}

    def go(image: np.ndarray, stages: tuple, probability: float) -> None:
        if probability == 0:
            return
        if not stages:
            outcomes[image.tobytes()] = outcomes.get(image.tobytes(), 0) + probability
            return
        (name, chance, magnitude), *rest = stages
        go(image, rest, probability * (1 - chance))
        for made in both_directions(image, name, magnitude, strongest=9):
            go(made, rest, probability * chance / 2)

    for pair in POLICIES[policy]:
        go(image, pair, 1 / len(POLICIES[policy]))
    return outcomes


def both_directions(image: np.ndarray, name: str, magnitude: int, *, strongest: int):
    height, width = image.shape[:2]
    for sign in (-1, 1):
        value = operation_value(name, magnitude, sign, height, width, strongest=strongest)
        yield by_pillow(name, value, image)


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_makes_pillows_outcomes_as_often_as_it_should(policy):
    image = example_images(13, 11)[2]
    augment = AutoAugment(fill=FILL, policy=policy)
    check_outcomes(augment, image, policy_outcomes(image, policy), draws=6000)


def test_randaugment_makes_pillows_outcomes_as_often_as_it_should():
    image = example_images(13, 11)[2]
    outcomes: dict[bytes, float] = collections.defaultdict(float)
    for name in RANDAUGMENT_OPERATIONS:
        made = both_directions(image, name, 17, strongest=30) if name else (image, image)
        for one in made:
            outcomes[one.tobytes()] += 1 / (2 * len(RANDAUGMENT_OPERATIONS))
    augment = RandAugment(operations=1, magnitude=17, fill=FILL)
    check_outcomes(augment, image, outcomes, draws=2000)


def test_randaugments_operations_follow_one_another():
    batch = jnp.broadcast_to(example_images(13, 11)[2], (500, 13, 11, 3))
    twice = jax.jit(RandAugment(operations=2, magnitude=17))(batch, jax.random.key(5))
    assert len(np.unique(twice, axis=0)) > 2 * len(RANDAUGMENT_OPERATIONS)


def check_outcomes(augment, image, outcomes, *, draws):
    assert sum(outcomes.values()) == pytest.approx(1)
    batch = jnp.broadcast_to(image, (draws, *image.shape))
    got = np.asarray(jax.jit(augment)(batch, jax.random.key(3)))
    known = np.stack([np.frombuffer(b, np.uint8).reshape(image.shape) for b in outcomes])
    counted = np.zeros(len(known))
    unknown = 0
    distinct, times = np.unique(got, axis=0, return_counts=True)
    for one, count in zip(distinct, times, strict=True):
        distance = np.abs(known.astype(int) - one).max((1, 2, 3))
        unknown += count * (distance.min() > 2)
        counted[distance.argmin()] += count
    assert unknown == 0
    probabilities = np.array(list(outcomes.values()))
    spread = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert np.all(np.abs(counted / draws - probabilities) < 5 * spread + 1e-3)
