"""metrics.jsonl: what a line holds, and how a resumed run finds it."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest

from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.training.metrics import (
    MetricsWriter,
    evaluation_line,
    mean_exit_accuracy,
    read_metrics,
    training_line,
)
from dfs_jax.training.state import EpochTotals
from dfs_jax.types import UserError

LINES = [{"step": step, "epoch": 1, "split": "train", "loss": step / 7} for step in (3, 5, 7)]


def predictions():
    """Two exits, five examples: the first exit is right about two, the second about four."""
    return ExitPredictions(
        confidence=np.full((2, 5), 0.5, np.float32),
        predicted=np.array([[0, 1, 0, 0, 0], [0, 1, 2, 1, 0]]),
        ensemble=np.array([0, 1, 2, 0, 0]),
        loss=np.array([[1, 2, 3, 4, 5], [0, 0, 0, 0, 10]], np.float32),
        labels=np.array([0, 1, 2, 1, 2]),
    )


def test_an_evaluation_line_by_hand():
    line = evaluation_line(predictions(), step=11, epoch=2, split="validation")
    assert line == {
        "step": 11,
        "epoch": 2,
        "split": "validation",
        "loss": 2.5,
        "exit1/loss": 3.0,
        "exit2/loss": 2.0,
        "exit1/accuracy": 0.4,
        "exit2/accuracy": 0.8,
        "ensemble/accuracy": 0.6,
    }
    assert mean_exit_accuracy(predictions()) == pytest.approx(0.6)


def test_a_training_line_by_hand():
    totals = EpochTotals(np.float32(21), np.array([2, 5]), np.int32(7))
    line = training_line(totals, step=13, epoch=1)
    assert line["loss"] == 1.5  # 21 over 7 examples and 2 exits
    assert (line["exit1/accuracy"], line["exit2/accuracy"]) == pytest.approx((2 / 7, 5 / 7))


def write_all(workdir, lines, start_step=0):
    writer = MetricsWriter(workdir, start_step)
    for line in lines:
        writer.write(line)
    writer.close()


def test_lines_beyond_the_restored_step_are_cut(tmp_path):
    write_all(tmp_path, LINES)
    write_all(tmp_path, [], start_step=5)
    assert read_metrics(tmp_path) == LINES[:2]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write_all(tmp_path, LINES[:2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ep')
    assert read_metrics(tmp_path) == LINES[:2]
    write_all(tmp_path, LINES[2:], start_step=5)
    assert read_metrics(tmp_path) == LINES


def test_a_number_that_is_not_finite_leaves_the_file_valid_json(tmp_path):
    write_all(tmp_path, [{**LINES[0], "loss": float("nan")}, {**LINES[1], "loss": np.inf}])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [line["loss"] for line in map(json.loads, text.splitlines())] == [None, None]


def test_events_are_written_beside(tmp_path):
    write_all(tmp_path, LINES)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_full_disk_is_one_sentence_and_loses_no_line(tmp_path):
    write_all(tmp_path, LINES[:2])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    writer = MetricsWriter(tmp_path, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"metrics.jsonl could not be written \(File too large\)"
        ):
            writer.write(LINES[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path) == LINES[:2]
    writer.close()
