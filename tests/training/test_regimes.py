"""Regimes: a frozen trunk stays as it is, bit for bit, and costs no backward pass."""

from __future__ import annotations

import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from dfs_jax.costs.flops import exit_costs
from dfs_jax.costs.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.data.pipeline import train_batches
from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models.contract import split_trunk_and_heads
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import (
    abstract_state,
    build_experiment,
    initial_state,
    training_step,
)
from dfs_jax.training.loop import train
from dfs_jax.training.recalibrate import Recalibration
from dfs_jax.training.regimes import REGIMES, Regime, kept_trunk, scaled_trunk
from dfs_jax.training.sharding import put_batch
from dfs_jax.types import UserError
from tests.support.helpers import ThreeStageVGG, tiny_config
from tests.training.test_loop import interrupt_at

DECAY = {"optimizer.weight_decay": 0.1, "optimizer.learning_rate": 0.1}


def config_of(regime="frozen", method="dfs", **changes):
    config = tiny_config(**{**DECAY, "regime.name": regime, **changes})
    common.set_method(config, method)
    return config


def run_steps(experiment, count=3, start=0, state=None):
    state = initial_state(experiment) if state is None else state
    step = training_step(experiment, step=start)
    batches = train_batches(
        experiment.dataset.train, experiment.sampler, start, stop_step=start + count
    )
    for batch in batches:
        state = step(state, *put_batch(batch, experiment.mesh))
    return jax.device_get(state)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dfs", {}),
        pytest.param("ge", {"optimizer.name": "adamw"}, marks=pytest.mark.slow),
        ("byot", {"accumulate_steps": 5, "optimizer.gradient_clip": 0.5}),
        pytest.param("distillation", {"remat": True}, marks=pytest.mark.slow),
        pytest.param("wpn", {"batch_size": 6}, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_trunk_stays_as_it_is(method, changes):
    experiment = build_experiment(config_of(method=method, **changes))
    state = run_steps(experiment)
    start = jax.device_get(initial_state(experiment))
    for name in ("params", "batch_stats"):
        trunk, _ = split_trunk_and_heads(getattr(start, name))
        after, _ = split_trunk_and_heads(getattr(state, name))
        chex.assert_trees_all_equal(trunk, after)
    for name, head in split_trunk_and_heads(start.params)[1].items():
        same = jax.tree.map(np.array_equal, head, state.params[name])
        assert not any(jax.tree.leaves(same)), name
    assert np.isfinite(state.totals.loss)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names and names[0].startswith("block"):
            assert not np.any(leaf), path  # no momentum gathers


def test_heads_are_trained_as_by_a_loop_that_knows_only_them():
    config = config_of(**{"data.augmentation": "", "data.crop_padding": None})
    experiment = build_experiment(config)
    got = run_steps(experiment, count=3)
    start = jax.device_get(initial_state(experiment))
    trunk, heads = split_trunk_and_heads(start.params)
    dataset, loss = experiment.dataset, create_loss("deep_supervision")
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(experiment.schedule, momentum=0.9)
    )
    state = optimizer.init(heads)

    @jax.jit
    def step(heads, state, images, labels):
        def total(heads):
            x = (images / 255 - jnp.asarray(dataset.mean)) / jnp.asarray(dataset.std)
            variables = {"params": {**trunk, **heads}, "batch_stats": start.batch_stats}
            outputs = experiment.model.apply(variables, x, train=False)  # heads have no statistics
            return loss(outputs, labels).sum()

        updates, state_after = optimizer.update(jax.grad(total)(heads), state, heads)
        return optax.apply_updates(heads, updates), state_after

    for batch in train_batches(dataset.train, experiment.sampler, 0, stop_step=3):
        heads, state = step(heads, state, *batch)
    chex.assert_trees_all_close(split_trunk_and_heads(got.params)[1], heads, rtol=1e-5, atol=1e-6)


def test_the_trunk_has_its_own_rate():
    """With SGD without momentum or decay, its first update is the rate times that at rate 1."""
    plain = {"optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}
    slow, usual = (
        build_experiment(config_of("joint", **plain, **{"regime.trunk_rate": rate}))
        for rate in (0.25, None)
    )
    start = jax.device_get(initial_state(slow)).params
    moved = [jax.tree.map(np.subtract, run_steps(e, count=1).params, start) for e in (slow, usual)]
    (trunk, heads), (trunk_at_1, heads_at_1) = map(split_trunk_and_heads, moved)
    chex.assert_trees_all_close(
        trunk, jax.tree.map(lambda x: 0.25 * x, trunk_at_1), rtol=1e-3, atol=1e-7
    )
    chex.assert_trees_all_equal(heads, heads_at_1)


def test_a_frozen_step_has_no_backward_pass_through_the_trunk():
    """Forward, and for each head of 3 its weights' gradient: another forward of the heads."""
    model = ThreeStageVGG(num_classes=7, width=2)
    fork, loss, shape = create_fork("dfs"), create_loss("deep_supervision"), (8, 8, 3)
    frozen = model.clone(frozen_trunk=True)
    forward = exit_costs(model, shape)[-1].macs
    heads = sum(width * 7 for width in (2, 4, 8))
    for count in (traced_step_cost, theoretical_step_cost):
        cost = count(frozen, fork, loss, shape)
        assert cost == (forward, heads, 0)
        assert cost.total < count(model, fork, loss, shape).total / 2


def final_state(workdir, config):
    experiment = build_experiment(config)
    return Checkpoints(workdir, read_only=True).restore("latest", abstract_state(experiment))[0]


@pytest.mark.slow
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_mixed_run_is_frozen_then_joint_and_resumes_to_the_bit(tmp_path, monkeypatch, offset):
    changes = {"regime.frozen_epochs": 1, "epochs": 2, "recalibrate_examples": 10}
    config = config_of("mixed", **changes)
    whole = train(config, tmp_path / "whole")
    frozen = whole.experiment.frozen_steps
    assert frozen == whole.experiment.sampler.steps_per_epoch
    with monkeypatch.context() as patch:
        interrupt_at(patch, frozen + offset, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = train(config, tmp_path / "parts")
    assert stopped.step == frozen + offset
    trunks = [
        split_trunk_and_heads(jax.device_get(state.params))[0]
        for state in (initial_state(stopped.experiment), final_state(tmp_path / "parts", config))
    ]
    same = jax.tree.map(np.array_equal, *trunks)
    assert all(jax.tree.leaves(same)) == (offset <= 0)
    train(config, tmp_path / "parts")
    chex.assert_trees_all_equal(
        *(final_state(tmp_path / name, config) for name in ("whole", "parts"))
    )


@pytest.mark.slow
def test_several_steps_at_once_are_those_steps(tmp_path):
    changes = {"regime.frozen_epochs": 1, "epochs": 2}
    configs = [config_of("mixed", **changes, steps_per_dispatch=k) for k in (1, 3)]
    for k, config in enumerate(configs):
        train(config, tmp_path / str(k))
    states = [final_state(tmp_path / str(k), config).params for k, config in enumerate(configs)]
    chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-6)


def test_recalibration_leaves_a_frozen_trunks_statistics():
    experiment = build_experiment(config_of(**{"recalibrate_examples": 10}))
    state = run_steps(experiment, count=1)
    again = jax.device_get(Recalibration(experiment, 10, step=0)(state))
    chex.assert_trees_all_equal(again.batch_stats, state.batch_stats)
    joint = build_experiment(config_of("joint", **{"recalibrate_examples": 10}))
    changed = jax.device_get(Recalibration(joint, 10)(state)).batch_stats
    assert not np.array_equal(
        changed["block1"]["norm"]["mean"], state.batch_stats["block1"]["norm"]["mean"]
    )


# One row for each regime: its options, steps with a frozen trunk of 35, rate of the trunk.
REGIME_ROWS = {
    "joint": ({"trunk_rate": 0.5}, 0, 0.5),
    "frozen": ({}, 35, 1.0),
    "mixed": ({"frozen_epochs": 2, "trunk_rate": 0.1}, 14, 0.1),
}


@pytest.mark.parametrize("name", REGIME_ROWS)
def test_each_regime(name):
    options, frozen, rate = REGIME_ROWS[name]
    regime = REGIMES.create(name, **options)
    assert (regime.frozen_steps(35, 7), regime.trunk_rate) == (frozen, rate)


def test_parts_of_states_by_hand():
    before = {"block1": jnp.zeros(2), "head1": jnp.zeros(2)}, 3
    after = {"block1": jnp.ones(2), "head1": jnp.ones(2)}, 4
    kept, count = kept_trunk(before, after)
    assert (kept["block1"].sum(), kept["head1"].sum(), count) == (0, 2, 4)
    scaled = scaled_trunk(after[0], 0.5)
    assert (scaled["block1"].sum(), scaled["head1"].sum()) == (1, 2)
    assert Regime(None).frozen_steps(35, 7) == 35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regime.name": "slow"}, "unknown regime 'slow': choose one of frozen, joint, mixed"),
        ({"regime.name": "mixed"}, "missing a required argument: 'frozen_epochs'"),
        ({"regime.name": "mixed", "regime.frozen_epochs": 3}, "leaves none of the 3 epochs"),
        ({"regime.name": "mixed", "regime.frozen_epochs": 0}, "whole number of at least 1"),
        ({"regime.name": "frozen", "regime.trunk_rate": 0.5}, "has no option 'trunk_rate'"),
        ({"regime.trunk_rate": 0.0}, "finite number above 0, got 0.0"),
        ({"regime.name": "frozen", "gradients.name": "pcgrad"}, "works on the trunk's gradients"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(tiny_config(**changes))


def test_a_random_trunk_that_is_frozen_is_warned_of(caplog):
    initial_state(build_experiment(config_of()))
    assert "freezes a trunk of random weights: set init_from" in caplog.text
