"""Sets that need no TFDS: digits, folders, a user's own; what is held out, and statistics."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest

from dfs_jax.data import RawDataset, Split, channel_statistics, load_dataset
from dfs_jax.data.sources import DATASETS, describe_dataset, hold_out
from dfs_jax.types import UserError
from tests.support.folders import write_two_classes


def numbered(start: int, count: int) -> Split:
    """Images of 5x7 pixels that carry their number, and labels that follow from it."""
    numbers = np.arange(start, start + count)
    images = np.zeros((count, 5, 7, 3), np.uint8)
    images[..., 0], images[..., 1] = (numbers // 256)[:, None, None], (numbers % 256)[:, None, None]
    return Split(images, (numbers % 11).astype(np.int32))


def numbers_of(split: Split) -> np.ndarray:
    numbers = split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 0, 1]
    np.testing.assert_array_equal(numbers % 11, split.labels)
    return numbers


@pytest.fixture
def own_set(monkeypatch):
    """Registers a function as a user's own set and returns its name."""

    def register(function) -> str:
        module = types.ModuleType("users_module")
        module.load = function
        monkeypatch.setitem(sys.modules, "users_module", module)
        return "users_module:load"

    return register


def raw_set(validation: Split | None = None) -> RawDataset:
    return RawDataset(numbered(0, 601), numbered(5000, 13), tuple("abcdefghijk"), validation)


def test_importing_the_room_imports_neither_tensorflow_nor_tfds_nor_scikit_learn():
    program = (
        "import sys, dfs_jax.data\n"
        "found = {'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_digits_are_split_the_same_way_always():
    digits = load_dataset("digits")
    other = load_dataset("digits", split_seed=17)
    assert digits.validation is not None
    assert other.validation is not None
    assert [len(s.labels) for s in (digits.train, digits.validation, digits.test)] == [
        1197,
        300,
        300,
    ]
    for one, two in zip(
        (digits.train, digits.validation, digits.test),
        (other.train, other.validation, other.test),
        strict=True,
    ):
        np.testing.assert_array_equal(one.images, two.images)
        np.testing.assert_array_equal(one.labels, two.labels)
    for split in (digits.validation, digits.test):
        np.testing.assert_array_equal(np.bincount(split.labels), np.full(10, 30))
    assert digits.image_shape == (32, 32, 3)
    assert digits.num_classes == 10
    assert digits.train.images.max() == 255
    assert digits.train.images.min() == 0


def test_digits_splits_hold_every_digit_once():
    from sklearn import datasets

    digits = load_dataset("digits", image_size=8)
    assert digits.validation is not None
    parts = (digits.train, digits.validation, digits.test)
    images = np.concatenate([part.images for part in parts])
    grey, labels = datasets.load_digits(return_X_y=True)
    expected = np.round(grey * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    order = np.lexsort(images[..., 0].reshape(1797, -1).T)
    wanted = np.lexsort(expected.reshape(1797, -1).T)
    np.testing.assert_array_equal(images[order][..., 0], expected[wanted])
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    got_labels = np.concatenate([part.labels for part in parts])
    np.testing.assert_array_equal(got_labels[order], labels[wanted])


@pytest.mark.parametrize(("asked", "train", "held_out"), [(0, 1497, None), (101, 1396, 101)])
def test_digits_honour_validation_examples(asked, train, held_out):
    digits = load_dataset("digits", validation_examples=asked)
    assert len(digits.train.labels) == train
    assert (digits.validation and len(digits.validation.labels)) == held_out
    assert len(digits.test.labels) == 300


def test_digits_have_no_data_dir():
    with pytest.raises(UserError, match="data_dir"):
        load_dataset("digits", data_dir="somewhere")


@pytest.mark.parametrize("own_validation", [None, numbered(601, 59)])
@pytest.mark.parametrize("count", [1, 101, 600])
def test_held_out_part_and_the_rest_are_everything(count, own_validation):
    raw = raw_set(own_validation)
    train, validation = hold_out(raw, count, split_seed=3)
    assert validation is not None
    assert len(validation.labels) == count
    everything = np.concatenate([numbers_of(train), numbers_of(validation)])
    np.testing.assert_array_equal(np.sort(everything), np.arange(601 + 59 * bool(own_validation)))


def test_held_out_part_depends_on_its_seed_alone():
    picks = [numbers_of(hold_out(raw_set(), 101, seed)[1]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(picks[0], picks[1])
    assert len(np.intersect1d(picks[0], picks[2])) < 60


def test_held_out_part_by_default(own_set):
    tenth = load_dataset(own_set(raw_set))
    assert tenth.validation is not None
    assert len(tenth.validation.labels) == 60
    kept = load_dataset(own_set(lambda: raw_set(numbered(601, 59))))
    assert kept.validation is not None
    np.testing.assert_array_equal(numbers_of(kept.validation), np.arange(601, 660))
    np.testing.assert_array_equal(numbers_of(kept.train), np.arange(601))


@pytest.mark.parametrize("count", [601, 5000, -1])
def test_validation_part_must_leave_something(own_set, count):
    with pytest.raises(UserError, match=rf"601\).*{count}"):
        load_dataset(own_set(raw_set), validation_examples=count)


def test_own_set_gets_the_options_that_it_takes(own_set):
    seen = {}

    def load(data_dir=None):
        seen["data_dir"] = data_dir
        return raw_set()

    load_dataset(own_set(load), data_dir="here")
    assert seen == {"data_dir": "here"}
    with pytest.raises(UserError, match="image_size"):
        load_dataset(own_set(load), image_size=5)


GOOD = numbered(0, 13)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ((GOOD, GOOD), "must return"),
        (7, "must return"),
        ((GOOD, (GOOD.images,), ("a",)), "must return"),
        ((GOOD, Split(GOOD.images / 255, GOOD.labels), tuple("abcdefghijk")), "test.*uint8.*float"),
        ((GOOD, Split(GOOD.images[..., :1], GOOD.labels), tuple("abcdefghijk")), r"5, 7, 1\]"),
        ((GOOD, Split(GOOD.images[:, :3], GOOD.labels), tuple("abcdefghijk")), r"\[3, 7, 3\]"),
        ((GOOD, Split(GOOD.images, GOOD.labels[:3]), tuple("abcdefghijk")), r"13 integers.*\[3\]"),
        ((GOOD, GOOD, tuple("abcdefghij")), "0 to 10"),
        ((GOOD, Split(GOOD.images, GOOD.labels - 1), tuple("abcdefghijk")), "-1 to 9"),
        ((GOOD, Split(GOOD.images[:0], GOOD.labels[:0]), tuple("abcdefghijk")), "no examples"),
    ],
)
def test_own_set_that_is_wrong_is_told_in_a_sentence(own_set, raw, message):
    with pytest.raises(UserError, match=message):
        load_dataset(own_set(lambda: raw))


def test_own_set_may_be_plain_tuples(own_set):
    dataset = load_dataset(own_set(lambda: (tuple(GOOD), tuple(GOOD), list("abcdefghijk"))))
    assert dataset.num_classes == 11
    assert dataset.train.labels.dtype == np.int32


def test_statistics_are_the_means_over_pixels():
    random = np.random.default_rng(1)
    images = random.integers(0, [50, 130, 256], (4099, 3, 2, 3)).astype(np.uint8)
    got = channel_statistics(images)
    np.testing.assert_allclose(got.mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.std, (images / 255).std((0, 1, 2)), rtol=1e-10)


def test_statistics_are_of_the_examples_trained_on(own_set):
    dataset = load_dataset(own_set(raw_set))
    assert dataset.mean == channel_statistics(dataset.train.images).mean
    # The third channel is constant: normalising must not divide by zero.
    assert dataset.std[2] == 1 / 255


def test_statistics_of_another_set_by_name(own_set):
    dataset = load_dataset(own_set(raw_set), statistics="cifar10")
    assert dataset.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-4)
    assert dataset.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-4)
    with pytest.raises(
        UserError, match=r"'cifar'.*cifar10, cifar100, efficientnet_lite, imagenet2012"
    ):
        load_dataset(own_set(raw_set), statistics="cifar")


@pytest.fixture
def folder(tmp_path):
    return write_two_classes(tmp_path)


# One row for each registered set: (image shape, classes, examples in all), read from `folder`.
DATASET_ROWS = {"digits": ((32, 32, 3), 10, 1797), "folder": ((5, 7, 3), 2, 10)}


@pytest.mark.parametrize("name", sorted(DATASETS.table))
def test_every_own_set_is_whole_and_well_formed(name, folder):
    shape, classes, examples = DATASET_ROWS[name]
    data_dir = str(folder) if name == "folder" else None
    dataset = load_dataset(name, data_dir=data_dir, validation_examples=1)
    assert dataset.image_shape == shape
    assert dataset.num_classes == classes
    splits = (dataset.train, dataset.validation, dataset.test)
    assert sum(split.num_examples for split in splits) == examples
    for split in splits:
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert split.images.shape[1:] == shape
    assert all(deviation > 0 for deviation in dataset.std)


def test_well_known_sets_are_described_without_being_there():
    cifar = describe_dataset("cifar100", image_size=48, statistics="cifar10")
    assert (cifar.num_classes, cifar.image_shape) == (100, (48, 48, 3))
    counts = [split.num_examples for split in (cifar.train, cifar.validation, cifar.test)]
    assert counts == [45_000, 5_000, 10_000]
    assert cifar.mean == describe_dataset("cifar10:3.0.2").mean
    imagenet = describe_dataset("imagenet2012", validation_examples=0)
    assert (imagenet.train.num_examples, imagenet.validation) == (1_281_167, None)
    assert describe_dataset("mnist") is None
    assert describe_dataset("digits") is None  # which is always there


def test_a_described_set_has_the_limits_of_the_set_and_nothing_to_read():
    with pytest.raises(UserError, match=r"validation_examples must lie in \[0, 50000\)"):
        describe_dataset("cifar10", validation_examples=50_000)
    train = describe_dataset("cifar10").train
    for read in (train.take, train.train_batches, train.eval_batches):
        with pytest.raises(RuntimeError, match="no images to read"):
            read(3)
