"""Sets on disk: the same batches for any workers, processes and start; corrupt images; cuts."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from dfs_jax.data import StreamedSplit, Streaming, TrainSampler, eval_batches, train_batches
from dfs_jax.data.streaming import FLIP, RANDOM_CUT
from dfs_jax.types import UserError

COUNT, BATCH, SIZE = 23, 6, 5
CUT_AND_FLIP = Streaming(SIZE, (RANDOM_CUT, FLIP))


def photograph(number: int) -> bytes:
    """A photograph whose every pixel and whose size differ from the others'."""
    generator = np.random.default_rng(number)
    shape = generator.integers(7, 19, 2)
    contents = io.BytesIO()
    pixels = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(contents, "PNG")
    return contents.getvalue()


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Numbered photographs, some of them damaged; the label is the number."""

    damaged: tuple[int, ...] = ()
    name: str = "photographs"

    def __len__(self) -> int:
        return COUNT

    def describe(self, position: int) -> str:
        return str(position)

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        return [(b"" if p in self.damaged else photograph(p), p) for p in positions]


def split(streaming: Streaming = CUT_AND_FLIP, damaged: tuple[int, ...] = ()) -> StreamedSplit:
    return StreamedSplit(InMemory(damaged), streaming)


def sampler(seed: int = 3) -> TrainSampler:
    return TrainSampler(COUNT, BATCH, seed)


def first(count: int, of: StreamedSplit, start: int = 0, **part) -> list:
    batches = train_batches(of, sampler(), start, **part)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(one: list, two: list) -> None:
    assert len(one) == len(two)
    for (images, labels), (images_too, labels_too) in zip(one, two, strict=True):
        np.testing.assert_array_equal(images, images_too)
        np.testing.assert_array_equal(labels, labels_too)


@pytest.fixture(scope="module")
def whole() -> list:
    return first(9, split())


def test_every_step_has_the_sampled_examples(whole):
    for step, (images, labels) in enumerate(whole):
        np.testing.assert_array_equal(labels, sampler().indices(step))
        assert images.shape == (BATCH, SIZE, SIZE, 3)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("start", [1, 2, 5])
def test_resuming_at_any_step_is_exact(whole, start):
    assert_same(whole[start:], first(9 - start, split(), start))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(whole, workers):
    by_processes = split(dataclasses.replace(CUT_AND_FLIP, num_workers=workers))
    assert_same(whole[2:], first(7, by_processes, 2))


def test_the_parts_of_several_processes_are_the_batch(whole):
    halves = np.split(np.arange(BATCH), 2)
    parts = [first(4, split(), 3, rows=rows) for rows in halves]
    joined = [
        tuple(map(np.concatenate, zip(*both, strict=True))) for both in zip(*parts, strict=True)
    ]
    assert_same(whole[3:7], joined)


def test_the_parts_of_a_set_in_memory_are_the_batch_too():
    data = split().take(np.arange(COUNT))
    _, labels = next(train_batches(data, sampler(), 2, rows=np.array([2, 3])))
    np.testing.assert_array_equal(labels, sampler().indices(2)[2:4])


def test_an_example_is_cut_differently_in_every_epoch(whole):
    cuts = {}
    for images, labels in whole:
        for image, label in zip(images, labels, strict=True):
            cuts.setdefault(int(label), []).append(image)
    twice = [pair for pair in cuts.values() if len(pair) > 1]
    assert len(twice) > 10
    assert not any(np.array_equal(pair[0], pair[1]) for pair in twice)


def test_a_cut_depends_on_seed_epoch_and_example_alone(whole):
    """Another batch size gives an example the same cut in the same epoch, wherever it falls."""
    cuts = {
        int(label): image
        for images, labels in whole[:3]
        for image, label in zip(images, labels, strict=True)
    }
    other = train_batches(split(), TrainSampler(COUNT, 11, 3))
    images, labels = next(other)
    other.close()
    shared = [k for k, label in enumerate(labels.tolist()) if label in cuts]
    assert len(shared) > 5
    for k in shared:
        np.testing.assert_array_equal(images[k], cuts[int(labels[k])])


def test_flips_mirror_half_of_the_images():
    plain, flipped = split(Streaming(SIZE)), split(Streaming(SIZE, (FLIP,)))
    mirrored = 0
    for (images, _), (images_too, _) in zip(first(9, plain), first(9, flipped), strict=True):
        for one, two in zip(images, images_too, strict=True):
            is_same = np.array_equal(one, two)
            assert is_same or np.array_equal(one[:, ::-1], two)
            mirrored += not is_same
    assert 54 / 2 - 3 * 3.7 < mirrored < 54 / 2 + 3 * 3.7


@pytest.mark.parametrize("batch_size", [1, 7, COUNT, 30])
def test_evaluation_sees_every_example_once_in_order(batch_size):
    seen, together = [], []
    for images, labels, mask in eval_batches(split(), batch_size):
        assert images.shape == (batch_size, SIZE, SIZE, 3)
        assert images.dtype == np.uint8
        seen += labels[mask].tolist()
        together.append(images[mask])
    assert seen == list(range(COUNT))
    np.testing.assert_array_equal(np.concatenate(together), split().take(np.arange(COUNT)).images)


def test_several_processes_evaluate_every_example_once():
    """27 examples in batches of 10: of the last one the second process has nothing."""
    seen = []
    for rows in np.split(np.arange(10), 2):
        parts = [eval_batches(of, 10, rows) for of in (split(), split().take(np.arange(COUNT)))]
        for streamed, in_memory in zip(*parts, strict=True):
            assert_same([streamed[:2]], [in_memory[:2]])
            np.testing.assert_array_equal(streamed[2], in_memory[2])
            seen += streamed[1][streamed[2]].tolist()
    assert sorted(seen) == list(range(COUNT))


def test_a_part_holds_the_asked_examples():
    some = split().part(np.array([5, 2, 19])).part(np.array([2, 0]))
    assert some.num_examples == 2
    np.testing.assert_array_equal(some.take(np.array([1, 0])).labels, [5, 19])


def test_corrupt_images_are_replaced_in_place_and_named(whole, caplog):
    damaged = (4, 5, 11)
    with caplog.at_level(logging.WARNING):
        batches = first(9, split(damaged=damaged))
    for step, ((images, labels), (images_too, labels_too)) in enumerate(
        zip(whole, batches, strict=True)
    ):
        for k, label in enumerate(labels.tolist()):
            expected = {4: 6, 5: 6, 11: 12}.get(label, label)
            assert labels_too[k] == expected, step
            if expected == label:
                np.testing.assert_array_equal(images[k], images_too[k])
    named = [record.getMessage() for record in caplog.records]
    assert sorted(int(message.split()[1]) for message in named) == list(damaged)
    assert all("of photographs cannot be read" in message for message in named)


def test_corrupt_images_are_not_evaluated():
    (batch,) = eval_batches(split(damaged=(0, 7)), COUNT + 2)
    np.testing.assert_array_equal(batch[1][batch[2]], np.delete(np.arange(COUNT), [0, 7]))
    assert not batch[2][[0, 7, COUNT]].any()
    assert split(damaged=(1,)).take(np.arange(3)).labels.tolist() == [0, 2]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_corrupt_images_stop_the_run(workers):
    limited = Streaming(SIZE, max_corrupt=2, num_workers=workers)
    with pytest.raises(UserError, match=r"of photographs cannot be read, more than max_corrupt 2"):
        first(9, split(limited, damaged=(3, 5, 13)))
    assert len(first(9, split(limited, damaged=(3, 13)))) == 9


def test_nothing_readable_stops_with_the_same_sentence():
    with pytest.raises(UserError, match="max_corrupt 1:"):
        first(1, split(Streaming(SIZE, max_corrupt=1), damaged=tuple(range(COUNT))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size.*0"),
        ({"image_size": 5, "crop_area": (0.5, 0.2)}, r"crop_area.*\(0.5, 0.2\)"),
        ({"image_size": 5, "crop_area": (0.0, 0.2)}, "crop_area"),
        ({"image_size": 5, "centre_fraction": 1.5}, "centre_fraction.*1.5"),
        ({"image_size": 5, "num_workers": -1}, "num_workers.*-1"),
        ({"image_size": 5, "max_corrupt": -7}, "max_corrupt.*-7"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Streaming(**options)
