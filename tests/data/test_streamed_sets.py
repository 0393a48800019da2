"""Streamed TFDS sets: read, held out, chosen by config, damaged; photographs and their cuts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_data_tfds import examples, png, write_set

from benchmarks.input_speed import decoding_speed, input_speed
from configs import imagenet_vgg16
from dfs_jax.data import Split, StreamedSplit, Streaming, TrainSampler, load_dataset, train_batches
from dfs_jax.data.photographs import Box, centre_box, cut_out, decode_photograph, random_box
from dfs_jax.data.tfds_source import exceeds_memory
from dfs_jax.training.input_config import augmentation_from_config, dataset_from_config
from dfs_jax.types import UserError

CUT = Streaming(4, ("random_resized_crop", "flip"), max_corrupt=2)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("streamed")
    # The third training image is no image; every other one is of one level, its number.
    train = [*examples(0, 2), (b"not an image", 1), *examples(3, 20)]
    splits = {"train": train, "test": examples(100, 7)}
    write_set(root / "small_set" / "1.0.0", splits, shape=(None, None, 3))
    return str(root)


def section(data_dir: str, **changes):
    config = imagenet_vgg16.get_config().data
    config.update({"name": "small_set", "data_dir": data_dir, "image_size": 4, **changes})
    return config


def test_a_tfds_set_is_streamed(data_dir):
    dataset = load_dataset("small_set", data_dir=data_dir, validation_examples=5, streaming=CUT)
    train, validation = dataset.train, dataset.validation
    assert isinstance(train, StreamedSplit)
    assert isinstance(validation, StreamedSplit)
    assert (train.num_examples, validation.num_examples, dataset.test.num_examples) == (18, 5, 7)
    assert set(train.indices) | set(validation.indices) == set(range(23))
    batches = train_batches(train, TrainSampler(18, 6, 0), stop_step=3)
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    levels = images[:, 0, 0, 0]
    assert np.all(images == levels[:, None, None, None])
    np.testing.assert_array_equal(levels % 3, labels)
    whole = set(train.indices.tolist()) - {2}
    assert set(levels.tolist()) == whole
    np.testing.assert_array_equal(
        dataset.test.take(np.arange(7)).images[:, 1, 2, 1], range(100, 107)
    )
    # Statistics of one's own come from what can be read.
    assert dataset.mean == pytest.approx((np.mean(sorted(whole)) / 255,) * 3)


def test_a_damaged_record_is_a_corrupt_image(tmp_path):
    noise = np.random.default_rng(0)  # what follows an image is passed over; it fills the file
    images = [(png(level, (60, 60)) + noise.bytes(40_000), level % 3) for level in range(9)]
    directory = write_set(
        tmp_path / "small_set" / "1.0.0", {"train": images, "test": images}, shape=(None, None, 3)
    )
    shard = next(directory.glob("*train*"))
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 255
    shard.write_bytes(contents)
    dataset = load_dataset(
        "small_set",
        data_dir=str(tmp_path),
        validation_examples=0,
        statistics="cifar10",
        streaming=CUT,
    )
    found = dataset.train.take(np.arange(9)).images[:, 0, 0, 0].tolist()
    assert len(found) == 8
    assert set(found) < set(range(9))


def test_a_config_streams_what_is_cut_at_random(data_dir):
    streamed = dataset_from_config(section(data_dir, validation_examples=1)).train
    assert isinstance(streamed, StreamedSplit)
    assert streamed.streaming == Streaming(4, ("random_resized_crop", "flip"))
    options = {"num_workers": 2, "max_corrupt": 0, "crop_area": (0.5, 1.0), "centre_fraction": 0.7}
    changed = dataset_from_config(section(data_dir, statistics="cifar10", **options)).train
    assert isinstance(changed, StreamedSplit)
    assert changed.streaming == Streaming(4, ("random_resized_crop", "flip"), **options)


def test_what_memory_holds_is_read_unless_asked_otherwise(tmp_path, monkeypatch):
    splits = {"train": examples(0, 23), "test": examples(100, 7)}
    write_set(tmp_path / "small_set" / "1.0.0", splits)
    plain = section(str(tmp_path), augmentation="flip")
    assert isinstance(dataset_from_config(plain).train, Split)
    assert isinstance(
        dataset_from_config(section(str(tmp_path), augmentation="flip", streamed=True)).train,
        StreamedSplit,
    )
    monkeypatch.setattr("dfs_jax.data.tfds_source.MAX_BYTES", 30 * 4 * 4 * 3)
    assert not exceeds_memory("small_set", str(tmp_path), 4)
    assert exceeds_memory("small_set", str(tmp_path), 5)
    monkeypatch.setattr("dfs_jax.data.tfds_source.MAX_BYTES", 1)
    assert isinstance(dataset_from_config(plain).train, StreamedSplit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streamed": False}, "random_resized_crop need.*streamed is False"),
        ({"name": "digits"}, "random_resized_crop need.*'digits'"),
        ({"name": "digits", "augmentation": "flip", "max_corrupt": 3}, "max_corrupt need"),
        ({"name": "digits", "augmentation": "flip", "streamed": True}, "cannot be streamed"),
        ({"image_size": None}, "set data.image_size"),
        ({"augmentation": "flip,random_resized_crop"}, "comes first"),
        ({"augmentation": "autoaugment,random_resized_crop"}, "comes first"),
    ],
)
def test_options_that_do_not_fit(data_dir, changes, message):
    with pytest.raises(UserError, match=message):
        dataset_from_config(section(data_dir, **changes))


def test_what_follows_the_cut_is_done_on_the_device(data_dir):
    mean = (0.5, 0.5, 0.5)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    import jax

    key = jax.random.key(0)
    nothing = augmentation_from_config(section(data_dir), mean)
    np.testing.assert_array_equal(nothing(images, key), images)
    names = "random_resized_crop,flip,cutout"
    covered = augmentation_from_config(section(data_dir, augmentation=names, cutout_size=4), mean)
    assert not np.array_equal(covered(images, key), images)


def test_random_boxes_lie_in_the_image_and_in_their_ranges():
    generator = np.random.default_rng(3)
    boxes = [random_box(generator, 251, 307, (0.08, 1.0)) for _ in range(2000)]
    top, left, tall, wide = np.array(boxes).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= 251).all()
    assert (left + wide <= 307).all()
    share, ratio = tall * wide / (251 * 307), wide / tall
    assert 0.078 < share.min() < 0.1
    assert 0.95 < share.max() <= 1
    assert 0.73 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.37


def test_a_shape_that_never_fits_takes_the_middle():
    box = random_box(np.random.default_rng(0), 10, 100, (1.0, 1.0))
    assert box == Box(0, 43, 10, 13)


def test_cuts_are_scaled_parts():
    image = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    np.testing.assert_array_equal(cut_out(image, Box(2, 3, 5, 5), 5), image[2:7, 3:8])
    average = image[2:10, 4:12].reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(cut_out(image, Box(2, 4, 8, 8), 4), average, atol=0.51)
    assert centre_box(12, 16) == Box(0, 2, 12, 12)


def test_bytes_that_are_no_image():
    whole = png(7, (20, 30))
    assert decode_photograph(whole).shape == (20, 30, 3)
    assert decode_photograph(b"") is None
    assert decode_photograph(b"not an image") is None


def test_real_photographs_arrive_the_same_from_any_step(shared_dir):
    dataset = load_dataset(
        "imagenet1k_sample",
        data_dir=str(shared_dir / "tfds"),
        statistics="imagenet2012",
        validation_examples=100,
        streaming=Streaming(32, ("random_resized_crop", "flip")),
    )
    sampler = TrainSampler(700, 50, 0)
    batches = list(itertools.islice(train_batches(dataset.train, sampler, stop_step=15), 15))
    # An epoch of 14 steps has every example once.
    seen = np.concatenate([sampler.indices(step) for step in range(14)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(700))
    resumed = list(train_batches(dataset.train, sampler, 13, stop_step=15))
    for (images, labels), (again, labels_again) in zip(batches[13:], resumed, strict=True):
        np.testing.assert_array_equal(images, again)
        np.testing.assert_array_equal(labels, labels_again)
    images = np.concatenate([images for images, _ in batches])
    assert images.mean() / 255 == pytest.approx(np.mean(dataset.mean), abs=0.05)


def test_the_input_alone_is_timed(data_dir):
    dataset = load_dataset("small_set", data_dir=data_dir, statistics="cifar10", streaming=CUT)
    assert isinstance(dataset.train, StreamedSplit)
    alone = [decoding_speed(dataset.train, cut=cut) for cut in (False, True)]
    speeds = [*input_speed(dataset, 5, 3), *alone[0], *alone[1]]
    assert all(0 < speed < np.inf for speed in speeds)
    with pytest.raises(UserError, match=r"batches.*0"):
        input_speed(dataset, 5, 0)
