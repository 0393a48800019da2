"""The stream: order, merged batches, deadlines, backpressure, poison, and memory that stays."""

import itertools
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dfs_jax.inference.pipeline import Engine
from dfs_jax.inference.policy import Policy, last_exit_only
from dfs_jax.inference.timing import StageTimes
from dfs_jax.types import UserError
from tests.support.stage_examples import CLASSES, EXITS, SHAPE, images, make_predictor, simulated

POLICY = Policy((0.83, 0.79))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(POLICY)


def recorded_runs(predictor, monkeypatch):
    """Returns a list that fills with the stage and the batch size of every run."""
    runs, run = [], predictor.programs.run

    def record(k, carry):
        runs.append((k, len(carry[0])))
        return run(k, carry)

    monkeypatch.setattr(predictor.programs, "run", record)
    return runs


@pytest.mark.parametrize("sizes", [[50], [1] * 23, [7] * 5, [3, 11, 2, 0, 29, 5], [20, 20], []])
@pytest.mark.parametrize("in_flight", [7, 16, None])
def test_equals_the_simulated_policy_in_order(predictor, sizes, in_flight):
    batch = images(sum(sizes), seed=len(sizes))
    parts = np.split(batch, np.cumsum(sizes)[:-1]) if sizes else []
    got = list(predictor.stream(iter(parts), max_wait=None, max_in_flight=in_flight))
    assert [p.index for p in got] == list(range(len(batch)))
    if not sizes:
        return
    taken, predicted, probabilities, confidence = simulated(POLICY, batch)
    assert [p.exit_index for p in got] == taken.tolist()
    assert [p.predicted for p in got] == predicted.tolist()
    np.testing.assert_allclose([p.probabilities for p in got], probabilities, atol=1e-6)
    np.testing.assert_allclose([p.confidence for p in got], confidence, atol=1e-6)
    assert all(p.latency > 0 and p.error is None for p in got)


def test_deep_stages_run_full(predictor, monkeypatch):
    runs = recorded_runs(predictor, monkeypatch)
    n = 210
    taken = simulated(POLICY, images(n))[0]
    list(predictor.stream(np.split(images(n), 42), max_wait=None))  # batches of 5
    for k in range(EXITS):
        reached = int((taken >= k).sum())
        full = [size for stage, size in runs if stage == k and size == 7]
        # What is left over runs at the end, or while somebody is waited for.
        assert len(full) >= reached // 7 - 2
    assert sum(1 for _, size in runs if size == 7) > 0.8 * len(runs)


def test_what_is_left_over_runs_in_shapes_that_it_fills(monkeypatch):
    predictor = make_predictor(last_exit_only(EXITS), batch_size=256, shapes=(1, 32, 256))
    predictor.warm_up()
    runs = recorded_runs(predictor, monkeypatch)
    assert predictor(images(70)).errors == {}
    # 32 at a time where 256 would be mostly padding, and the last 6 are too few for 32.
    for k in range(EXITS):
        assert [size for stage, size in runs if stage == k] == [32, 32, *[1] * 6]


NEXT_RUNS = {1: 1, 2: 2, 3: 3, 5: 4, 8: 8, 9: 9, 20: 16, 24: 24, 25: 25, 40: 32, 52: 52, 195: 128}
NEXT_RUNS |= {205: 205, 256: 256}


@pytest.mark.parametrize("n", NEXT_RUNS)
def test_a_run_takes_all_or_fills_a_shape(n):
    shapes = (1, 4, 16, 32, 64, 128, 256)
    engine = Engine(None, None, shapes, None, None)  # type: ignore[arg-type]
    assert engine.next_run(n) == NEXT_RUNS[n]


def test_nobody_is_held_up_for_longer_than_the_wait(predictor):
    """A source that stalls: what was read is answered meanwhile, though no batch is full."""
    stalled, go_on = threading.Event(), threading.Event()

    def source():
        yield images(5)
        stalled.set()
        go_on.wait(timeout=30)
        yield images(2)

    stream = predictor.stream(source(), max_wait=0.05)
    first = list(itertools.islice(stream, 5))
    assert stalled.is_set()
    assert not go_on.is_set()
    assert [p.index for p in first] == list(range(5))
    assert max(p.latency for p in first) < 10
    go_on.set()
    assert [p.index for p in stream] == [5, 6]


def test_few_examples_under_way(predictor):
    """The source is read only a little ahead of the answers that are taken."""
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield images(7, seed=i)

    stream = predictor.stream(source(), max_wait=None, max_in_flight=14)
    for taken in range(70):
        next(stream)
        # 14 under way, a batch in hand, two in the queue, one that waits to get in.
        assert 7 * len(read) <= taken + 1 + 14 + 4 * 7
    stream.close()
    before = len(read)
    time.sleep(0.3)
    assert len(read) <= before + 1


def test_poison_in_the_stream(predictor):
    batches = [images(5), list(images(5, 1)), np.zeros((2, 9, 9, 3)), images(3, 2)]
    batches[0][3, 0, 0, 1] = np.nan
    batches[1][0] = None
    got = list(predictor.stream(batches))
    assert [p.index for p in got] == list(range(15))
    errors = {p.index: p.error for p in got if p.error}
    assert errors == {
        3: "a pixel is not a finite number",
        5: "its shape is [], not [2, 1, 3]",
        10: "its shape is [9, 9, 3], not [2, 1, 3]",
        11: "its shape is [9, 9, 3], not [2, 1, 3]",
    }
    for p in got:
        assert (p.predicted is None) == (p.latency is None) == (p.index in errors)
    clean = np.concatenate([images(5), images(5, 1), images(3, 2)])
    expected = predictor(np.delete(clean, [3, 5], axis=0))
    answered = [p for p in got if p.error is None]
    assert [p.predicted for p in answered] == expected.predicted.tolist()
    assert [p.exit_index for p in answered] == expected.exit_index.tolist()


def test_a_source_that_fills_the_same_array_again(predictor):
    def source():
        batch = np.empty((5, *SHAPE), np.float32)
        for seed in range(6):
            batch[:] = images(5, seed)
            yield batch
        batch[:] = np.nan

    got = [p.predicted for p in predictor.stream(source())]
    expected = predictor(np.concatenate([images(5, seed) for seed in range(6)]))
    assert got == expected.predicted.tolist()


def test_a_failing_source_fails_after_its_answers(predictor):
    def source():
        yield images(5)
        raise OSError("the disk is gone")

    stream = predictor.stream(source())
    assert len(list(itertools.islice(stream, 5))) == 5
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    with pytest.raises(UserError, match=r"must be an array .* got 3"):
        list(predictor.stream([3]))


def test_the_whole_network_runs_where_it_is_faster():
    predictor = make_predictor(last_exit_only(EXITS), fall_back=True)
    predictor.warm_up()
    predictor.times = {7: StageTimes(7, (1.0, 1.0, 1.0), 1.0)}
    got = list(predictor.stream([images(11), images(5, 1)]))
    assert predictor.counts.whole == 16
    expected = simulated(last_exit_only(EXITS), np.concatenate([images(11), images(5, 1)]))
    assert [p.predicted for p in got] == expected[1].tolist()
    assert {p.exit_index for p in got} == {EXITS - 1}


STATM = Path("/proc/self/statm")


def resident_bytes():
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not STATM.exists(), reason="memory in use is read from Linux's /proc")
def test_many_examples_take_constant_memory():
    """100,000 examples, whose answers alone would take 20 MB if all were kept."""
    predictor = make_predictor(POLICY, batch_size=256, shapes=(1, 256))
    batch = images(1000)
    counts = np.zeros(CLASSES, int)
    memory = []
    for i, p in enumerate(predictor.stream(itertools.repeat(batch, 100), max_wait=None)):
        counts[p.predicted] += 1
        if i in (20_000, 99_999):
            memory.append(resident_bytes())
    assert counts.sum() == 100_000
    np.testing.assert_array_equal(counts % 100, 0)
    assert memory[1] - memory[0] < 4 << 20


def test_mistakes(predictor):
    with pytest.raises(UserError, match="max_in_flight must be a whole number of at least 7"):
        predictor.stream([], max_in_flight=5)
    with pytest.raises(UserError, match="max_wait must be at least 0 seconds, got -1"):
        predictor.stream([], max_wait=-1)
