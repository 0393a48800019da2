"""The accuracy benchmark: its suites, its restartable cells, its statistics and its page."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict
from scipy import stats

from benchmarks.accuracy import runner, suites, times
from benchmarks.accuracy.__main__ import REPOSITORY, listing, share_cores
from benchmarks.accuracy.cells import Suite, cell_config, choose, config_hash, grid
from benchmarks.accuracy.published import PUBLISHED
from benchmarks.accuracy.results import FAILED, FINISHED, Results
from benchmarks.accuracy.rows import (
    Row,
    budget_accuracy,
    difference,
    exit_accuracy,
    mean,
    mean_accuracy,
    select,
)
from benchmarks.accuracy.runner import Datasets, fill, run_cells
from benchmarks.accuracy.suites import METHODS, create_suite
from benchmarks.accuracy.tables import accuracy_table, conflict_table, difference_table
from dfs_jax.training.config import check_config
from dfs_jax.types import UserError
from tests.support.helpers import made_up_record, tiny_config

CELLS = grid(["vgg7"], ["tiny"], ["dsn", "dfs"], 1, [0, 1])
SUITE = Suite("tiny", CELLS, lambda cell: tiny_config(), lambda cell: 60.0)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results.json", tmp_path / "locks")


@pytest.fixture
def filled(monkeypatch):
    """Stands in for training: the names of runs that were asked for, and what they answer."""
    asked = []
    answers = {}

    def stub(config, run, datasets, *, split):
        asked.append((config.seed, split))
        answer = answers.get(config.seed, made_up_record(CELLS[0]))
        if isinstance(answer, Exception):
            raise answer
        run.mkdir(parents=True, exist_ok=True)
        return answer

    monkeypatch.setattr(runner, "fill", stub)
    return asked, answers


def run(results, tmp_path, suite=SUITE, **options):
    return run_cells(suite, suite.cells, results, tmp_path / "runs", **options)


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_cell_has_a_config_of_its_own(name):
    suite = create_suite(name)
    hashes = set()
    for cell in suite.cells:
        config = cell_config(suite, cell)
        check_config(config)
        assert (config.seed, config.epochs, config.data.name) == (*cell[4:2:-1], cell.data)
        hashes.add(config_hash(config))
    assert len({cell.name for cell in suite.cells}) == len(suite.cells) == len(hashes)


def test_no_seed_of_the_table_takes_part_in_a_choice():
    table = {cell.seed for suite in ("small", "paper") for cell in create_suite(suite).cells}
    chosen = {cell.seed for cell in create_suite("search").cells}
    assert not table & chosen
    assert create_suite("search").reported_split == "validation"
    assert create_suite("small").reported_split == "test"


def test_the_headline_is_first_and_complete():
    methods = (*suites.HEADLINE, *suites.BEST)
    cells = create_suite("small", seeds=2).cells[: 2 * 2 * len(methods)]
    assert {(c.data, c.method, c.seed) for c in cells} == {
        (data, method, seed) for data in suites.SETS for method in methods for seed in (0, 1)
    }
    assert set(suites.BEST) <= METHODS.keys()


def test_published_settings_are_the_configs():
    from configs import cifar100_resnet18

    suite = create_suite("paper")
    (cell,) = choose(suite.cells, "cifar100_resnet18/*/dfs/seed2", [])
    expected = cifar100_resnet18.get_config("dfs")
    expected.seed = 2
    # What a GPU's run changes: the type of the blocks, and how often it evaluates.
    expected.compute_dtype, expected.eval_every_epochs = "bfloat16", 6
    assert cell_config(suite, cell).to_dict() == expected.to_dict()
    shorter = cell_config(suite, cell._replace(epochs=30))
    assert (shorter.schedule.decay_epochs, shorter.eval_every_epochs) == ((25, 28, 29), 1)
    for network, rows in PUBLISHED.items():
        assert rows.keys() <= set(suites.PUBLISHED_SETTINGS[network][0])


def test_a_hash_is_of_what_results_depend_on():
    def changed(**changes):
        return config_hash(tiny_config(**changes))

    same = [{"data.data_dir": "/elsewhere"}, {"log_every_steps": 7}, {"mesh.fsdp": 2}]
    assert {changed(**changes) for changes in same} == {changed()}
    other = [{"seed": 1}, {"fork.partition_ratio": (0.3,)}, {"conflict_every_steps": 9}]
    assert len({changed(), *(changed(**changes) for changes in other)}) == 4
    config = tiny_config()
    assert config_hash(ConfigDict({**config.to_dict(), "new_option": None})) == changed()


def test_choosing_cells():
    assert [c.seed for c in choose(CELLS, "*seed1", ["dfs"])] == [1]
    with pytest.raises(UserError, match=r"no cell has the method\(s\) sgd: there are dfs, dsn"):
        choose(CELLS, "*", ["sgd"])
    with pytest.raises(UserError, match="no cell is called 'x'"):
        choose(CELLS, "x", [])


def test_finished_cells_are_kept_and_the_rest_is_run(results, tmp_path, filled):
    asked, answers = filled
    answers[1] = None  # a signal
    assert run(results, tmp_path)[::2] == (2, "stopped by a signal")
    assert asked == [(0, "test"), (0, "test"), (1, "test")]
    del answers[1]
    assert run(results, tmp_path) == (2, 0, None)
    assert len(asked) == 5
    assert run(results, tmp_path) == (0, 0, None)
    assert len(asked) == 5
    lines = results.path.read_text().splitlines()
    assert len(lines) == len(CELLS) + 2  # a line each
    assert not list((tmp_path / "runs").glob("*"))


def test_a_failure_is_recorded_and_the_others_go_on(results, tmp_path, filled):
    asked, answers = filled
    answers[0] = UserError("the loss became non-finite\nand more")
    assert run(results, tmp_path) == (2, 2, None)
    record = results.read()[CELLS[0].name]
    assert (record["status"], record["reason"]) == (FAILED, "UserError: the loss became non-finite")
    assert "failed: UserError" in listing(SUITE, CELLS, results.read())
    answers.clear()
    assert run(results, tmp_path) == (2, 0, None)
    assert results.read()[CELLS[0].name]["status"] == FINISHED
    assert len(asked) == 6


def test_methods_are_timed_in_turn_and_all_their_seeds_get_it(
    results, tmp_path, filled, monkeypatch
):
    asked, rounds_of = [], []

    def stub(experiment):
        asked.append((experiment.config.model.name, experiment.config.seed))
        return SimpleNamespace(run=lambda: len(asked))

    def seconds(programs, rounds):
        rounds_of.append(rounds)
        return [0.002 * (i + 1) for i in range(len(programs))]

    monkeypatch.setattr(times, "compile_whole_step", stub)
    monkeypatch.setattr(times, "median_seconds", seconds)
    assert times.time_cells(SUITE, CELLS, results) == 0
    run(results, tmp_path, SUITE._replace(cells=CELLS[:3]))  # dfs of seed 1 is not there
    assert times.time_cells(SUITE, CELLS, results, rounds=3) == 3
    assert (asked, rounds_of) == ([("tests.support.helpers:ThreeStageVGG", 0)] * 2, [3])
    found = {name: record["step_ms"] for name, record in results.read().items()}
    assert [found[cell.name] for cell in CELLS[:3]] == [2.0, 4.0, 2.0]
    table = accuracy_table(select(SUITE, results.read(), "vgg7", "tiny", 1, ["dsn", "dfs"]))
    assert [line.split(" | ")[-1] for line in table.splitlines()[2:]] == ["1.00 |", "2.00 |"]


def test_time_is_of_an_image(results):
    for cell in CELLS[:2]:
        made = {**made_up_record(cell), "batch_size": 50 if cell.method == "dfs" else 100}
        results.record(cell, config_hash(cell_config(SUITE, cell)), FINISHED, made)
    table = accuracy_table(select(SUITE, results.read(), "vgg7", "tiny", 1, ["dsn", "dfs"]))
    assert table.splitlines()[-1].endswith(" | 1.00 | 2.00 |")


def test_another_config_is_run_again(results, tmp_path, filled):
    run(results, tmp_path)
    other = SUITE._replace(config_of=lambda cell: tiny_config(batch_size=3))
    assert "of another config" in listing(other, CELLS, results.read())
    assert run(results, tmp_path, other) == (4, 0, None)
    assert listing(other, CELLS, results.read()).count("finished") == 4


def test_a_cell_that_would_end_too_late_is_not_begun(results, tmp_path, filled):
    assert run(results, tmp_path, minutes=0.9) == (0, 0, "0.9 minutes are over")
    assert run(results, tmp_path, minutes=9) == (4, 0, None)


def test_two_processes_do_not_take_the_same_cell(results, tmp_path, filled):
    other = Results(results.path, tmp_path / "locks")
    with other.claim(CELLS[0]) as mine:
        assert mine
        assert run(results, tmp_path).finished == 3
    assert run(results, tmp_path).finished == 1


def test_the_recipe_that_was_chosen_is_a_config():
    from configs import cifar10_vgg7_best

    for method, ours in zip(suites.BEST, ("dfs", "dsn"), strict=True):
        (cell,) = choose(create_suite("small").cells, f"vgg7_w16/cifar10/1ep/{method}/seed0", [])
        theirs = cell_config(create_suite("small"), cell)
        theirs.seed = cifar10_vgg7_best.get_config().seed
        theirs.conflict_every_steps = 0
        assert config_hash(theirs) == config_hash(cifar10_vgg7_best.get_config(ours))


def test_more_workers_than_cores_are_refused():
    with pytest.raises(UserError, match="workers need"):
        share_cores([], 10**6)


def test_a_file_of_something_else_is_not_overwritten(results):
    results.path.write_text("[]")
    with pytest.raises(UserError, match="is not a results' file"):
        results.record(CELLS[0], "hash", FINISHED, {})
    assert results.path.read_text() == "[]"


def test_a_real_cell(tmp_path):
    network = {"model.name": "tests.support.helpers:TinyNetwork", "fork.name": "dfs"}
    config = tiny_config(epochs=2, conflict_every_steps=6, **network)
    record = fill(config, tmp_path / "run", Datasets(), split="test")
    assert record is not None
    assert len(record["exits"]) == len(record["macs"]) == len(record["validation"]) == 2
    assert [epoch for epoch, _ in record["history"]] == [1, 2]
    assert [probe["step"] for probe in record["conflict"]] == [6, 12]
    probe = record["conflict"][0]
    assert 0 <= probe["pairs"]["trunk"] <= 1
    assert (len(probe["norms"]), len(probe["cosines"])) == (2, 1)
    assert {point[0] for point in record["budget"]} <= set(range(record["macs"][-1] + 1))
    assert record["training_macs"] > record["macs"][-1]
    assert record["step_ms"] is None
    assert record["steps"] == 12
    best = max(record["history"], key=lambda line: (statistics.fmean(line[1]), line[0]))
    assert record["validation"] == best[1]
    json.dumps(record, allow_nan=False)


def test_data_sets_are_read_once():
    datasets = Datasets()
    first = datasets.of(tiny_config())
    assert datasets.of(tiny_config(seed=4, batch_size=3)) is first
    assert datasets.of(tiny_config(**{"data.validation_examples": 5})) is not first


def rows_of(values):
    """Rows of one exit, a value a seed."""
    return [
        Row(method, {s: {"exits": [v]} for s, v in by_seed.items()}, 3)
        for method, by_seed in values.items()
    ]


def test_differences_are_paired_by_seed():
    dsn, dfs = rows_of({"dsn": {0: 0.5, 1: 0.7, 2: 0.6}, "dfs": {0: 0.55, 2: 0.62, 1: 0.76}})
    found = difference(dfs, dsn, mean_accuracy)
    test = stats.ttest_rel([0.55, 0.76, 0.62], [0.5, 0.7, 0.6])
    low, high = test.confidence_interval(0.95)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.is_clear == (test.pvalue < 0.05)


def test_differences_from_another_row_than_deep_supervision():
    shown = [("byot", {0: 0.5, 1: 0.7}), ("dfs_byot", {0: 0.52, 1: 0.72})]
    rows = [
        Row(m, {s: {"exits": [v], "ensemble": 0.9} for s, v in runs.items()}, 2)
        for m, runs in shown
    ]
    head, _, line = difference_table(rows, rows[0]).splitlines()
    assert head == "| less BYOT's | exit 1 | mean | ensemble |"
    points = "**+2.00 ± 0.00**"
    assert line == f"| DFS symmetric, byot | {points} | {points} | +0.00 ± 0.00 |"


def test_one_seed_has_no_interval_and_none_no_difference():
    dsn, dfs, none = rows_of({"dsn": {0: 0.5, 1: 0.7}, "dfs": {0: 0.6}, "ge": {}})
    found = difference(dfs, dsn, exit_accuracy(0))
    assert (found.mean, found.half_width) == (pytest.approx(0.1), None)
    assert not found.is_clear
    assert difference(none, dsn, mean_accuracy) is None


def test_accuracy_at_a_share_of_the_operations():
    record = made_up_record(CELLS[0])
    assert budget_accuracy(0.5)(record) == pytest.approx(0.1 + 3e6 / 1e7)
    assert budget_accuracy(0.25)(record) == pytest.approx(0.1 + 1.5e6 / 1e7)


def test_conflict_is_a_mean_over_probes_and_seeds():
    def record(share, *cosines):
        return {"pairs": {"trunk": share, "block1": None}, "cosines": cosines}

    runs = {
        0: {"conflict": [record(0.1, 0.5, None), record(0.2, 0.1, 0.2)]},
        1: {"conflict": [record(0.3, -0.4, 0.0), record(0.6, 0.2, 0.2)]},
    }
    table = conflict_table([Row("dsn", runs, 2), Row("ge", {}, 2)])
    head, _, dsn, ge = table.splitlines()
    assert head == "| method | seeds | trunk | block1 | mean cosine |"
    assert dsn == "| DSN | 2 | 30.0 % | 0.0 % | 0.10 |"
    assert ge == "| GE | 0 of 2 | not run yet |  |  |"


def test_cells_that_were_not_run_stand_in_the_tables(results):
    for cell in CELLS:
        if cell.method == "dsn" and cell.seed == 0:
            known_as = config_hash(cell_config(SUITE, cell))
            results.record(cell, known_as, FINISHED, made_up_record(cell))
    rows = select(SUITE, results.read(), "vgg7", "tiny", 1, ["dsn", "dfs"])
    dsn, dfs = accuracy_table(rows).splitlines()[2:]
    assert dsn.startswith("| DSN | 1 of 2 | ")
    assert f"{100 * mean(rows[0], mean_accuracy):.2f}" in dsn
    assert dfs.startswith("| DFS symmetric | 0 of 2 | not run yet |")
    assert len({line.count("|") for line in accuracy_table(rows).splitlines()}) == 1
    assert difference_table(rows).splitlines()[-1].replace(" ", "") == "|DFSsymmetric|||||||||"


def test_the_program_lists_and_answers_mistakes_in_a_sentence():
    def program(*flags):
        command = [sys.executable, "-m", "benchmarks.accuracy", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    listed = program("--suite=paper", "--list", "--cells=imagenet*")
    assert listed.stdout.count("imagenet_msdnet/") == 5
    wrong = program("--suite=large")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "unknown suite 'large': choose one of small, search, paper" in wrong.stderr
