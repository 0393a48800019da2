"""Crop, flip and cutout against loops; options; normalisation."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.data import AUGMENTATIONS, create_augmentation, load_dataset, normalise
from dfs_jax.data.augmentation import Cutout, RandomCrop, RandomFlip
from dfs_jax.types import UserError

BATCH, HEIGHT, WIDTH = 211, 5, 7


def images_of(batch: int = BATCH, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    shape = (batch, height, width, 3)
    return np.random.default_rng(2).integers(1, 256, shape).astype(np.uint8)


def all_crops(image: np.ndarray, padding: int, fill: int) -> dict[tuple[int, int], bytes]:
    height, width, _ = image.shape
    canvas = np.full((height + 2 * padding, width + 2 * padding, 3), fill, np.uint8)
    canvas[padding : padding + height, padding : padding + width] = image
    offsets = itertools.product(range(2 * padding + 1), repeat=2)
    return {(y, x): canvas[y : y + height, x : x + width].tobytes() for y, x in offsets}


@pytest.mark.parametrize(("padding", "fill"), [(2, 128), (3, 0), (0, 9)])
def test_crop_cuts_every_window_equally_often(padding, fill):
    images = images_of()
    crop = jax.jit(RandomCrop(padding=padding, fill=fill))
    rounds = 5
    found = dict.fromkeys(itertools.product(range(2 * padding + 1), repeat=2), 0)
    for round_number in range(rounds):
        got = np.asarray(crop(images, jax.random.key(round_number)))
        for image, cropped in zip(images, got, strict=True):
            windows = all_crops(image, padding, fill)
            (offset,) = [o for o, window in windows.items() if window == cropped.tobytes()]
            found[offset] += 1
    expected = rounds * BATCH / len(found)
    assert np.all(np.abs(np.array(list(found.values())) - expected) <= 5 * np.sqrt(expected))


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = images_of()
    got = np.asarray(jax.jit(RandomFlip())(images, jax.random.key(0)))
    mirrored = np.array([np.array_equal(g, i[:, ::-1]) for g, i in zip(got, images, strict=True)])
    kept = np.array([np.array_equal(g, i) for g, i in zip(got, images, strict=True)])
    assert np.all(mirrored ^ kept)
    assert abs(mirrored.sum() - BATCH / 2) < 5 * np.sqrt(BATCH / 4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_cutout_covers_a_square_centred_on_every_pixel(size):
    images = images_of()
    cutout = jax.jit(Cutout(size=size, fill=0))
    covers = {}
    for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        top, left = y - size // 2, x - size // 2
        mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
        covers.setdefault(mask.tobytes(), []).append((y, x))
    found = dict.fromkeys(covers, 0)
    rounds = 3
    for round_number in range(rounds):
        got = np.asarray(cutout(images, jax.random.key(round_number)))
        mask = np.all(got == 0, axis=-1)
        np.testing.assert_array_equal(got, np.where(mask[..., None], 0, images))
        for one in mask:
            found[one.tobytes()] += 1
    for mask, centres in covers.items():
        expected = rounds * BATCH * len(centres) / (HEIGHT * WIDTH)
        assert abs(found[mask] - expected) <= 5 * np.sqrt(expected)


def test_cutout_of_the_mean_colour_is_nothing_once_normalised():
    mean, std = (0.4914, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)
    augment = create_augmentation("cutout", cutout_fill="mean", cutout_size=99, mean=mean)
    got = normalise(augment(jnp.asarray(images_of()), jax.random.key(0)), mean, std)
    # Whole levels: half of one, in units of the standard deviation.
    assert np.abs(got).max() < 0.5 / 255 / 0.24
    with pytest.raises(UserError, match="mean"):
        create_augmentation("cutout", cutout_fill="mean")


def test_named_options_are_the_components_options():
    images, key = jnp.asarray(images_of()), jax.random.key(4)
    augment = create_augmentation(
        " crop , cutout", crop_padding=2, crop_fill=9, cutout_size=3, cutout_fill=7
    )
    first = RandomCrop(padding=2, fill=9)(images, jax.random.fold_in(key, 0))
    expected = Cutout(size=3, fill=7)(first, jax.random.fold_in(key, 1))
    np.testing.assert_array_equal(augment(images, key), expected)


def test_defaults_are_the_published_recipes():
    images, key = jnp.asarray(images_of(7, 32, 32)), jax.random.key(4)
    got = jax.jit(create_augmentation("crop,flip,autoaugment,cutout"))(images, key)
    written_out = create_augmentation(
        "crop,flip,autoaugment,cutout",
        crop_padding=4,
        crop_fill=128,
        autoaugment_fill=128,
        cutout_size=16,
        cutout_fill=0,
    )
    np.testing.assert_array_equal(got, jax.jit(written_out)(images, key))
    assert (got.shape, got.dtype) == (images.shape, jnp.uint8)


@pytest.mark.parametrize("names", ["", "none", None])
def test_no_augmentation_is_the_identity(names):
    images = jnp.asarray(images_of(3))
    np.testing.assert_array_equal(create_augmentation(names)(images, jax.random.key(0)), images)


@pytest.mark.parametrize("name", [*AUGMENTATIONS.table, "crop,flip,autoaugment,cutout"])
def test_depends_on_the_key_alone_and_not_on_the_batch_around(name):
    images = jnp.asarray(np.repeat(images_of(1, 13, 11), 64, axis=0))
    augment = jax.jit(create_augmentation(name))
    one, again, other = (np.asarray(augment(images, jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    # Equal images in one batch are drawn for separately.
    assert len(np.unique(one, axis=0)) > 1


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("crop,flop", {}, r"'flop'.*autoaugment, crop, cutout, flip, randaugment"),
        ("crop,,flip", {}, "unknown augmentation ''"),
        ("crop,none", {}, "unknown augmentation 'none'"),
        ("flip", {"crop_padding": 4}, r"crop_padding is set \(to 4\).*flip"),
        ("none", {"cutout_size": 8}, "cutout_size"),
        ("crop", {"autoaugment_fill": 0}, "autoaugment_fill"),
        ("crop", {"crop_padding": -1}, "-1"),
        ("crop", {"crop_fill": 256}, "256"),
        ("crop", {"crop_fill": 0.5}, r"0\.5"),
        ("autoaugment", {"autoaugment_fill": -7}, "-7"),
        ("autoaugment", {"autoaugment_policy": "svhn"}, "one of cifar10, imagenet, got 'svhn'"),
        ("autoaugment", {"randaugment_magnitude": 5}, "randaugment_magnitude"),
        ("randaugment", {"randaugment_magnitude": 31}, "at most 30, got 31"),
        ("randaugment", {"randaugment_operations": 0}, "at least 1, got 0"),
        ("cutout", {"cutout_size": 0}, "0"),
        ("cutout", {"cutout_fill": "black"}, "black"),
    ],
)
def test_mistakes_are_told_in_a_sentence(names, options, message):
    with pytest.raises(UserError, match=message):
        create_augmentation(names, **options)


def test_own_augmentation_by_name():
    augment = create_augmentation("flip,dfs_jax.data.augmentation:RandomFlip")
    assert augment(jnp.asarray(images_of(3)), jax.random.key(0)).shape == (3, HEIGHT, WIDTH, 3)


def test_normalise_gives_mean_zero_and_deviation_one():
    digits = load_dataset("digits", image_size=8)
    got = np.asarray(normalise(jnp.asarray(digits.train.images), digits.mean, digits.std))
    assert got.dtype == np.float32
    # NumPy adds up strided float32 carelessly.
    got = got.astype(np.float64)
    np.testing.assert_allclose(got.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std((0, 1, 2)), 1, atol=1e-5)
    by_hand = (digits.train.images[3, 4, 5] / 255 - digits.mean) / digits.std
    np.testing.assert_allclose(got[3, 4, 5], by_hand, atol=1e-5)
