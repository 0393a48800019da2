"""The benchmark's measuring: contenders that answer alike, turns, medians, and rows by hand."""

import json

import numpy as np
import pytest

from benchmarks.inference import speed as speed_module
from benchmarks.inference.candidates import Candidate, oracle_exits
from benchmarks.inference.rows import limits, table, to_json
from benchmarks.inference.rows import row_of as benchmark_row
from benchmarks.inference.speed import EarlyExits, OneProgram, Speed, race
from benchmarks.inference.speed_plots import plot_speed
from dfs_jax.inference.fitting import PolicyOutcome
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.timing import StageTimes
from tests.support.stage_examples import EXAMPLE, STAGES, images, make_predictor

POLICY = Policy((0.83, 0.79))


def test_a_program_up_to_an_exit_is_that_exit():
    asked = make_predictor(Policy((None, -1e8)))
    contender = OneProgram(STAGES[:2], EXAMPLE)
    got = contender._programs.run_whole(images(5))[:, :-2]
    np.testing.assert_allclose(got, asked(images(5)).probabilities, atol=1e-6)
    latencies = contender.answer(images(5))
    assert latencies.shape == (5,)
    assert latencies[0] > 0
    assert len(set(latencies.tolist())) == 1


class Recorder:
    """A contender whose clock says how long it takes."""

    def __init__(self, clock, name, seconds):
        self.clock, self.name, self.seconds, self.asked = clock, name, list(seconds), []

    def go_through(self, images, batch):
        self.clock.order.append(self.name)
        self.asked.append((len(images), batch))
        self.clock.now += self.seconds.pop(0)

    def answer(self, images):
        return np.arange(len(images)) + 0.5


class Clock:
    def __init__(self):
        self.now, self.order = 0.0, []

    def seconds_of(self, run):
        start = self.now
        run()
        return self.now - start


def test_all_take_turns_and_medians_count(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed_module, "seconds_of", clock.seconds_of)
    measured = iter([(3.0, 1.0), (1.0, 5.0), (2.0, 9.0)])
    stage_times = lambda batch, *, rounds: StageTimes(batch, next(measured), 7.0)  # noqa: E731
    # a runs before the first and after each: its own turn is the second, third and second time
    a = [14, 28, 42, 14, *(7, 70, 7, 21), *(14, 28, 70, 14)]
    contenders = [Recorder(clock, "a", a), Recorder(clock, "b", [7, 2.8, 14])]
    speeds, (times,) = race(contenders, [stage_times], images(14), batch=7, rounds=3)
    assert "".join(clock.order) == "aaaba" + "abaaa" + "aaaba"
    assert contenders[1].asked == [(14, 7)] * 3
    assert [s.seconds for s in speeds] == pytest.approx([2.0, 0.5])
    of_a = [(14 + 42) / 2 / 28, (70 + 21) / 2 / 7, (14 + 70) / 2 / 28]
    of_b = [(42 + 14) / 2 / 7, (7 + 70) / 2 / 2.8, (70 + 14) / 2 / 14]
    assert [s.speedup for s in speeds] == pytest.approx([sorted(of_a)[1], sorted(of_b)[1]])
    assert speeds[0].p50 == 3.5
    assert 6 < speeds[0].p99 <= 6.5
    assert times == StageTimes(7, (2.0, 5.0), 7.0)


def test_one_at_a_time_each_example_has_its_median(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed_module, "seconds_of", clock.seconds_of)
    whole = Recorder(clock, "whole", [4, 6] * 12)
    early = Recorder(clock, "early", [1, 5, 9, 6, 2, 50])
    speeds, _ = race([whole, early], [], images(2), batch=1, rounds=3)
    assert early.asked == [(1, 1)] * 6
    assert speeds[1].seconds == pytest.approx((2 + 6) / 2)
    # medians of the examples' ratios, 4 / 2 and 6 / 6, weighted by the times of early exits
    assert speeds[1].speedup == pytest.approx((2 * 4 / 2 + 6 * 6 / 6) / (2 + 6))


@pytest.mark.parametrize("batch", [1, 7])
def test_early_exits_answer_everything(batch):
    predictor = make_predictor(POLICY)
    contender = EarlyExits(predictor)
    contender.go_through(images(14), batch)
    assert sum(predictor.counts.exits) == 14
    assert (contender.answer(images(5)) > 0).all()


def candidate(name, exit_index=None):
    result = PolicyOutcome(0.75, 0.1, 4e6, (0.5, 0.25, 0.25))
    return Candidate(name, POLICY, exit_index, result, np.array([0, 2, 1, 2, 0, 0]))


def row_of(name, contender, batch=7, exit_index=None):
    return benchmark_row(
        "jax",
        candidate(name, exit_index),
        contender,
        Speed(0.5, 1.4, 2.0, 3.0),
        ideal_speedup=0.7 / 0.45,
        batch=batch,
        macs=(1e6, 2e6, 10e6),
    )


def test_shares_are_those_of_the_examples_that_are_timed():
    assert candidate("2x").shares(4) == (0.25, 0.25, 0.5)
    assert candidate("2x").shares(6) == (0.5, 1 / 6, 1 / 3)


def test_a_row_by_hand():
    predictor = make_predictor(POLICY)
    predictor.counts.close = 3
    assert row_of("2x", EarlyExits(predictor)) == {
        "batch": 7,
        "runtime": "jax",
        "policy": "2x",
        "accuracy": 0.75,
        "macs": 4e6,
        "ideal_speedup": pytest.approx(0.7 / 0.45),
        "ideal_speedup_by_macs": 2.5,
        "speedup": 1.4,
        "p50_ms": 2000.0,
        "p99_ms": 3000.0,
        "images_per_second": 2.0,
        "falls_back": False,
        "close": 3,
    }
    predictor.counts.whole = 1
    assert row_of("2x", EarlyExits(predictor))["falls_back"]


def some_rows():
    whole = OneProgram(STAGES, EXAMPLE)
    kinds = (("full", 2), ("exit 1", 0), ("2x", None))
    return [row_of(name, whole, batch, k) for batch in (1, 7) for name, k in kinds]


def test_the_file_says_what_is_agreed():
    rows = json.loads(to_json(some_rows()))
    assert len(rows) == 6
    for row in rows:
        assert list(row) == [
            *("batch", "runtime", "policy", "accuracy", "macs", "ideal_speedup"),
            *("ideal_speedup_by_macs", "speedup", "p50_ms", "p99_ms"),
        ]


def test_the_table_and_the_picture(tmp_path):
    lines = table(some_rows()[:3]).splitlines()
    assert lines[0] == "batch 1"
    assert " ".join(lines[-1].split()) == "jax 2x 75.00 % 4.000 2.50 1.56 1.40 2 2000.00 3000.00 0"
    assert len({len(line) for line in lines[1:]}) == 1
    picture = plot_speed(some_rows(), tmp_path / "speed.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_limits_are_those_of_the_fewest_examples_that_must_go_on():
    # by example: right at exit 1 alone, from 2 on, at 3 alone, never, at 1 and 3, at 2 alone
    right = np.array(
        [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0]],
    )
    logits = np.stack([1 - right, right], axis=-1)
    labels = np.ones(6, int)
    # three must be right: two at the first exit, one at the second
    assert oracle_exits(logits, labels).tolist() == [0, 1, 0, 0, 0, 0]
    assert oracle_exits(logits, labels, 1 / 6).tolist() == [0] * 6
    assert oracle_exits(logits, labels, 1.0).tolist() == [0] * 6
    oracles = {0.0: np.array([0, 1, 0, 2])}
    found = limits(oracles, StageTimes(7, (1.0, 2.0, 4.0), 6.0), 5.0, (1.0, 3.0, 9.0))
    assert found == [{"loss": 0.0, "by_macs": 9 / 3.5, "by_time": 5 / 3}]


def test_limits_in_the_table_and_the_file():
    first, *others = some_rows()[:3]
    rows = [{**first, "limits": [{"loss": 0.01, "by_macs": 2.5, "by_time": 1.25}]}, *others]
    assert table(rows).splitlines()[-1] == (
        "jax: an accuracy of 74.00 % allows at most 2.50 times fewer operations, 1.25 times less "
        "time in stages"
    )
    assert [len(row.get("limits", [])) for row in json.loads(to_json(rows))] == [1, 0, 0]
