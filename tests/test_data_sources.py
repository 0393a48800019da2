"""Sets that need no TFDS: digits, folders, a user's own; what is held out, and statistics."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dfs_jax.data import RawDataset, Split, channel_statistics, load_dataset
from dfs_jax.data.folder import exceeds_memory
from dfs_jax.data.sources import DATASETS, describe_dataset, hold_out
from dfs_jax.data.streaming import StreamedSplit, Streaming
from dfs_jax.types import UserError


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
    with pytest.raises(UserError, match=r"'cifar'.*cifar10, cifar100, imagenet2012"):
        load_dataset(own_set(raw_set), statistics="cifar")


@pytest.fixture
def folder(tmp_path):
    """Classes `ape` and `bee`; a train and a test split of 4 + 3 and 2 + 1 images of 7x5."""
    pattern = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    files = {
        "train/bee": ("2.png", "1.PNG", "3.bmp"),
        "train/ape": ("a.png", "b.jpg", "c.jpeg", "d.webp"),
        "test/ape": ("x.png", "y.png"),
        "test/bee": ("z.png",),
    }
    for number, (directory, names) in enumerate(files.items()):
        (tmp_path / directory).mkdir(parents=True)
        for name in names:
            image = Image.fromarray(pattern + 10 * number)
            image.save(tmp_path / directory / name)
        (tmp_path / directory / "notes.txt").write_text("not an image")
        (tmp_path / directory / ".hidden.png").write_text("not an image either")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def test_folder_reads_classes_in_sorted_order(folder):
    dataset = load_dataset("folder", data_dir=str(folder), validation_examples=0)
    assert dataset.class_names == ("ape", "bee")
    assert dataset.image_shape == (5, 7, 3)
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dataset.test.labels, [0, 0, 1])
    pattern = np.arange(5 * 7 * 3).reshape(5, 7, 3)
    np.testing.assert_array_equal(dataset.train.images[0], pattern + 10)
    np.testing.assert_array_equal(dataset.train.images[5], pattern)
    np.testing.assert_array_equal(dataset.test.images[2], pattern + 30)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_folder_takes_its_own_validation_part(folder, name):
    (folder / "test").rename(folder / name)
    (folder / "train/ape/a.png").rename(folder / name / "ape/a.png")
    as_test = load_dataset("folder", data_dir=str(folder), validation_examples=1)
    assert [len(s.labels) for s in (as_test.train, as_test.validation, as_test.test)] == [5, 1, 4]
    (folder / name).rename(folder / "test")
    (folder / name / "ape").mkdir(parents=True)
    (folder / name / "bee").mkdir()
    (folder / "test/ape/a.png").rename(folder / name / "ape/a.png")
    (folder / "train/bee/3.bmp").rename(folder / name / "bee/3.bmp")
    own = load_dataset("folder", data_dir=str(folder))
    assert [len(s.labels) for s in (own.train, own.validation, own.test)] == [5, 2, 3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_folder_makes_every_image_three_channels(folder, mode):
    image = Image.fromarray(np.full((5, 7, 3), 255, np.uint8)).convert(mode)
    image.save(folder / "train/ape/a.png" if mode != "CMYK" else folder / "train/ape/a.jpg")
    if mode == "CMYK":
        (folder / "train/ape/a.png").unlink()
    dataset = load_dataset("folder", data_dir=str(folder), validation_examples=0)
    np.testing.assert_array_equal(dataset.train.images[0], 255)


def test_folder_scales_the_shorter_side_and_cuts_the_centre_out(folder):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 200
    Image.fromarray(wide).save(folder / "train/ape/a.png")
    with pytest.raises(UserError, match=r"vary in size: 7x5 \(6\), 40x10 \(1\)"):
        load_dataset("folder", data_dir=str(folder))
    dataset = load_dataset("folder", data_dir=str(folder), image_size=5, validation_examples=0)
    assert dataset.image_shape == (5, 5, 3)
    np.testing.assert_array_equal(dataset.train.images[0, :, 1:4], 200)
    assert dataset.train.images[0].min() > 150
    # A 2:1 checkerboard is grey once it is antialiased.
    board = (np.indices((10, 10)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(folder / "train/ape/a.png")
    dataset = load_dataset("folder", data_dir=str(folder), image_size=5, validation_examples=0)
    assert np.abs(dataset.train.images[0].astype(int) - 127).max() < 20
    with pytest.raises(UserError, match=r"image_size.*0"):
        load_dataset("folder", data_dir=str(folder), image_size=0)


def test_folder_that_is_too_large_for_memory_is_refused(folder):
    assert exceeds_memory(str(folder), 60_000)
    assert not exceeds_memory(str(folder), 60)
    with pytest.raises(UserError, match=r"GiB.*data\.streamed=True"):
        load_dataset("folder", data_dir=str(folder), image_size=60_000)


def _empty(directory):
    for path in directory.iterdir():
        path.unlink()


def _truncate(folder):
    path = folder / "train/ape/b.jpg"
    path.write_bytes(path.read_bytes()[:200])


def _one_class(folder):
    shutil.rmtree(folder / "train/bee")


def _strange_class(folder):
    (folder / "test/cow").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"1 image cannot be read: .*b\.jpg \(damaged JPEG\); replace or remove"),
        (_one_class, r"train holds one class, ape: a classifier needs at least two"),
        (_strange_class, r"test holds 1 class\(es\) that train/ lacks: cow"),
        (lambda d: _empty(d / "train/bee"), r"train holds no images of the class\(es\) bee"),
        (lambda d: (d / "train/bee/2.png").write_text("no image"), r"bee/2\.png \(text\)"),
        (lambda d: (d / "test").rename(d / "other"), "no test images.*data.test_examples"),
        (lambda d: (d / "train").rename(d / "other"), "no directory .*train"),
        (lambda d: [(d / v).mkdir() for v in ("val", "validation")], "both"),
    ],
)
def test_folder_mistakes_are_told_in_a_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_dataset("folder", data_dir=str(folder))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_class_without_test_images_is_a_warning(folder, caplog, is_there):
    _empty(folder / "test/bee")
    if not is_there:
        (folder / "test/bee").rmdir()
    dataset = load_dataset("folder", data_dir=str(folder), validation_examples=0)
    assert dataset.test.labels.tolist() == [0, 0]
    assert "test has no images of bee" in caplog.text


def test_all_unreadable_images_are_told_at_once_by_what_they_are(folder, caplog):
    broken = {
        "train/ape/a.png": (b"", "empty"),
        "train/bee/2.png": (b"<!doctype html><p>not found", "HTML"),
        "test/ape/y.png": (b"%PDF-1.4", "PDF"),
        "train/ape/b.jpg": ((folder / "train/ape/b.jpg").read_bytes()[:200], "damaged JPEG"),
    }
    for path, (content, _) in broken.items():
        (folder / path).write_bytes(content)
    (folder / "test/bee/to_nowhere.png").symlink_to(folder / "absent.png")
    with pytest.raises(UserError, match="5 images cannot be read") as error:
        load_dataset("folder", data_dir=str(folder))
    for path, (_, kind) in broken.items():
        assert f"{folder / path} ({kind})" in str(error.value)
    assert "to_nowhere.png (No such file or directory)" in str(error.value)
    assert "data.max_corrupt=N" in str(error.value)
    with pytest.raises(UserError, match="5 images"):
        load_dataset("folder", data_dir=str(folder), max_corrupt=4)
    left = load_dataset("folder", data_dir=str(folder), validation_examples=0, max_corrupt=5)
    assert "5 images cannot be read and are left out" in caplog.text
    assert [left.train.num_examples, left.test.num_examples] == [4, 2]
    assert [len(left.origin.files[part]) for part in ("train", "test")] == [4, 2]
    assert [file.path for file in left.origin.left_out] == sorted(
        [*broken, "test/bee/to_nowhere.png"]
    )
    assert left.train.labels.tolist() == [0, 0, 1, 1]


def test_more_unreadable_images_than_fit_are_counted(folder):
    for i in range(30):
        (folder / f"train/ape/{i}.gif").write_bytes(b"")
    with pytest.raises(UserError, match=r"30 images cannot be read.* and 10 more; replace"):
        load_dataset("folder", data_dir=str(folder))


def test_every_ending_is_read_and_the_rest_is_told(folder, caplog):
    pattern = np.full((5, 7, 3), 90, np.uint8)
    nested = folder / "train/ape/2024/May"
    nested.mkdir(parents=True)
    for name in ("e.tif", "f.TIFF", "g.gif", "h.jfif", "i.jpe", "j.ppm"):
        kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(name.partition(".")[2])
        Image.fromarray(pattern).save(nested / name, format=kind)
    (nested / "Thumbs.db").write_bytes(b"of a system")
    (nested / "again").symlink_to(folder / "train/ape")  # a loop
    dataset = load_dataset("folder", data_dir=str(folder), validation_examples=0)
    assert dataset.train.labels.tolist() == [0] * 10 + [1] * 3
    assert "6 file(s) in nested directories, read as the class: ape/2024/May/e.tif" in caplog.text
    assert "2 file(s) passed over, no images by their ending: ape/notes.txt" in caplog.text
    assert "Thumbs" not in caplog.text


@pytest.mark.parametrize(("asked", "expected"), [(2, 2), (0.3, 2), (6, 6)])
def test_a_part_of_train_can_be_the_test(folder, asked, expected):
    shutil.rmtree(folder / "test")
    options = {"data_dir": str(folder), "validation_examples": 0, "split_seed": 3}
    one = load_dataset("folder", test_examples=asked, **options)
    assert [one.train.num_examples, one.test.num_examples] == [7 - expected, expected]
    paths = [f.path for part in ("train", "test") for f in one.origin.files[part]]
    assert len(set(paths)) == 7
    again = load_dataset("folder", test_examples=asked, **options)
    np.testing.assert_array_equal(again.test.images, one.test.images)
    other = load_dataset("folder", test_examples=asked, **{**options, "split_seed": 4})
    assert asked == 6 or other.origin.files["test"] != one.origin.files["test"]


@pytest.mark.parametrize("asked", [0, 7, -1, 1.5, 0.01, float("nan")])
def test_a_test_part_that_cannot_be(folder, asked):
    with pytest.raises(UserError, match=r"'folder' has 3: leave it unset"):
        load_dataset("folder", data_dir=str(folder), test_examples=0.5)
    shutil.rmtree(folder / "test")
    with pytest.raises(UserError, match=r"test_examples must be a fraction below 1 or a whole"):
        load_dataset("folder", data_dir=str(folder), test_examples=asked)


def test_a_streamed_folder_is_the_one_in_memory(folder):
    """Same order and labels; squares are cut from the middle and scaled by another program."""
    options = {"data_dir": str(folder), "validation_examples": 2}
    memory = load_dataset("folder", image_size=5, **options)
    streamed = load_dataset("folder", streaming=Streaming(5, centre_fraction=1.0), **options)
    assert streamed.origin == memory.origin
    for part in ("train", "validation", "test"):
        ours, other = getattr(streamed, part), getattr(memory, part)
        assert isinstance(ours, StreamedSplit)
        read = ours.take(np.arange(ours.num_examples))
        np.testing.assert_array_equal(read.labels, other.labels)
        np.testing.assert_allclose(read.images, other.images, atol=16)


def test_a_streamed_folder_with_a_validation_directory_can_be_divided_anew(folder):
    shutil.copytree(folder / "test", folder / "val")
    options = {"data_dir": str(folder), "streaming": Streaming(5)}
    own = load_dataset("folder", **options)
    assert own.validation.num_examples == 3
    whole = load_dataset("folder", validation_examples=4, **options)
    assert [whole.train.num_examples, whole.validation.num_examples] == [6, 4]


def test_unreadable_images_of_a_streamed_folder_are_named(folder):
    (folder / "train/bee/2.png").write_bytes(b"GIF89a, but no more")
    options = {"data_dir": str(folder), "statistics": "cifar10", "validation_examples": 0}
    one = load_dataset("folder", streaming=Streaming(5, max_corrupt=0), **options)
    with pytest.raises(UserError, match=r"1 images of .*: train/bee/2\.png \(GIF\); replace them"):
        one.train.take(np.arange(7))


def test_folder_needs_a_directory_that_exists(tmp_path):
    with pytest.raises(UserError, match="needs data_dir"):
        load_dataset("folder")
    with pytest.raises(UserError, match=r"nowhere.*does not exist"):
        load_dataset("folder", data_dir=str(tmp_path / "nowhere"))


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
