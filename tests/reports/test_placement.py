"""The program that says where to put exits: costs, rows, table, picture and mistakes."""

import json

import numpy as np
import pytest

from dfs_jax.costs.flops import exit_costs
from dfs_jax.inference.places import exit_costs_of
from dfs_jax.reports.part_costs import part_costs, parts_of
from dfs_jax.reports.placement import best_of_each_size, find_places, table, with_new_heads
from dfs_jax.reports.placement_plots import plot_placement
from dfs_jax.training.loop import train
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    train(tiny_config(epochs=1), path)
    return path


@pytest.fixture(scope="module")
def staged(workdir):
    return with_new_heads(workdir, epochs=2)


def test_costs_by_hand(staged):
    """Convolutions of 2, 4 and 8 channels on 8x8, 4x4 and 2x2 pixels, heads of 3 classes."""
    costs = part_costs(staged)
    convolutions = np.cumsum([64 * 9 * 3 * 2, 16 * 9 * 2 * 4, 4 * 9 * 4 * 8])
    assert costs.heads == (2 * 3, 4 * 3, 0)
    assert costs.trunk == (*convolutions[:2], convolutions[2] + 8 * 3)
    counted = exit_costs(staged.experiment.model, (8, 8, 3))
    assert exit_costs_of((0, 1, 2), *costs) == tuple(c.published_macs for c in counted)


def test_times_by_hand():
    trunk, heads = np.array([2.0, 3.0, 1.0]), np.array([1.0, 0.5, 0.25])
    found = parts_of(trunk + heads, np.cumsum(trunk) + heads)
    assert found.heads == (1.0, 0.5, 0)
    assert found.trunk == (2.0, 5.0, 6.25)
    noisy = parts_of([1.0, 1.0], [1.5, 1.25])  # measured one after another: no cost is below 0
    assert noisy.heads == (0.75, 0)
    assert noisy.trunk == (0.75, 1.25)


@pytest.mark.parametrize("runtime", ["jax", "onnx"])
def test_measured_times_of_the_parts(staged, runtime):
    if runtime == "onnx":
        pytest.importorskip("onnxruntime")
    parts = part_costs(staged, runtime, batch=3)
    assert len(parts.trunk) == len(parts.heads) == 3
    assert 0 < parts.trunk[0] <= parts.trunk[1] <= parts.trunk[2] < 60
    assert all(0 <= head < 60 for head in parts.heads)
    rows = find_places(staged, 1.0, parts, runtime)
    assert {row["costs"] for row in rows} == {runtime}


def test_rows_table_and_picture(staged, tmp_path):
    parts = part_costs(staged)
    rows = find_places(staged, 1.25, parts)
    budget = parts.trunk[-1] / 1.25
    assert {tuple(row["exits"]) for row in rows} == {(1, 3), (2, 3), (1, 2, 3)}
    assert all(row["cost"] <= budget for row in rows)
    assert rows[0]["accuracy"] == max(row["accuracy"] for row in rows)
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    whole = find_places(staged, 1.0, parts, most=1)
    logits, labels = staged.logits("test")
    assert [row["exits"] for row in whole] == [[3]]
    assert whole[0]["test_accuracy"] == pytest.approx(np.mean(logits[-1].argmax(-1) == labels))
    assert whole[0]["test_cost"] == parts.trunk[-1]
    picture = plot_placement([*rows, *whole], tmp_path / "placement.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def row(accuracy, *exits, costs="macs"):
    return {
        "speedup": 2.0,
        "costs": costs,
        "exits": list(exits),
        "accuracy": accuracy,
        "cost": 2e6,
        "test_accuracy": 0.5,
        "test_cost": 1e6,
    }


def test_the_table_has_the_best_subset_of_each_size():
    rows = [row(0.9, 1, 2, 4), row(0.85, 2, 4), row(0.8, 3, 4), row(0.7, 4)]
    assert best_of_each_size(rows) == [rows[3], rows[1], rows[0]]
    lines = table(rows).splitlines()
    assert lines[0] == "2 times fewer operations, 4 subsets"
    assert lines[3].split() == ["2", "2,", "4", "85.00", "%", "2.000", "50.00", "%", "1.000"]
    assert lines[-1] == "best: exits after 1, 2, 4, 90.00 % of the validation data"
    timed = {**row(0.9, 1, 4, costs="onnx"), "cost": 0.0125, "test_cost": 0.00125}
    lines = table([timed]).splitlines()
    assert lines[0] == "2 times less time in ONNX Runtime, 1 subsets"
    assert lines[2].split() == ["2", "1,", "4", "90.00", "%", "12.500", "50.00", "%", "1.250"]


def test_mistakes(staged, workdir, tmp_path):
    with pytest.raises(UserError, match="the cheapest exit alone costs 3462"):
        find_places(staged, 9.0, part_costs(staged))
    with pytest.raises(UserError, match="--costs must be one of macs, jax, onnx, got 'flops'"):
        part_costs(staged, "flops")
    with pytest.raises(UserError, match="--batch must be at least 1, got 0"):
        part_costs(staged, "jax", batch=0)
    with pytest.raises(UserError, match="there is no run in"):
        with_new_heads(tmp_path)
    with pytest.raises(UserError, match="learning_rate must be above 0, got 0"):
        with_new_heads(workdir, learning_rate=0.0)


@pytest.mark.slow
def test_runs_whose_exits_cannot_be_chosen(tmp_path):
    train(tiny_config(**{"epochs": 1, "model.exits": (3,)}), tmp_path / "single")
    with pytest.raises(UserError, match="has a single exit"):
        with_new_heads(tmp_path / "single")
    train(tiny_config(**{"epochs": 1, "data.validation_examples": 0}), tmp_path / "all")
    with pytest.raises(UserError, match="holds no validation split out"):
        with_new_heads(tmp_path / "all")
