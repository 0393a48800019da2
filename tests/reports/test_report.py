"""The report: its exact shape, strict JSON, whole files, a readable page and table."""

import json
import re

import numpy as np
import pytest

from dfs_jax.costs.flops import ExitCost
from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.inference.budgeted import budgeted_curve
from dfs_jax.reports.confusion import class_section, worst_classes
from dfs_jax.reports.report import build_report, render_markdown, table_for_terminal, write_report
from dfs_jax.types import UserError

COSTS = (
    ExitCost(1, 1_300, 2_000_000, 2_050_000, 2_100_000, 2_000_000),
    ExitCost(2, 17_000, 3_500_000, 3_500_000, 3_700_000, 3_300_000),
    ExitCost(3, 19_000, 5_000_000, 5_000_000, 5_300_000, 4_400_000),
)
RUN = {"step": 41, "model": "vgg7", "data": "digits", "fork": "dfs", "loss": "byot"}


def predictions(seed, n, exits=3):
    rng = np.random.default_rng(seed)
    confidence = rng.random((exits, n), dtype=np.float32)
    predicted = rng.integers(0, 2, (exits, n), dtype=np.int32)
    labels = rng.integers(0, 2, n, dtype=np.int32)
    return ExitPredictions(confidence, predicted, predicted[0], np.zeros((exits, n)), labels)


@pytest.fixture(scope="module")
def report():
    test = predictions(1, 31)
    names = ("cat", "dog | wolf", "newt")  # no example is a newt
    return build_report(predictions(0, 53), test, COSTS, split="test", run=RUN, class_names=names)


def test_shape(report):
    test = predictions(1, 31)
    assert sorted(report) == ["anytime", "budgeted", "classes", "ensemble", "run"]
    assert report["run"] == {
        "split": "test",
        "examples": 31,
        "thresholds_from": "validation",
        **RUN,
    }
    for i, row in enumerate(report["anytime"]):
        right = int((test.predicted[i] == test.labels).sum())
        counts = ("macs", "published_macs", "params")
        expected = {"accuracy": right / 31, **{name: getattr(COSTS[i], name) for name in counts}}
        assert row == {"exit": i + 1, **expected}
    assert report["ensemble"] == {"accuracy": int((test.ensemble == test.labels).sum()) / 31}
    curve = budgeted_curve(predictions(0, 53), test, [2_000_000, 3_500_000, 5_000_000])
    assert len(report["budgeted"]) == 40
    for row, point in zip(report["budgeted"], curve, strict=True):
        assert list(row) == ["p", "thresholds", "accuracy", "macs"]
        assert (row["p"], row["accuracy"], row["macs"]) == (point.p, point.accuracy, point.macs)
        assert row["thresholds"] == list(point.thresholds)


def test_thresholds_come_from_the_first_set_only():
    one = build_report(predictions(0, 53), predictions(1, 31), COSTS, split="test")
    other = build_report(predictions(0, 53), predictions(2, 29), COSTS, split="test")
    for a, b in zip(one["budgeted"], other["budgeted"], strict=True):
        assert a["thresholds"] == b["thresholds"]
    assert one["anytime"] != other["anytime"]


def test_context_names_where_thresholds_come_from():
    fitted = predictions(0, 53)
    run = {"thresholds_from": "train"}
    report = build_report(fitted, fitted, COSTS, split="train", run=run)
    assert (report["run"]["thresholds_from"], report["run"]["split"]) == ("train", "train")
    assert "chosen on the train split" in render_markdown(report)


def test_costs_must_be_of_the_same_network():
    with pytest.raises(ValueError, match="3, 3 and 2 exits"):
        build_report(predictions(0, 5), predictions(1, 5), COSTS[:2], split="test")


def test_written_files(report, tmp_path):
    paths = write_report(report, tmp_path / "new" / "mine.json")
    assert paths == (tmp_path / "new" / "mine.json", tmp_path / "new" / "mine.md")
    assert json.loads(paths[0].read_text()) == report
    assert paths[1].read_text() == render_markdown(report)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["mine.json", "mine.md"]
    assert write_report(report, tmp_path)[0] == tmp_path / "report.json"


def test_thresholds_survive_json_to_the_bit(report, tmp_path):
    path, _ = write_report(report, tmp_path)
    confidence = predictions(0, 53).confidence
    for row in json.loads(path.read_text())["budgeted"]:
        for k, threshold in enumerate(row["thresholds"][:-1]):
            assert threshold == 1e8 or np.float32(threshold) in confidence[k]
        assert row["thresholds"][-1] == -1e8


def test_what_is_not_a_number_is_no_json_and_leaves_the_old_file(report, tmp_path):
    path, page = write_report(report, tmp_path)
    before = path.read_bytes(), page.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report({**report, "ensemble": {"accuracy": float("nan")}}, tmp_path)
    assert (path.read_bytes(), page.read_bytes()) == before


def test_a_place_that_cannot_be_written_is_the_users_to_know(report, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="could not be written"):
        write_report(report, tmp_path / "file" / "report.json")
    with pytest.raises(UserError, match="another suffix"):
        write_report(report, tmp_path / "report.md")


def test_page(report):
    page = render_markdown(report)
    assert page.startswith("# vgg7 on digits, dfs fork, byot loss\n")
    assert "Test split, 31 examples, checkpoint of step 41." in page
    first = report["anytime"][0]
    assert f"| 1 | {100 * first['accuracy']:.2f} % | 2.000 | 0.001 |" in page
    assert f"**{100 * report['ensemble']['accuracy']:.2f} %**" in page
    for p in ("0.05", "2.00"):
        assert f"| {p} |" in page
    # titles; exits, budgets, classes
    assert page.count("\n| ") == 4 + 3 + 10 + 2 + 2


def test_page_and_table_need_no_context():
    report = build_report(predictions(0, 5), predictions(1, 7), COSTS, split="validation")
    assert render_markdown(report).startswith(
        "# Multi-exit network\n\nValidation split, 7 examples."
    )
    assert table_for_terminal(report).startswith("validation split, 7 examples\n")


def test_table(report):
    lines = table_for_terminal(report).split("\n")
    assert len(lines) == 2 + 3 + 1
    assert len({len(line) for line in lines[1:5]}) == 1
    accuracies = [row["accuracy"] for row in report["anytime"]]
    for i, accuracy in enumerate(accuracies):
        assert lines[2 + i].split()[:3] == [str(i + 1), f"{100 * accuracy:.2f}", "%"]
    assert lines[-1].split()[0] == "ensemble"
    # The ensemble's accuracy stands under the exits'.
    assert lines[-1].index("%") == lines[2].index("%")


def test_classes_by_hand():
    predicted = np.array([[0, 1, 1, 2, 0], [0, 0, 1, 1, 1]], np.int32)
    labels = np.array([0, 0, 1, 1, 1], np.int32)
    some = ExitPredictions(np.ones((2, 5)), predicted, predicted[1], np.zeros((2, 5)), labels)
    section = class_section(some, ("cat", "dog", "newt"))
    assert section["examples"] == [2, 3, 0]
    assert section["accuracy"][0] == {"exit": 1, "by_class": [1 / 2, 1 / 3, None]}
    assert section["accuracy"][1] == {"exit": 2, "by_class": [1.0, 1.0, None]}
    first, last = section["confusion"]
    assert first == {"exit": 1, "counts": [[1, 1, 0], [1, 1, 1], [0, 0, 0]]}
    assert last["counts"] == [[2, 0, 0], [0, 3, 0], [0, 0, 0]]
    assert section["confusions"] == []
    assert worst_classes(section, 1) == [("cat", 1.0)]
    swapped = class_section(some._replace(predicted=predicted[::-1]), ("cat", "dog", "newt"))
    assert swapped["confusions"][0] == {"exit": 2, "label": "cat", "predicted": "dog", "count": 1}
    assert [row["count"] for row in swapped["confusions"]] == [1, 1, 1]


def test_a_thousand_classes_have_no_matrices():
    labels = np.arange(101, dtype=np.int32)
    predicted = np.stack([labels, (labels + 1) % 101])
    some = ExitPredictions(np.ones((2, 101)), predicted, labels, np.zeros((2, 101)), labels)
    section = class_section(some, tuple(map(str, labels)))
    assert section["confusion"] is None
    assert len(section["confusions"]) == 20
    assert len(section["accuracy"][1]["by_class"]) == 101


def test_the_page_and_the_file_show_the_classes(report, tmp_path):
    page = render_markdown(report)
    assert "dog \\| wolf" in page
    assert "newt" not in page
    file, _ = write_report(report, tmp_path / "report.json")
    assert json.loads(file.read_text()) == report
    assert re.search(r"^ +\[\d+, \d+, 0\],$", file.read_text(), re.MULTILINE)
