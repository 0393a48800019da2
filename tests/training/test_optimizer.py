"""Optimizers and schedules against PyTorch's formulas, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from dfs_jax.training.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    create_optimizer,
    create_schedule,
)
from dfs_jax.types import UserError

GRADIENTS = ([3.0, -4.0], [-1.0, 2.0], [0.5, 0.25])
# One row for each registered name: options that differ from the defaults.
OPTIMIZER_ROWS = {
    "sgd": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1},
}
SCHEDULE_ROWS = {"constant": {}, "multistep": {"decay_epochs": (2,)}, "cosine": {}}


def config_of(section, **changes):
    config = common.get_config()[section]
    config.update(changes)
    return config


def run(optimizer, start=(1.0, 2.0)):
    params = jnp.array(start)
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def pytorch_sgd(learning_rate, momentum, weight_decay, nesterov, clip=None, start=(1.0, 2.0)):
    """The loop of PyTorch's documentation, `weight_decay` coupled, dampening 0."""
    w, m = np.array(start), None
    for gradient in map(np.array, GRADIENTS):
        if clip is not None:
            gradient = gradient * min(1, clip / np.linalg.norm(gradient))
        g = gradient + weight_decay * w
        m = g if m is None else momentum * m + g
        w = w - learning_rate * (g + momentum * m if nesterov else m)
    return w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("clip", [None, 2.5])
def test_sgd_is_pytorchs(nesterov, weight_decay, clip):
    config = config_of(
        "optimizer", nesterov=nesterov, weight_decay=weight_decay, gradient_clip=clip
    )
    optimizer = create_optimizer(config, optax.constant_schedule(0.05))
    expected = pytorch_sgd(0.05, 0.9, weight_decay or 0.0, nesterov, clip)
    np.testing.assert_allclose(run(optimizer), expected, rtol=1e-6)


def test_adamw_decays_apart_from_the_gradient():
    """Its first step moves each weight by the learning rate, plus the decay."""
    config = config_of("optimizer", name="adamw", weight_decay=0.1)
    optimizer = create_optimizer(config, optax.constant_schedule(0.05))
    params = jnp.array([1.0, 2.0])
    updates, _ = optimizer.update(jnp.array([3.0, -4.0]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.05 - 0.005, 0.05 - 0.01], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.table))
def test_every_optimizer_minimises_and_keeps_its_state_under_jit(name):
    config = config_of("optimizer", name=name, **OPTIMIZER_ROWS[name])
    optimizer = create_optimizer(config, optax.constant_schedule(0.02))
    params = jnp.array([1.0, -2.0, 3.0])
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(2 * params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert float(jnp.abs(params).max()) < 0.05


@pytest.mark.parametrize("name", sorted(SCHEDULES.table))
def test_every_schedule_starts_at_the_rate_and_never_rises(name):
    schedule = create_schedule(config_of("schedule", name=name, **SCHEDULE_ROWS[name]), 0.3, 5, 7)
    rates = np.array([float(schedule(step)) for step in range(35)])
    assert rates[0] == pytest.approx(0.3)
    assert (np.diff(rates) <= 1e-9).all()
    assert rates[-1] > 0


def test_multistep_decays_at_the_start_of_its_epochs():
    config = config_of("schedule", name="multistep", decay_epochs=(1, 3), decay_factor=0.5)
    schedule = create_schedule(config, 0.8, 5, 7)
    rates = [float(schedule(step)) for step in (6, 7, 20, 21, 34)]
    assert rates == pytest.approx([0.8, 0.4, 0.4, 0.2, 0.2])


def test_cosine_by_hand():
    schedule = create_schedule(config_of("schedule", name="cosine"), 0.8, 2, 6)
    assert [float(schedule(step)) for step in (0, 3, 6)] == pytest.approx(
        [0.8, 0.4 * (1 + 2**-0.5), 0.4]
    )


def test_warm_up_scales_the_first_steps():
    config = config_of("schedule", name="constant", warmup_epochs=0.5)
    schedule = create_schedule(config, 0.8, 5, 8)
    assert [float(schedule(step)) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", -0.1),
        ("learning_rate", float("inf")),
        ("ema_decay", 1.0),
        ("weight_decay", -1e-4),
        ("gradient_clip", 0.0),
    ],
)
def test_values_no_run_can_mean(field, value):
    with pytest.raises(UserError, match=f"optimizer.{field} .* got {value}"):
        check_optimizer(config_of("optimizer", **{field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "multistep", "decay_epochs": (2, 5)}, r"decay_epochs \[5\] .* 5 epochs"),
        ({"name": "multistep"}, "decay_epochs"),
        ({"name": "cosine", "decay_epochs": (2,)}, "no option 'decay_epochs'"),
        ({"warmup_epochs": 5.0}, "warmup_epochs must lie in"),
        ({"name": "linear"}, "unknown schedule 'linear'.*constant, cosine, multistep"),
    ],
)
def test_schedules_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        create_schedule(config_of("schedule", **changes), 0.1, 5, 7)
