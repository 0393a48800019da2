"""The sampler without state, and evaluation that counts every example once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dfs_jax.data import Split, TrainSampler, eval_batches, train_batches
from dfs_jax.types import UserError


def numbered(count: int) -> Split:
    images = np.zeros((count, 3, 5, 3), np.uint8) + np.arange(count)[:, None, None, None]
    return Split(images.astype(np.uint8), np.arange(count, dtype=np.int32))


def epoch(sampler: TrainSampler, number: int) -> np.ndarray:
    first = number * sampler.steps_per_epoch
    return np.concatenate([sampler.indices(first + s) for s in range(sampler.steps_per_epoch)])


@pytest.mark.parametrize(("num_examples", "batch_size"), [(23, 5), (21, 7), (11, 11), (7, 1)])
def test_an_epoch_takes_an_example_at_most_once(num_examples, batch_size):
    sampler = TrainSampler(num_examples, batch_size, seed=3)
    assert sampler.steps_per_epoch == num_examples // batch_size
    for number in range(3):
        taken = epoch(sampler, number)
        assert len(taken) == len(np.unique(taken)) == sampler.steps_per_epoch * batch_size
        assert taken.min() >= 0
        assert taken.max() < num_examples


def test_every_epoch_has_an_order_of_its_own_and_leaves_others_out():
    sampler = TrainSampler(23, 5, seed=3)
    left_out = [tuple(sorted(set(range(23)) - set(epoch(sampler, e)))) for e in range(40)]
    assert len(set(left_out)) > 30
    assert set(itertools.chain(*left_out)) == set(range(23))
    assert not np.array_equal(epoch(sampler, 0), epoch(sampler, 1))
    assert not np.array_equal(epoch(sampler, 0), epoch(TrainSampler(23, 5, seed=4), 0))
    # (seed, epoch) and (epoch, seed) are different streams.
    assert not np.array_equal(
        epoch(TrainSampler(23, 5, seed=1), 2), epoch(TrainSampler(23, 5, seed=2), 1)
    )


def test_order_does_not_change_between_releases():
    np.testing.assert_array_equal(TrainSampler(7, 7, seed=0).indices(0), [3, 5, 4, 0, 6, 2, 1])


def test_epoch_of_a_step():
    sampler = TrainSampler(23, 5, seed=0)
    assert [sampler.epoch_of(step) for step in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_every_example_is_as_likely_as_the_others():
    sampler = TrainSampler(10, 7, seed=5)
    counts = np.bincount(np.concatenate([epoch(sampler, e) for e in range(600)]), minlength=10)
    assert np.all(np.abs(counts - 420) < 5 * np.sqrt(600 * 0.7 * 0.3))


@pytest.mark.parametrize("start", [0, 1, 4, 13, 1000])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(start):
    split, sampler = numbered(23), TrainSampler(23, 5, seed=3)
    whole = itertools.islice(train_batches(split, sampler), start, start + 9)
    resumed = itertools.islice(train_batches(split, sampler, start), 9)
    for (images, labels), (images_too, labels_too) in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(images, images_too)
        np.testing.assert_array_equal(labels, labels_too)


def test_train_batches_are_the_sampled_examples():
    split, sampler = numbered(23), TrainSampler(23, 5, seed=3)
    batches = itertools.islice(train_batches(split, sampler, 2), 7)
    for step, (images, labels) in enumerate(batches, start=2):
        np.testing.assert_array_equal(labels, sampler.indices(step))
        np.testing.assert_array_equal(images[:, 1, 2, 0], labels)
        assert images.shape == (5, 3, 5, 3)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_indices_cannot_be_changed_by_accident():
    sampler = TrainSampler(23, 5, seed=3)
    with pytest.raises(ValueError, match="read-only"):
        sampler.indices(0)[0] = 1


@pytest.mark.parametrize(("batch_size", "seed"), [(24, 0), (0, 0), (-5, 0)])
def test_batch_that_does_not_fit_is_refused_with_both_numbers(batch_size, seed):
    with pytest.raises(UserError, match=rf"{batch_size}.*23"):
        TrainSampler(23, batch_size, seed)


def test_negative_seed_is_refused():
    with pytest.raises(UserError, match="-1"):
        TrainSampler(23, 5, -1)


def test_sampler_of_another_set_is_refused():
    with pytest.raises(ValueError, match=r"24.*23"):
        next(train_batches(numbered(23), TrainSampler(24, 5, 0)))


@pytest.mark.parametrize(("count", "batch_size"), [(23, 5), (20, 5), (3, 7), (7, 7), (7, 1)])
def test_evaluation_counts_every_example_once(count, batch_size):
    split = numbered(count)
    seen = []
    for images, labels, mask in eval_batches(split, batch_size):
        assert images.shape == (batch_size, 3, 5, 3)
        assert labels.shape == mask.shape == (batch_size,)
        assert (images.dtype, labels.dtype, mask.dtype) == (np.uint8, np.int32, np.bool_)
        assert mask.any()
        np.testing.assert_array_equal(images[mask, 0, 0, 0], labels[mask])
        seen += labels[mask].tolist()
    assert seen == list(range(count))


def test_evaluation_needs_a_batch_size():
    with pytest.raises(UserError, match="0"):
        next(eval_batches(numbered(3), 0))
