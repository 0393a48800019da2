"""Answers in the order of their examples, whatever the order in which they are known."""

import jax
import numpy as np
import pytest

from dfs_jax.inference.answers import AnswerTable, check_images
from dfs_jax.types import UserError

CLASSES = 3


def packed_of(tickets):
    """Answers that name their examples: confidence t, class t, probabilities t/10 each."""
    column = np.asarray(tickets, np.float32)[:, None]
    return np.concatenate([np.repeat(column / 10, CLASSES, 1), column, column], axis=1)


def test_order_under_random_traffic():
    """Tickets answered in random order, failures among them, over many turns of the table."""
    rng = np.random.default_rng(0)
    table, waiting, released, failed = AnswerTable(13, CLASSES), [], [], set()
    while len(released) < 200:
        n = int(rng.integers(0, table.free + 1))
        waiting += table.take(n, 0.0).tolist()
        rng.shuffle(waiting)
        answered = np.array([waiting.pop() for _ in range(int(rng.integers(0, len(waiting) + 1)))])
        for ticket in answered[answered % 7 == 3].tolist():
            table.fail(ticket, f"number {ticket}")
            failed.add(ticket)
        good = np.sort(answered[answered % 7 != 3]).astype(int)
        table.record(good, packed_of(good), int(len(good) % 3))
        released += table.release()
        assert table.free == 13 - (table.taken - table.released)
        known = [p.index for p in released]
        assert known == list(range(len(known)))
        assert not waiting or len(known) <= min(waiting)
    for p in released:
        if p.index in failed:
            assert p[1:6] == (None,) * 5
            assert p.error == f"number {p.index}"
        else:
            assert (p.predicted, p.confidence, p.error) == (p.index, p.index, None)
            np.testing.assert_allclose(p.probabilities, [p.index / 10] * CLASSES, rtol=1e-6)
            assert p.exit_index in range(3)


def test_answers_handed_on_do_not_change():
    table = AnswerTable(2, CLASSES)
    first = table.take(2, 0.0)
    table.record(first, packed_of(first), 0)
    handed = list(table.release())
    second = table.take(2, 0.0)
    table.record(second, packed_of(second), 1)
    assert [p.probabilities[0] for p in handed] == pytest.approx([0, 0.1])


def test_latency_counts_from_when_an_example_came(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 11.5)
    table = AnswerTable(3, CLASSES)
    table.record(table.take(1, 10.0), packed_of([0]), 0)
    table.record(table.take(1, 11.0), packed_of([1]), 0)
    assert [p.latency for p in table.release()] == [1.5, 0.5]


EXAMPLE = jax.ShapeDtypeStruct((2, 2, 3), np.uint8)


def test_whole_numbers_are_not_looked_through():
    images = np.zeros((5, 2, 2, 3), np.uint8)
    good, places, errors = check_images(images, EXAMPLE)
    assert good.base is images or good is images
    assert places.tolist() == list(range(5))
    assert errors == {}


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16, bool])
def test_other_types_are_no_pixels(dtype):
    good, _, errors = check_images(np.zeros((2, 2, 2, 3), dtype), EXAMPLE)
    assert len(good) == 0
    assert errors == dict.fromkeys((0, 1), f"its type is {np.dtype(dtype)}, not uint8")


def test_ragged_lists_and_other_things():
    _, places, errors = check_images([[[1], [2, 3]], np.zeros((2, 2, 3), np.uint8)], EXAMPLE)
    assert places.tolist() == [1]
    assert errors[0].startswith("it is not an array")
    for thing in (3, None, np.uint8(3)):
        with pytest.raises(UserError, match="must be an array"):
            check_images(thing, EXAMPLE)
