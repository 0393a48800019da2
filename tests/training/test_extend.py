"""Runs that go on to more epochs: exactly, or not at all."""

from __future__ import annotations

import chex
import pytest

from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.config import open_workdir, read_config, record_config
from dfs_jax.training.experiment import abstract_state, build_experiment
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.run_data import describe_data, record_data
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

TIMINGS = ("images_per_second", "data_wait")
# 30 training images in batches of 5: 6 steps an epoch.
STEPS_PER_EPOCH = 6


def config_for(epochs, *, name="constant", **schedule):
    options = {"name": name, "warmup_epochs": 0.5, **schedule}
    changes = {f"schedule.{key}": value for key, value in options.items()}
    return tiny_config(
        epochs=epochs, **changes, **{"model.name": "tests.support.helpers:TinyNetwork"}
    )


def outcome(workdir, config):
    target = abstract_state(build_experiment(config))
    lines = read_metrics(workdir)
    untimed = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    checkpoints = Checkpoints(workdir, read_only=True)
    return checkpoints.restore("latest", target), checkpoints.best_step(), untimed


def test_an_extended_run_is_the_longer_run_bit_for_bit(tmp_path):
    """Through a decay within the first run, and one after it that came with the extension."""
    short = config_for(1, name="multistep", decay_epochs=(0.5,))
    longer = config_for(2, name="multistep", decay_epochs=(0.5, 1.5))
    assert train(short, tmp_path / "extended").step == 6
    assert train(longer, tmp_path / "extended").step == 12
    train(longer, tmp_path / "whole")
    (state, step), best, lines = outcome(tmp_path / "extended", longer)
    (expected, expected_step), expected_best, expected_lines = outcome(tmp_path / "whole", longer)
    assert step == expected_step == 12
    chex.assert_trees_all_equal(state, expected)
    assert (best, lines) == (expected_best, expected_lines)
    assert read_config(tmp_path / "extended").epochs == 2


def begun(workdir, config, steps):
    """A directory as a run leaves it after some steps, as far as starting it again looks at it."""
    open_workdir(workdir, config)
    record_data(workdir, describe_data(build_experiment(config).dataset, config.data))
    (workdir / "checkpoints" / f"{steps}").mkdir(parents=True)
    return workdir


ALLOWED = {
    "constant": (config_for(3), config_for(5), 18),
    "multistep": (
        config_for(3, name="multistep", decay_epochs=(1, 2)),
        config_for(5, name="multistep", decay_epochs=(1, 2)),
        18,
    ),
    "a decay that is yet to come": (
        config_for(3, name="multistep", decay_epochs=(2,)),
        config_for(5, name="multistep", decay_epochs=(3,)),
        12,
    ),
    "fewer, but not yet taken": (config_for(5), config_for(3), 18),
}
REFUSED = {
    "cosine": (
        config_for(3, name="cosine"),
        config_for(5, name="cosine"),
        r"cosine schedule of 5 epochs step 2 .*0.0332.* at 0.0330.*--workdir .*init_from=",
    ),
    "another decay": (
        config_for(3, name="multistep", decay_epochs=(1,)),
        config_for(5, name="multistep", decay_epochs=(2,)),
        "step 7 has the learning rate 0.05, and the run in .* took it at 0.005",
    ),
    "another warm-up": (config_for(3), config_for(5, warmup_epochs=2.0), "step 1 has the learning"),
    "fewer than were taken": (config_for(5), config_for(2), "has taken 18 steps of 6 an epoch"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_epochs_may_change_where_every_rate_so_far_stays(tmp_path, name):
    before, after, steps = ALLOWED[name]
    open_workdir(begun(tmp_path, before, steps), after)
    record_config(tmp_path, after)
    assert read_config(tmp_path).epochs == after.epochs


@pytest.mark.parametrize("name", REFUSED)
def test_another_rate_in_the_past_is_refused_with_a_way_to_go_on(tmp_path, name):
    before, after, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as told:
        open_workdir(begun(tmp_path, before, 18), after)
    assert "\n" not in str(told.value)
    assert f"epochs cannot change from {before.epochs} to {after.epochs}" in str(told.value)
    assert read_config(tmp_path).epochs == before.epochs


def test_other_fields_still_make_another_run(tmp_path):
    begun(tmp_path, config_for(3), 18)
    changed = config_for(5)
    changed.batch_size = 3
    with pytest.raises(UserError, match=r"another config: batch_size .*; epochs \(was 3, is 5\)"):
        open_workdir(tmp_path, changed)
    with pytest.raises(UserError, match=r"schedule.warmup_epochs \(was 0.5, is 2.0\)"):
        open_workdir(tmp_path, config_for(3, warmup_epochs=2.0))


def test_a_run_that_did_not_record_its_data_is_told_how(tmp_path):
    begun(tmp_path, config_for(3), 18)
    (tmp_path / "data.json").unlink()
    with pytest.raises(UserError, match="start it once with the old epochs, which records them"):
        open_workdir(tmp_path, config_for(5))
