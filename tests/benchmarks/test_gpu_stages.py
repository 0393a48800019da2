"""The stages of the GPU benchmark: what they need, their time, and what is merged of them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from benchmarks.accuracy.cells import cell_config, config_hash
from benchmarks.accuracy.results import DIRECTORY, FAILED, FINISHED, read_records, write_records
from benchmarks.accuracy.suites import create_suite
from benchmarks.gpu import check, infer, merge, step
from benchmarks.gpu.__main__ import STAGES
from benchmarks.gpu.check import compare_gradients
from benchmarks.gpu.clock import (
    OVERTIME_STATUS,
    SECONDS_TO_LEAVE,
    Clock,
    Expected,
    rescued,
    stops_in_time,
)
from benchmarks.gpu.session import FULL, REHEARSAL, Session, Unit
from benchmarks.gpu.step import OURS, StepCell
from benchmarks.gpu.train import create_suite as create_train_suite
from dfs_jax.training.loop import StopSignals
from dfs_jax.types import UserError
from tests.support.helpers import made_up_record

CARD = "H100"


class FakeTime:
    """A clock that advances only on request."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def session(tmp_path, stage, minutes=10.0, now=time.monotonic, rehearses=False):
    clock = Clock(minutes, now)
    return Session(
        stage, tmp_path / "out", tmp_path / "work", tmp_path / "data", None, clock, rehearses
    )


BLOCKED = ("tensorflow_datasets", "tensorflow", "grain", "array_record", "tensorboardX")
WITHOUT = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({BLOCKED}))
for stage in ("__main__", {", ".join(map(repr, STAGES))}):
    importlib.import_module(f"benchmarks.gpu.{{stage}}")
from pathlib import Path
from dfs_jax.training.metrics import MetricsWriter, read_metrics
writer = MetricsWriter(Path(sys.argv[1]), 0)
for step in (1, 2):
    writer.write({{"step": step, "epoch": 1, "split": "train", "loss": 1.0}})
writer.close()
print(len(read_metrics(Path(sys.argv[1]))), "torch" in sys.modules)
"""


def test_stages_need_no_library_that_reads_sets_and_no_tensorboard(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.stdout == "2 False\n", outcome.stderr
    assert outcome.stderr.count("tensorboardX is not installed: metrics.jsonl alone") == 1


def test_a_cpu_is_for_rehearsals_alone(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage=train", "--minutes=1"]
    outcome = subprocess.run(
        [*command, f"--output={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=DIRECTORY.parent.parent,
    )
    assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    assert "on a CPU there is only --rehearse" in outcome.stderr


def test_a_stage_has_some_time():
    with pytest.raises(UserError, match="minutes must be above 0, got 0"):
        Clock(0)


def test_a_process_ends_before_its_time_is_over(tmp_path):
    left = SECONDS_TO_LEAVE + 0.5
    source = (
        "import time\n"
        "from benchmarks.gpu.clock import Clock, ends_in_time\n"
        f"with ends_in_time(Clock({left} / 60)):\n"
        "    time.sleep(60)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert outcome.returncode == OVERTIME_STATUS
    assert outcome.stdout == "the time is over: what was finished is saved\n"


def test_a_run_is_asked_to_stop_and_what_does_not_stop_is_saved():
    saved = []
    clock = Clock(10 / 60)
    with stops_in_time(clock, 9.8), StopSignals() as signals:
        deadline = time.monotonic() + 5
        while signals.stop_after(1) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signals.stop_after(1) == signal.SIGTERM
    with stops_in_time(clock, 100):  # outside of a run the request ends nothing
        time.sleep(0.1)
    with rescued(clock, lambda: saved.append(1), 100):
        time.sleep(0.1)
    with rescued(clock, lambda: saved.append(2), 0):  # what ends earlier is not
        pass
    assert saved == [1]


def test_what_fits_is_the_longest_so_far():
    now = FakeTime()
    clock, expected = Clock(1, now), Expected(45)
    assert clock.allows(expected.seconds)
    for taken in (10, 3, 12):
        with expected.timed(clock):
            now.passes(taken)
    assert (clock.left(), expected.seconds) == (35, 12)


@pytest.fixture
def timed(monkeypatch):
    """Stands in for a card: measuring takes 100 seconds, and nothing is measured."""
    now, measured = FakeTime(), []

    def measure(session, cell, ceilings, expected):
        measured.append(cell.name)
        with expected[OURS].timed(session.clock):
            now.passes(100)
        session.keep(session.unit(cell.name), {"rows": [], "complete": len(measured) != 2})

    monkeypatch.setattr(step, "_measure", measure)
    monkeypatch.setattr(step, "_ceilings", lambda session: None)
    return now, measured


def test_a_stage_ends_before_its_time_and_goes_on_where_it_was(tmp_path, timed):
    now, measured = timed
    step.run(session(tmp_path, "step", 10, now))
    assert now.now - 1000 <= 600
    assert measured == [cell.name for cell in step.cells(False)][:4]
    step.run(session(tmp_path, "step", 10, now))
    # The second one was not complete, and comes again.
    assert measured[4:] == [step.cells(False)[i].name for i in (1, 4, 5, 6)]


def test_a_stage_without_time_measures_nothing(tmp_path, timed):
    now, measured = timed
    step.run(session(tmp_path, "step", 1, now))
    assert measured == []


def test_large_batches_of_bfloat16_come_first():
    cells = step.cells(False)
    assert len(set(cells)) == len(cells) == 12
    assert cells[:3] == [StepCell(n, 500, "bfloat16") for n in ("vgg7", "resnet18", "msdnet")]


def test_a_rehearsal_is_no_measurement(tmp_path):
    rehearsed, real = (session(tmp_path, "step", rehearses=r) for r in (True, False))
    rehearsed.keep(Unit("a"), {"rows": []})
    assert rehearsed.known(Unit("a")) is not None
    assert real.known(Unit("a")) is None
    real.fail(Unit("b"), RuntimeError("out of memory\nand more"))
    assert real.known(Unit("b")) is None
    assert real.results.read()["b"]["reason"] == "RuntimeError: out of memory"
    assert real._replace(again=True).known(Unit("a")) is None
    carried = real._replace(output=tmp_path / "new", carried=tmp_path / "out")
    real.keep(Unit("c"), {"rows": []})
    assert carried.known(Unit("c")) is not None


def test_what_was_measured_is_never_lost(tmp_path):
    given, unit = session(tmp_path, "step"), Unit("a")
    two, one = ({"rows": [{"step_ms": 1.0}] * n, "complete": False} for n in (2, 1))
    given.keep(unit, two)
    given.keep(unit, one)
    given.fail(unit, RuntimeError("killed"))
    assert given.results.read()["a"]["rows"] == two["rows"]
    given.keep(unit, {**one, "complete": True})
    assert given.known(unit)["rows"] == one["rows"]


def test_gradients_that_are_not_numbers_never_pass():
    ones, nan = {"grads": {"w": [1.0]}}, {"grads": {"w": [float("nan")]}}
    assert not max(compare_gradients(nan, ones).values()) <= check.TOLERANCE
    assert compare_gradients(ones, ones) == {"grads": 0.0}


def test_every_model_is_checked_and_the_published_ones_first(tmp_path):
    cases = check._cases(session(tmp_path, "check"))
    assert [case.model for case in cases[:3]] == list(check.FIRST)
    exact = Counter(case.model for case in cases if case.dtype == "float64")
    assert exact == Counter(check.MODELS.table.keys())
    assert all(check._narrow(case).num_exits >= 2 for case in cases)


def test_cells_are_trained_in_the_order_of_their_worth():
    names = [cell.name for cell in create_train_suite(False, 1.0).cells]
    head = [
        *(f"cifar100_resnet18/cifar100/300ep/{m}/seed0" for m in ("dfs", "byot", "dsn")),
        *(
            f"cifar100_vgg7/cifar100/100ep/{m}/seed0"
            for m in ("dsn", "byot", "dfs_beta0.5", "dfs_beta0.1", "dfs_beta0.9")
        ),
        *(f"cifar100_msdnet/cifar100/300ep/{m}/seed0" for m in ("dfs", "dsn", "ge", "pcgrad")),
    ]
    assert names[: len(head)] == head
    assert all("/static_w" in name for name in names[len(head) : len(head) + 6])
    seeds = [name[-1] for name in names if "/static_w" not in name]
    assert seeds[len(head) : 3 * len(head)] == ["1"] * len(head) + ["2"] * len(head)


def test_other_epochs_are_in_the_name():
    suite = create_train_suite(False, 0.1)
    assert suite.cells[0].name == "cifar100_resnet18/cifar100/30ep/dfs/seed0"
    assert cell_config(suite, suite.cells[0]).schedule.decay_epochs == (25, 28, 29)
    with pytest.raises(UserError, match="epochs must be above 0"):
        create_train_suite(False, 0.0)
    with pytest.raises(UserError, match="has at least 2 epochs, got 1"):
        cell_config(create_train_suite(False, 0.001), suite.cells[0]._replace(epochs=1))


def test_a_rehearsed_cell_is_no_cell_of_the_table():
    rehearsed, suite = create_train_suite(True, 1.0), create_train_suite(False, 1.0)
    for cell in rehearsed.cells:
        wanted = config_hash(cell_config(suite, cell))
        assert config_hash(cell_config(rehearsed, cell)) != wanted


def test_exits_that_answer_nobody_have_no_threshold():
    assert infer._policy([0.5, infer.NOBODY, -1e8]).thresholds == (0.5, None)


# --- merging

PAPER = create_suite("paper")
CELL = PAPER.cells[0]


def paper_record(cell=CELL, card=CARD, status=FINISHED, seconds=90.0, **changes):
    made = made_up_record(cell, exits=4)
    known_as = config_hash(cell_config(PAPER, cell))
    hardware = {**made["hardware"], "kind": card}
    head = {"status": status, "config_hash": known_as, "reason": "because"}
    return {**head, **made, "seconds": seconds, "hardware": hardware, **changes}


def step_record(times, complete=True, card=CARD, **changes):
    rows = [{"step_ms": t} if t else {"failed": "out of memory"} for t in times]
    head = {"status": FINISHED, "config_hash": FULL, "complete": complete, "rows": rows}
    return {**head, "hardware": {"kind": card}, **changes}


def merged(tmp_path, stage, there, came, **options):
    results, output = tmp_path / "results", tmp_path / "out"
    write_records(results / merge.merged_name(stage), {"a": there} if there else {})
    write_records(output / f"{stage}.json", {"a": came})
    lines = merge.merge([output], results, **options)
    return read_records(results / merge.merged_name(stage)).get("a"), lines


@pytest.mark.parametrize(
    ("there", "came", "is_taken"),
    [
        (None, step_record([1, 2]), True),
        (step_record([1, 2]), step_record([3, 4]), False),
        (step_record([1, 2]), step_record([3, 4, 5]), True),
        (step_record([1, None]), step_record([3, 4]), True),
        (step_record([1, 2, 3], complete=False), step_record([4, 5]), True),
        (step_record([1, 2]), step_record([3, 4, 5], complete=False), False),
        (step_record([1], config_hash=REHEARSAL), step_record([3]), True),
        (None, step_record([1], config_hash=REHEARSAL), False),
        (None, step_record([1], status=FAILED), False),
        (None, step_record([1], card=""), False),
    ],
)
def test_a_better_record_is_never_overwritten(tmp_path, there, came, is_taken):
    found, (line,) = merged(tmp_path, "step", there, came)
    assert found == (came if is_taken else there)
    assert ("merged, on H100" in line) == is_taken


def test_after_a_change_what_is_as_complete_replaces(tmp_path):
    there, same, less = step_record([1, 2]), step_record([3, 4]), step_record([5])
    assert merged(tmp_path, "step", there, same, again=True)[0] == same
    assert merged(tmp_path, "step", there, less, again=True)[0] == there


def test_cells_of_the_table_name_their_card(tmp_path):
    results, output = tmp_path / "results", tmp_path / "out"
    shorter = CELL._replace(epochs=30)
    rehearsed = CELL._replace(epochs=2)
    came = {
        CELL.name: paper_record(),
        shorter.name: paper_record(shorter),
        rehearsed.name: paper_record(rehearsed, config_hash="of tiny networks"),
        "no_network/cifar100/2ep/dfs/seed0": paper_record(),
    }
    write_records(output / "paper.json", came)
    taken = ["merged, on H100"] * 2 + ["left out, of another config or a rehearsal"] * 2
    assert [line.partition(": ")[2] for line in merge.merge([output], results)] == taken
    found = read_records(results / "paper.json")
    assert found == {CELL.name: came[CELL.name], shorter.name: came[shorter.name]}
    write_records(output / "paper.json", {CELL.name: paper_record(card="H200", seconds=1.0)})
    assert "there is one already" in merge.merge([output], results)[0]
    assert read_records(results / "paper.json") == found


def test_a_directory_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"holds none of check\.json, .*paper\.json"):
        merge.merge([tmp_path], tmp_path)
    assert merge.main([]) == 2
