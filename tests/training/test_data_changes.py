"""Changes of sets that do not lie in files, and data sets put back into a run's order and parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dfs_jax.data import (
    Dataset,
    RawDataset,
    Split,
    StreamedSplit,
    Streaming,
    TrainSampler,
    eval_batches,
    train_batches,
)
from dfs_jax.data.dataset import ImageFile, Origin
from dfs_jax.data.deferred import DeferredSplit
from dfs_jax.data.regroup import regrouped, relabelled
from dfs_jax.training.data_changes import as_known
from dfs_jax.training.recorded import recorded_dataset
from dfs_jax.training.run_data import describe_data
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

SECTION = tiny_config().data


def examples(count, classes=3, start=0):
    """Images that carry their number, and labels that follow from it."""
    numbers = np.arange(start, start + count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 5, 7, 3)).astype(np.uint8)
    return Split(images.copy(), (numbers % classes).astype(np.int32))


def dataset(train=17, validation=5, version=None, names=("a", "b", "c")):
    statistics = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    held_out = examples(validation, start=100) if validation else None
    origin = Origin(version=version)
    return Dataset("own", examples(train), held_out, examples(7), names, *statistics, origin)


def known_as(was, now, *, accept=False):
    known = describe_data(was, SECTION)
    return as_known(now, known, workdir=Path("RUN"), section=SECTION, accept=accept)


def test_the_same_data_is_the_same():
    same = known_as(dataset(), dataset())
    assert same == dataclasses.replace(dataset(), **vars(same))
    np.testing.assert_array_equal(same.train.labels, dataset().train.labels)


CHANGED = {
    "version": (dataset(version="1.0.0"), dataset(version="2.0.0"), "version 2.0.0, it was 1.0.0"),
    "renamed": (dataset(), dataset(names=("a", "b", "x")), "class 'c' was renamed to 'x'"),
    "labels": (
        dataset(),
        dataclasses.replace(dataset(), train=examples(17, classes=2)),
        "the labels of its train split changed",
    ),
    "more": (
        dataset(validation=0),
        dataset(train=19, validation=0),
        "train split has 19 examples, it had 17",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_refused_unless_accepted(name):
    was, now, message = CHANGED[name]
    with pytest.raises(UserError, match=f"{message}; put it back .* add --accept_data_changes"):
        known_as(was, now)
    accepted = known_as(was, dataclasses.replace(now, mean=(0.9,) * 3), accept=True)
    assert accepted.mean == was.mean
    assert known_as(accepted, now).class_names == now.class_names


def test_where_held_out_examples_are_known_by_position_their_number_cannot_change():
    with pytest.raises(UserError, match="known by their position alone"):
        known_as(dataset(), dataset(train=18), accept=True)


def test_another_order_of_classes_is_put_right():
    now = dataset(names=("c", "a", "b"))
    order = {"a": 1, "b": 2, "c": 0}
    now = dataclasses.replace(
        now,
        **{
            part: relabelled(getattr(now, part), [order[name] for name in ("a", "b", "c")])
            for part in ("train", "validation", "test")
        },
    )
    same = known_as(dataset(), now)
    assert same.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(same.test.labels, dataset().test.labels)


def changed_images() -> RawDataset:
    """A user's own function whose set has grown since the run."""
    return RawDataset(examples(29), examples(11), ("a", "b", "c"))


def test_inference_reads_a_set_without_files_when_it_must_and_notices_other_sizes():
    section = tiny_config(**{"data.name": "tests.training.test_data_changes:changed_images"}).data
    was = dataclasses.replace(dataset(), name=section.name)
    recorded = recorded_dataset(describe_data(was, section), section)
    assert (recorded.class_names, recorded.mean) == (was.class_names, was.mean)
    assert recorded.test.take(np.array([1, 10])).labels.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"validation split .* has 11 examples, the run's had 5"):
        recorded.validation.take(np.arange(2))


def test_a_deferred_split_is_read_once_and_is_the_split():
    whole, reads = examples(17), []

    def read():
        reads.append(1)
        return whole

    deferred = DeferredSplit(17, (5, 7, 3), read)
    assert not reads
    sampler = TrainSampler(17, 3, seed=1)
    for batches in (
        lambda split: train_batches(split, sampler, 2, stop_step=7),
        lambda split: eval_batches(split, 4),
    ):
        for found, expected in zip(batches(deferred), batches(whole), strict=True):
            for array, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(array, other)
    rows = np.array([11, 2])
    assert deferred.part(rows).labels.tolist() == deferred.take(rows).labels.tolist() == [2, 2]
    np.testing.assert_array_equal(deferred.images, whole.images)
    np.testing.assert_array_equal(deferred.labels, whole.labels)
    assert len(reads) == 1


def test_a_deferred_split_that_is_streamed_has_no_arrays():
    deferred = DeferredSplit(17, (5, 7, 3), object)
    for name in ("images", "labels"):
        with pytest.raises(UserError, match=r"is streamed .* read it with take\(indices\)"):
            getattr(deferred, name)


def filed(dataset):
    """Gives every example a file of its own."""
    files = {
        part: tuple(
            ImageFile(f"{'test' if part == 'test' else 'train'}/{label}/{image[0, 0, 0]}", 3)
            for image, label in zip(*getattr(dataset, part), strict=True)
        )
        for part in ("train", "validation", "test")
    }
    return dataclasses.replace(dataset, origin=Origin(files))


def test_examples_move_with_their_files():
    moved = regrouped(filed(dataset()), lambda part, file: "validation" if file.size == 3 else part)
    assert moved.train is None
    for part in ("train", "test"):
        assert part not in moved.origin.files
    numbers = [int(file.path.split("/")[2]) for file in moved.origin.files["validation"]]
    assert moved.validation.images[:, 0, 0, 0].tolist() == numbers
    assert (moved.validation.labels == np.array(numbers) % 3).all()
    assert len(numbers) == 17 + 5 + 7
    assert regrouped(moved, lambda part, file: part) is moved


class Numbers:
    """Records whose label is their number, modulo 3."""

    name = "numbers"

    def __len__(self):
        return 23

    def read(self, positions):
        return [(b"", position % 3) for position in positions]


def test_streamed_examples_move_within_their_records():
    streaming, records = Streaming(4), Numbers()
    parts = {"train": np.arange(17), "validation": np.arange(17, 23)}
    splits = {part: StreamedSplit(records, streaming, rows) for part, rows in parts.items()}
    files = {
        part: tuple(ImageFile(f"train/a/{i:02}", i) for i in rows) for part, rows in parts.items()
    }
    streamed = dataclasses.replace(dataset(), **splits, origin=Origin(files))
    moved = regrouped(streamed, lambda part, file: "validation" if file.size < 3 else "train")
    assert moved.validation.indices.tolist() == [0, 1, 2]
    assert moved.train.indices.tolist() == list(range(3, 23))
    other = StreamedSplit(Numbers(), streaming, parts["validation"])
    with pytest.raises(UserError, match="lie in another directory now"):
        regrouped(dataclasses.replace(streamed, validation=other), lambda part, file: "train")
    relabelled_split = relabelled(splits["train"], (2, 0, 1))
    assert [label for _, label in relabelled_split.records.read([0, 1, 2, 3])] == [2, 0, 1, 2]
    assert relabelled_split.records.name == "numbers"
    assert len(relabelled_split.records) == 23
