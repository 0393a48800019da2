"""Folders of images: classes, splits, formats, what cannot be read, and streaming."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfs_jax.data import load_dataset
from dfs_jax.data.folder import exceeds_memory
from dfs_jax.data.streaming import StreamedSplit, Streaming
from dfs_jax.types import UserError
from tests.support.folders import write_folder, write_two_classes


@pytest.fixture
def folder(tmp_path):
    return write_two_classes(tmp_path)


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


@pytest.mark.parametrize("forbidden", ["train", "train/ape", "test/bee"])
def test_a_directory_that_cannot_be_listed_is_named(folder, monkeypatch, forbidden):
    def refusing(original):
        def listing(path="."):
            if Path(path) == folder / forbidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path)

        return listing

    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    with pytest.raises(UserError, match=f"directory .*{forbidden}: Permission denied; make it"):
        load_dataset("folder", data_dir=str(folder), validation_examples=0)


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


def test_images_behind_links_count_towards_memory(tmp_path, monkeypatch):
    write_folder(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "real" / "train")
    monkeypatch.setattr("dfs_jax.data.folder.MAX_BYTES", 0)
    assert exceeds_memory(str(tmp_path / "linked"), 8)
