"""Several steps as one program: what they compute, where their images lie, when the host is due."""

from __future__ import annotations

import dataclasses
import os
import signal

import chex
import jax
import numpy as np
import pytest

from dfs_jax.training import feed, loop
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.dispatch import BATCHES, steps_at_once
from dfs_jax.training.evaluate import ResidentSplit, evaluate
from dfs_jax.training.experiment import (
    abstract_state,
    build_experiment,
    evaluation_step,
    initial_state,
    training_step,
)
from dfs_jax.training.feed import DeviceFeed, HostFeed, create_feed, lies_on_device
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

SMALL = {"model.name": "tests.support.helpers:TinyNetwork", "batch_size": 6}
VARIANTS = {
    "plain": {},
    "averaged": {"optimizer.ema_decay": 0.9, "loss.name": "distillation"},
    "bfloat16": {"model.name": "tests.support.helpers:ThreeStageVGG", "compute_dtype": "bfloat16"},
    "accumulated": {"accumulate_steps": 3},
    "pcgrad": {"gradients.name": "pcgrad"},
    "meta_gf": {"gradients.name": "meta_gf"},
    "wpn": {"gradients.name": "wpn", "gradients.interval": 2},
}
QUICK = ("plain", "accumulated", "pcgrad")
# Here the compiler fuses a loop's body otherwise than a step that stands alone.
TOLERANCES = {"averaged": 1e-5, "bfloat16": 3e-2, "meta_gf": 1e-5, "wpn": 1e-3}
TIMINGS = ("images_per_second", "data_wait")
# 30 examples in batches of 5 are 6 steps an epoch: 4 at once, then 1 and 1.
AT_ONCE = {"steps_per_dispatch": 4, "data.on_device": True}


def after(experiment, feed, sizes):
    """Returns the state after dispatches with these numbers of steps."""
    state, step = initial_state(experiment), training_step(experiment, feed.takes)
    for steps in sizes:
        state = step(state, *feed.next(steps))
    return jax.device_get(state)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]
)
def test_three_steps_at_once_are_three_steps(name):
    experiment = build_experiment(tiny_config(**{**SMALL, **VARIANTS[name]}))
    one_by_one = after(experiment, HostFeed(experiment, 0, is_stacked=False), [1] * 6)
    at_once = after(experiment, DeviceFeed(experiment, 0), [3, 3])
    tolerance = TOLERANCES.get(name, 0)
    if name == "bfloat16":  # rounding may change momenta and single predictions
        states = [(s.params, s.batch_stats) for s in (at_once, one_by_one)]
    else:
        states = [at_once, one_by_one]
    chex.assert_trees_all_close(*states, rtol=tolerance, atol=tolerance)
    assert (at_once.step, at_once.totals.examples) == (6, 36)


def test_how_steps_are_grouped_and_where_images_lie_changes_no_bit():
    experiment = build_experiment(tiny_config(**SMALL))
    feeds = [DeviceFeed(experiment, 0), HostFeed(experiment, 0, is_stacked=True)]
    states = [after(experiment, feeds[0], [3, 1, 1, 1]), after(experiment, feeds[1], [3, 3])]
    chex.assert_trees_all_equal(*states)


def test_a_feed_begins_at_any_step():
    """Steps 4 to 6 of an epoch of 5 are what the sampler says, across the epoch's end."""
    experiment = build_experiment(tiny_config(**SMALL))
    sampler, train_split = experiment.sampler, experiment.dataset.train
    images, labels, indices = DeviceFeed(experiment, 3).next(3)
    host_images, host_labels = HostFeed(experiment, 3, is_stacked=True).next(3)
    for row, step in enumerate((3, 4, 5)):
        expected = train_split.take(sampler.indices(step))
        np.testing.assert_array_equal(images[indices[row]], expected.images)
        np.testing.assert_array_equal(labels[indices[row]], expected.labels)
        np.testing.assert_array_equal(host_images[row], expected.images)
        np.testing.assert_array_equal(host_labels[row], expected.labels)


@pytest.mark.slow
def test_the_first_bad_step_within_a_dispatch_is_named(tmp_path):
    """The first update is finite, and what it leads to is not."""
    rate = {"optimizer.learning_rate": 1e30, "schedule.name": "constant"}
    with pytest.raises(UserError, match=r"non-finite at step 2 \(learning rate 1e\+30\)"):
        train(tiny_config(**rate, **AT_ONCE), tmp_path)


@pytest.mark.parametrize("batch_size", [4, 11, 17])
def test_a_split_on_the_device_is_evaluated_as_batch_by_batch(batch_size):
    experiment = build_experiment(tiny_config(**SMALL, eval_batch_size=batch_size))
    variables = initial_state(experiment).eval_variables
    split = experiment.dataset.test
    resident = ResidentSplit(experiment, split).start(variables)()
    step, mesh = evaluation_step(experiment), experiment.mesh
    expected = evaluate(step, variables, split, batch_size=batch_size, mesh=mesh)
    assert resident.num_examples == 13
    np.testing.assert_array_equal(resident.labels, expected.labels)
    np.testing.assert_array_equal(resident.predicted, expected.predicted)
    np.testing.assert_allclose(resident.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(resident.confidence, expected.confidence, rtol=1e-5)


CONFIG = tiny_config(**AT_ONCE, **{"optimizer.ema_decay": 0.9, "checkpoint_every_steps": 5})


def final_state(workdir):
    target = abstract_state(build_experiment(CONFIG))
    return Checkpoints(workdir, read_only=True).restore("latest", target)


def untimed_metrics(workdir):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]


def recorded(monkeypatch, at_step=None, action=None):
    """Notes how many steps each dispatch takes; calls `action` in the one that passes a step."""
    taken, original = [], loop.training_step

    def wrapped(experiment, takes, **when):
        inner = original(experiment, takes, **when)

        def step_fn(state, *inputs):
            before = int(state.step)
            state = inner(state, *inputs)
            taken.append((before, int(state.step) - before))
            if at_step is not None and before < at_step <= before + taken[-1][1]:
                action()
            return state

        return step_fn

    monkeypatch.setattr(loop, "training_step", wrapped)
    return taken


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run, and its dispatches."""
    workdir = tmp_path_factory.mktemp("at_once")
    with pytest.MonkeyPatch.context() as patch:
        taken = recorded(patch)
        assert train(CONFIG, workdir).stopped_by is None
    return workdir, taken


@pytest.fixture
def uninterrupted(whole_run):
    return whole_run[0]


def test_a_run_of_four_at_once_is_the_run_of_one_at_a_time(uninterrupted, tmp_path):
    one = CONFIG.copy_and_resolve_references()
    one.update({"steps_per_dispatch": 1, "data": {"on_device": False}})
    train(one, tmp_path)
    (state, step), (expected, expected_step) = final_state(uninterrupted), final_state(tmp_path)
    assert step == expected_step == 18
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-5)
    lines, others = untimed_metrics(uninterrupted), untimed_metrics(tmp_path)
    for line, other in zip(lines, others, strict=True):
        assert line.pop("split") == other.pop("split")
        assert line == pytest.approx(other, rel=1e-4)


def test_dispatches_end_where_something_is_due(whole_run):
    """Checkpoints every 5 steps, epochs of 6: all at once where 4 fit in, else one by one."""
    _, taken = whole_run
    assert taken[:5] == [(0, 4), (4, 1), (5, 1), (6, 4), (10, 1)]
    assert {steps for _, steps in taken} == {1, 4}
    assert sum(steps for _, steps in taken) == 18
    # What is due every 2 steps leaves no more than 2 at once, an epoch no more than an epoch.
    assert [steps_at_once(step, 4, (6, 5, 2)) for step in (0, 2, 4, 5)] == [2, 2, 1, 1]
    assert steps_at_once(0, 100, (6, 0, 0)) == 6


# 3: within the first dispatch, before any checkpoint; 8: within a dispatch of the second epoch.
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_killed_within_a_dispatch_and_started_again(uninterrupted, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        """Like kill -9: nothing in the loop may catch it."""

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        recorded(patch, step, kill)
        with pytest.raises(Killed):
            train(CONFIG, tmp_path)
    train(CONFIG, tmp_path)
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(uninterrupted))
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)


# 9: ends at 10, a checkpoint; 12: an epoch's last step.
@pytest.mark.slow
@pytest.mark.parametrize(("step", "end"), [(8, 10), (12, 12)])
def test_a_signal_stops_after_the_dispatch(uninterrupted, tmp_path, monkeypatch, step, end):
    with monkeypatch.context() as patch:
        recorded(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(CONFIG, tmp_path)
    assert (result.step, result.stopped_by) == (end, signal.SIGTERM)
    assert final_state(tmp_path)[1] == end
    train(CONFIG, tmp_path)
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(uninterrupted))
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)


def test_where_images_lie(monkeypatch):
    """On a CPU only where asked; elsewhere where an eighth of the memory is enough."""
    experiment = build_experiment(tiny_config(**SMALL))
    size = (30 + 11) * 8 * 8 * 3
    assert not lies_on_device(experiment)
    for platform, memory, expected in [
        ("cpu", None, False),
        ("gpu", 8 * size, True),
        ("gpu", 8 * size - 1, False),
        ("tpu", None, True),
    ]:
        monkeypatch.setattr(feed, "_place", lambda _, p=platform, m=memory: feed._Place(p, m))
        assert lies_on_device(experiment) == expected
        for asked in (True, False):
            forced = build_experiment(tiny_config(**SMALL, **{"data.on_device": asked}))
            assert lies_on_device(forced) == asked
    monkeypatch.setattr(feed, "_place", lambda _: feed._Place("gpu", size - 1))
    with pytest.raises(UserError, match=r"data.on_device=True: the images take .* leave it unset"):
        lies_on_device(build_experiment(tiny_config(**SMALL, **{"data.on_device": True})))


class OnDisk:
    """Stands for a split that is read while it is used."""

    def __init__(self, split):
        self._split = split
        self.num_examples, self.image_shape = split.num_examples, split.image_shape

    def train_batches(self, sampler, start, stop, rows):
        for step in range(start, stop):
            yield tuple(self._split.take(sampler.indices(step)[rows]))


def test_a_streamed_set_is_sent_in_stacks_and_refuses_to_lie_on_the_device():
    asked = build_experiment(tiny_config(**SMALL, **{"data.on_device": True}))
    streamed = dataclasses.replace(asked.dataset, train=OnDisk(asked.dataset.train))
    with pytest.raises(UserError, match=r"data.on_device=True is for sets .* this one is streamed"):
        lies_on_device(asked._replace(dataset=streamed))
    config = tiny_config(**SMALL, steps_per_dispatch=3)
    sent = create_feed(asked._replace(dataset=streamed, config=config), 0)
    images, labels = sent.next(3)
    assert sent.takes == BATCHES
    for step in range(3):
        expected = asked.dataset.train.take(asked.sampler.indices(step))
        np.testing.assert_array_equal(images[step], expected.images)
        np.testing.assert_array_equal(labels[step], expected.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_dispatch": 0}, "steps_per_dispatch must be .* at least 1, got 0"),
        ({"steps_per_dispatch": -3}, "steps_per_dispatch must be .* at least 1, got -3"),
        ({"data.on_device": 1.5}, "data.on_device is True, False or unset, got 1.5"),
    ],
)
def test_values_that_mean_nothing(tmp_path, changes, message):
    config = tiny_config()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path)
