"""TFDS sets without TensorFlow: reading, looking for them, and what is said where they are not."""

from __future__ import annotations

import importlib.util
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfs_jax.data import load_dataset
from dfs_jax.data.statistics import NAMED_STATISTICS, channel_statistics
from dfs_jax.data.tfds_source import parse_name
from dfs_jax.types import UserError

NAMES = ("cat", "ant", "bee")


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """As on a machine without TensorFlow, whatever this one has."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "tensorflow" else find_spec(name),
    )


def png(level: int, size: tuple[int, int] = (5, 7), mode: str = "RGB") -> bytes:
    contents = io.BytesIO()
    Image.new("L", size[::-1], level).convert(mode).save(contents, "PNG")
    return contents.getvalue()


def write_set(
    directory: Path,
    splits: dict[str, list[tuple[bytes, int]]],
    *,
    shape: tuple[int | None, int | None, int] = (5, 7, 3),
    file_format: str = "array_record",
    name: str = "small_set",
    keys: tuple[str, str] = ("image", "label"),
) -> Path:
    """Writes a prepared set as TFDS does, with one more feature than is read."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            keys[0]: tfds.features.Image(shape=shape),
            keys[1]: tfds.features.ClassLabel(names=list(NAMES)),
        }
    )
    features.save_config(directory)
    for split, examples in splits.items():
        shard = directory / f"{name}-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(shard), "group_size:1")
        for number, (image, label) in enumerate(examples):
            example = proto.Example()
            feature = example.features.feature
            feature["id"].bytes_list.value.append(f"example {number}".encode())
            feature[keys[0]].bytes_list.value.append(image)
            feature[keys[1]].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
    info = {
        "name": name,
        "version": directory.name,
        "fileFormat": file_format,
        "splits": [
            {
                "name": split,
                "shardLengths": [str(len(examples))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, examples in splits.items()
        ],
    }
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


def examples(start: int, count: int) -> list[tuple[bytes, int]]:
    return [(png(level), level % 3) for level in range(start, start + count)]


TWO_SPLITS = {"train": examples(0, 23), "test": examples(100, 7)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    write_set(root / "small_set" / "1.0.0", TWO_SPLITS)
    return root


def levels(split) -> np.ndarray:
    found = split.images[:, 0, 0, 0]
    assert np.all(split.images == found[:, None, None, None])
    np.testing.assert_array_equal(found % 3, split.labels)
    return found


def test_reads_every_split_in_order(data_dir):
    dataset = load_dataset("small_set", data_dir=str(data_dir), validation_examples=0)
    assert dataset.image_shape == (5, 7, 3)
    assert dataset.class_names == NAMES
    np.testing.assert_array_equal(levels(dataset.train), np.arange(23))
    np.testing.assert_array_equal(levels(dataset.test), np.arange(100, 107))
    assert dataset.validation is None
    assert dataset.mean == pytest.approx((11 / 255,) * 3)


@pytest.mark.parametrize("where", ["small_set/1.0.0", "."])
def test_data_dir_may_be_the_prepared_directory(data_dir, where):
    dataset = load_dataset("small_set", data_dir=str(data_dir / where))
    assert len(dataset.test.labels) == 7


def test_default_data_dir_is_tfdss(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load_dataset("small_set").test.labels) == 7


def test_newest_version_unless_one_is_named(tmp_path):
    for version, count in (("1.9.0", 3), ("1.10.0", 5), ("0.9.9", 7)):
        splits = {"train": examples(0, 4), "test": examples(0, count)}
        write_set(tmp_path / "small_set" / version, splits)
    (tmp_path / "small_set" / "2.0.0").mkdir()
    newest = load_dataset("small_set", data_dir=str(tmp_path))
    named = load_dataset("small_set:1.9.0", data_dir=str(tmp_path))
    assert (len(newest.test.labels), len(named.test.labels)) == (5, 3)
    assert (newest.origin.version, named.origin.version) == ("1.10.0", "1.9.0")


def test_known_sets_are_known_with_a_version_too(tmp_path):
    splits = {"train": examples(0, 23), "test": examples(0, 7)}
    write_set(tmp_path / "cifar100" / "3.0.2", splits, name="cifar100")
    dataset = load_dataset("cifar100:3.0.2", data_dir=str(tmp_path), validation_examples=5)
    assert dataset.mean == NAMED_STATISTICS["cifar100"].mean
    # Too few to hold the usual 5,000 out.
    with pytest.raises(UserError, match=r"23\).*5000"):
        load_dataset("cifar100", data_dir=str(tmp_path))


def test_configurations(tmp_path):
    write_set(tmp_path / "small_set" / "red" / "1.0.0", TWO_SPLITS)
    assert len(load_dataset("small_set", data_dir=str(tmp_path)).test.labels) == 7
    write_set(tmp_path / "small_set" / "blue" / "1.0.0", TWO_SPLITS)
    assert len(load_dataset("small_set/blue", data_dir=str(tmp_path)).test.labels) == 7
    with pytest.raises(UserError, match=r"small_set/blue, small_set/red"):
        load_dataset("small_set", data_dir=str(tmp_path))


def test_own_validation_part_and_the_test_set(tmp_path):
    three = {**TWO_SPLITS, "validation": examples(50, 5)}
    write_set(tmp_path / "small_set" / "1.0.0", three)
    dataset = load_dataset("small_set", data_dir=str(tmp_path))
    assert dataset.validation is not None
    np.testing.assert_array_equal(levels(dataset.validation), np.arange(50, 55))
    np.testing.assert_array_equal(levels(dataset.test), np.arange(100, 107))


@pytest.mark.parametrize("unlabelled_test", [False, True])
def test_validation_is_the_test_set_where_there_is_no_labelled_one(tmp_path, unlabelled_test):
    splits = {"train": examples(0, 23), "validation": examples(50, 5)}
    if unlabelled_test:
        splits["test"] = [(png(1), -1), (png(2), -1)]
    write_set(tmp_path / "small_set" / "1.0.0", splits)
    dataset = load_dataset("small_set", data_dir=str(tmp_path), validation_examples=4)
    np.testing.assert_array_equal(levels(dataset.test), np.arange(50, 55))
    assert dataset.validation is not None
    everything = np.concatenate([levels(dataset.train), levels(dataset.validation)])
    np.testing.assert_array_equal(np.sort(everything), np.arange(23))


def test_grey_images_and_other_keys(tmp_path):
    splits = {k: [(png(9, mode="L"), 1)] * 3 for k in ("train", "test")}
    write_set(tmp_path / "small_set" / "1.0.0", splits, shape=(5, 7, 1), keys=("photo", "kind"))
    dataset = load_dataset("small_set", data_dir=str(tmp_path))
    assert dataset.image_shape == (5, 7, 3)
    np.testing.assert_array_equal(dataset.test.images, 9)


def test_varying_sizes_need_image_size(tmp_path):
    splits = {k: [(png(9, (5, 7)), 1), (png(9, (11, 3)), 1)] for k in ("train", "test")}
    write_set(tmp_path / "small_set" / "1.0.0", splits, shape=(None, None, 3))
    with pytest.raises(UserError, match=r"size: 7x5 \(1\), 3x11 \(1\); set data.image_size"):
        load_dataset("small_set", data_dir=str(tmp_path))
    dataset = load_dataset("small_set", data_dir=str(tmp_path), image_size=4)
    assert dataset.image_shape == (4, 4, 3)


def test_absent_set_is_told_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"requirements-prepare.txt.*prepare cifar10 --data_dir="):
        load_dataset("cifar10", data_dir=str(tmp_path))
    # TFDS is imported by now: what is left has to be quick.
    start = time.monotonic()
    with pytest.raises(UserError, match=r"prepare imagenet2012 --data_dir="):
        load_dataset("imagenet2012", data_dir=str(tmp_path))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifer10", r"cifer10.*did you mean cifar10"),
        ("digit", r"did you mean .*digits"),
        ("zzzzqqqq", r"unknown data set 'zzzzqqqq'"),
        ("../cifar10", "is not a data set name"),
        ("cifar10:three", "there is no module"),
        ("", "is not a data set name"),
    ],
)
def test_unknown_names(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_dataset(name, data_dir=str(tmp_path))


def test_data_dir_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*does not exist"):
        load_dataset("cifar10", data_dir=str(tmp_path / "nowhere"))


def test_data_dir_of_another_set(data_dir):
    with pytest.raises(UserError, match=r"holds the data set 'small_set', not 'cifar10'"):
        load_dataset("cifar10", data_dir=str(data_dir / "small_set/1.0.0"))


def test_tfrecord_format_is_told_with_the_command(tmp_path):
    write_set(tmp_path / "small_set" / "1.0.0", TWO_SPLITS, file_format="tfrecord")
    with pytest.raises(UserError, match=r"tfrecord format.*`python -m dfs_jax.data.prepare small_"):
        load_dataset("small_set", data_dir=str(tmp_path))


def test_set_without_labels_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    directory = write_set(tmp_path / "small_set" / "1.0.0", TWO_SPLITS)
    tfds.features.FeaturesDict({"image": tfds.features.Image()}).save_config(directory)
    with pytest.raises(UserError, match=r"not one of images with one label.*image"):
        load_dataset("small_set", data_dir=str(tmp_path))


def test_set_without_a_test_split_is_refused(tmp_path):
    write_set(tmp_path / "small_set" / "1.0.0", {"train": examples(0, 3)})
    with pytest.raises(UserError, match="it has train"):
        load_dataset("small_set", data_dir=str(tmp_path))


def _shard(directory: Path) -> Path:
    return next(directory.glob("*train*"))


def _cut(directory: Path) -> None:
    contents = _shard(directory).read_bytes()
    _shard(directory).write_bytes(contents[: len(contents) // 2])


def _flip(directory: Path) -> None:
    contents = bytearray(_shard(directory).read_bytes())
    contents[200] ^= 255
    _shard(directory).write_bytes(contents)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: _shard(d).unlink(),
        lambda d: _shard(d).write_bytes(b""),
        _cut,
        _flip,
        lambda d: (d / "features.json").unlink(),
        lambda d: (d / "dataset_info.json").write_text("{"),
    ],
    ids=["missing", "empty", "cut", "flip", "features", "info"],
)
def test_damaged_sets_are_told_in_a_sentence(tmp_path, damage):
    directory = write_set(tmp_path / "small_set" / "1.0.0", TWO_SPLITS)
    damage(directory)
    with pytest.raises(UserError, match="damaged"):
        load_dataset("small_set", data_dir=str(tmp_path))


def test_damaged_image_is_named(tmp_path):
    splits = {"train": examples(0, 3), "test": [*examples(0, 2), (b"not an image", 1)]}
    write_set(tmp_path / "small_set" / "1.0.0", splits)
    with pytest.raises(UserError, match=r"1 image cannot be read: 2 of small_set test \(text\)"):
        load_dataset("small_set", data_dir=str(tmp_path))


def test_parse_name():
    assert parse_name("cifar10") == ("cifar10", None)
    assert parse_name("cifar10:3.0.2") == ("cifar10", "3.0.2")


def test_real_photographs(shared_dir):
    dataset = load_dataset(
        "imagenet1k_sample",
        data_dir=str(shared_dir / "tfds"),
        image_size=32,
        statistics="imagenet2012",
        validation_examples=100,
    )
    assert dataset.validation is not None
    sizes = [len(s.labels) for s in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [700, 100, 200]
    assert dataset.num_classes == 1000
    assert dataset.mean == (0.485, 0.456, 0.406)
    np.testing.assert_allclose(
        channel_statistics(dataset.test.images).mean, dataset.mean, atol=0.05
    )


@pytest.mark.slow
def test_cifar10s_statistics_are_those_of_the_table(shared_dir):
    cifar10 = load_dataset("cifar10", data_dir=str(shared_dir / "tfds"), validation_examples=0)
    assert cifar10.train.images.shape == (50_000, 32, 32, 3)
    assert cifar10.test.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(cifar10.test.labels), np.full(10, 1000))
    measured = channel_statistics(cifar10.train.images)
    # These images were compressed once more, which costs some contrast.
    np.testing.assert_allclose(measured.mean, NAMED_STATISTICS["cifar10"].mean, atol=1e-3)
    np.testing.assert_allclose(measured.std, NAMED_STATISTICS["cifar10"].std, atol=2e-3)
