"""Whole runs, in process: resuming to the bit, stopping cleanly, one sentence for mistakes."""

from __future__ import annotations

import json
import os
import signal

import chex
import jax
import numpy as np
import pytest

from dfs_jax.interop import save_weights
from dfs_jax.training import loop
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.evaluate import evaluate, evaluate_run
from dfs_jax.training.experiment import (
    abstract_state,
    build_experiment,
    evaluation_step,
    initial_state,
)
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.step import step_keys
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

# 41 - 11 = 30 training examples in batches of 5: 6 steps an epoch, 18 in all.
CONFIG = tiny_config(**{"optimizer.ema_decay": 0.9, "checkpoint_every_steps": 4})
TIMINGS = ("images_per_second", "data_wait")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert train(CONFIG, workdir).stopped_by is None
    return workdir


def final_state(workdir, which="latest"):
    experiment = build_experiment(CONFIG)
    return Checkpoints(workdir, read_only=True).restore(which, abstract_state(experiment))


def untimed_metrics(workdir):
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(workdir)
    ]


def interrupt_at(monkeypatch, step, action):
    """Makes the loop call `action` after that step's update, wherever it is in its epoch."""
    original = loop.training_step

    def wrapped(experiment, takes, **when):
        inner = original(experiment, takes, **when)

        def step_fn(state, *batch):
            due = int(state.step) + 1 == step
            state = inner(state, *batch)
            if due:
                action()
            return state

        return step_fn

    monkeypatch.setattr(loop, "training_step", wrapped)


def ending(result):
    return result.step, result.stopped_by


def assert_same_run(workdir, reference):
    state, step = final_state(workdir)
    expected, expected_step = final_state(reference)
    assert step == expected_step == 18
    chex.assert_trees_all_equal(state, expected)
    assert untimed_metrics(workdir) == untimed_metrics(reference)


def test_a_run_writes_a_line_for_each_split_and_evaluation(uninterrupted):
    lines = read_metrics(uninterrupted)
    expected = [(6 * e, e, split) for e in (1, 2, 3) for split in ("train", "validation")]
    assert [(line["step"], line["epoch"], line["split"]) for line in lines] == expected
    for line in lines:
        accuracies = [line[f"exit{i}/accuracy"] for i in range(1, 4)]
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        assert line["images_per_second"] > 0
        assert line["loss"] > 0
    assert lines[-1]["ensemble/accuracy"] in [k / 11 for k in range(12)]


# 3: no checkpoint yet; 9: one within an epoch and one after an epoch; 12: an epoch's last step.
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9, 12])
def test_killed_and_started_again_ends_the_same(uninterrupted, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        """Like kill -9: nothing in the loop may catch it."""

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, step, kill)
        with pytest.raises(Killed):
            train(CONFIG, tmp_path)
    assert ending(train(CONFIG, tmp_path)) == (18, None)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (5, signal.SIGHUP),
        *(
            pytest.param(step, number, marks=pytest.mark.slow)
            for step, number in ((5, signal.SIGTERM), (6, signal.SIGTERM), (6, signal.SIGINT))
        ),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(uninterrupted, tmp_path, monkeypatch, step, number):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, lambda: os.kill(os.getpid(), number))
        assert ending(train(CONFIG, tmp_path)) == (step, number)
    assert signal.getsignal(number) == handler
    assert final_state(tmp_path)[1] == step
    train(CONFIG, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_stays_as_it_is(uninterrupted, tmp_path_factory):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert ending(train(CONFIG, uninterrupted)) == (18, None)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_the_best_checkpoint_is_the_best_on_validation_data(uninterrupted):
    scores = {
        line["step"]: np.mean([line[f"exit{i}/accuracy"] for i in range(1, 4)])
        for line in read_metrics(uninterrupted)
        if line["split"] == "validation"
    }
    best = max(scores, key=lambda step: (scores[step], step))
    evaluation = evaluate_run(uninterrupted, build_experiment(CONFIG), split="validation")
    assert evaluation.step == best
    found = evaluation.reported.correct().mean()
    assert found == pytest.approx(scores[best])


@pytest.mark.parametrize("batch_size", [1, 4, 13, 17])
def test_every_example_counts_once_whatever_the_batch(batch_size):
    experiment = build_experiment(CONFIG)
    state = initial_state(experiment)
    eval_step, split = evaluation_step(experiment), experiment.dataset.test
    found = evaluate(
        eval_step, state.eval_variables, split, batch_size=batch_size, mesh=experiment.mesh
    )
    whole = evaluate(eval_step, state.eval_variables, split, batch_size=13, mesh=experiment.mesh)
    assert found.num_examples == 13
    np.testing.assert_array_equal(found.labels, split.labels)
    np.testing.assert_allclose(found.confidence, whole.confidence, rtol=1e-5)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(**{"optimizer.learning_rate": 1e30, "checkpoint_every_steps": 1})
    with pytest.raises(UserError, match=r"non-finite at step (\d+) \(learning rate .*e\+") as error:
        train(config, tmp_path)
    assert "last good checkpoint: " in str(error.value)
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    for step in saved:
        state, _ = Checkpoints(tmp_path, read_only=True).restore(
            str(step), abstract_state(build_experiment(config))
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_without_validation_the_last_epoch_is_best_and_thresholds_come_from_train(tmp_path):
    config = tiny_config(**{"data.validation_examples": 0, "epochs": 1})
    experiment = train(config, tmp_path).experiment
    evaluation = evaluate_run(tmp_path, experiment)
    assert (evaluation.step, evaluation.fitting_split) == (8, "train")
    assert evaluation.fitting.num_examples == 41
    with pytest.raises(UserError, match="no validation split"):
        evaluate_run(tmp_path, experiment, split="validation")


def test_a_users_own_model_fork_loss_and_data_train(tmp_path):
    """Every component that goes by `package.module:attribute`, options included."""
    config = tiny_config(epochs=2, **{"optimizer.learning_rate": 0.5})
    with config.unlocked():
        config.model = {"name": "tests.support.helpers:TinyNetwork", "width": 5}
        config.fork = {"name": "tests.support.helpers:HalfFork", "factor": 0.5}
        config.loss = {"name": "tests.support.helpers:BrierLoss"}
    result = train(config, tmp_path)
    assert result.experiment.model.width == 5
    assert result.experiment.fork.factor == 0.5
    first, last = (line for line in read_metrics(tmp_path) if line["split"] == "train")
    assert last["loss"] < first["loss"]
    assert "exit2/accuracy" in last
    assert "exit3/accuracy" not in last


def test_a_trunk_starts_from_the_weights_of_another_run(uninterrupted, tmp_path):
    experiment = build_experiment(CONFIG)
    trained, _ = final_state(uninterrupted)
    save_weights(
        tmp_path / "weights.npz", {"params": trained.params, "batch_stats": trained.batch_stats}
    )
    changed = experiment.config.copy_and_resolve_references()
    changed.init_from = str(tmp_path / "weights.npz")
    started = initial_state(build_experiment(changed))
    fresh = initial_state(experiment)
    chex.assert_trees_all_equal(started.params["block3"], trained.params["block3"])
    chex.assert_trees_all_equal(started.batch_stats["block3"], trained.batch_stats["block3"])
    chex.assert_trees_all_equal(started.params["head3"], fresh.params["head3"])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path):
    network = {"model.name": "tests.support.helpers:TinyNetwork", "gradients.name": "pcgrad"}

    def parameters(name, seed):
        config = tiny_config(epochs=1, seed=seed, **network)
        result = train(config, tmp_path / name)
        template = abstract_state(result.experiment)
        checkpoints = Checkpoints(tmp_path / name, read_only=True)
        return checkpoints.restore("latest", template)[0].params

    first, again, other = (parameters(f"{i}", seed) for i, seed in enumerate((3, 3, 4)))
    chex.assert_trees_all_equal(first, again)
    kernels = [params["block1"]["kernel"] for params in (first, other)]
    assert not np.array_equal(*kernels)


def test_a_seed_reaches_each_purpose_by_a_key_of_its_own():
    """Augmentation, dropout and gradient rule of a step; initialisation; the order of examples."""
    states = [initial_state(build_experiment(tiny_config(seed=seed))) for seed in (0, 1)]
    kernels = [state.params["block1"]["conv"]["kernel"] for state in states]
    assert not np.array_equal(*kernels)
    states.append(states[0].replace(step=states[0].step + 1))
    keys = [key for state in states for key in step_keys(state)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 9
    changed = {"data.augmentation": "crop,flip", "batch_size": 3, "loss.name": "distillation"}
    chex.assert_trees_all_equal(
        initial_state(build_experiment(tiny_config(**changed))).params, states[0].params
    )
    orders = [build_experiment(tiny_config(seed=seed)).sampler.indices(0) for seed in (0, 1)]
    assert not np.array_equal(*orders)
    plain = tiny_config(**{"data.augmentation": "crop,flip", "model.width": 3})
    np.testing.assert_array_equal(build_experiment(plain).sampler.indices(0), orders[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "vgg99"}, "unknown model 'vgg99'.*vgg7"),
        ({"fork.name": "spoon"}, "unknown fork 'spoon'.*dfs, "),
        ({"loss.name": "found"}, "unknown loss 'found'.*byot, "),
        ({"fork.partition_ratio": (1.2,)}, r"partition_ratio must lie in \[0, 1\], got 1.2"),
        ({"fork.partition_ratio": (0.1, 0.2, 0.4)}, "3 exits take 1 or 2 partition ratios"),
        ({"fork.name": "plain", "fork.referencing": "none"}, "fork 'plain' has no option 'refer"),
        ({"loss.exit_weights": (1.0, 2.0)}, "3 exits take 3 exit_weights"),
        ({"optimizer.learning_rate": float("nan")}, "learning_rate .* got nan"),
        ({"batch_size": 31}, "batch_size 31 .* 30"),
        ({"model.name": "nowhere.here:Model"}, "there is no module 'nowhere'"),
        (
            {"data.name": "tests.support.helpers:no_images"},
            "tests.support.helpers has no 'no_images'",
        ),
        ({"init_from": "missing.npz"}, "missing.npz"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(tiny_config(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    if "init_from" in changes:
        assert not (tmp_path / "run").exists()


def test_report_files_are_strict_json(uninterrupted):
    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
