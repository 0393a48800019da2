"""Every registered gradient rule: what all of them promise, on a problem of two parameters."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest

from dfs_jax.gradients import RULES, Batch, GradientRule, create_rule
from tests.support.meta_problems import scalars, start, step_parts

RULE_ROWS = {
    "sum": {},
    "weighted_sum": {"weights": (1.0, 2.0)},
    "pcgrad": {},
    "cagrad": {"radius": 0.3},
    "nash_mtl": {},
    "upgrad": {},
    "meta_gf": {},
    "wpn": {"hidden_size": 3},
}
PARAMS = {"block1": jnp.float32(3.0), "block2": jnp.float32(-2.0)}
BATCH = Batch(
    jnp.array([1.0, 2.0, 3.0, -1.0]),
    jnp.array([1.0, 2.0, 3.0, -1.0]),  # the best parameters are 1 and 1
    jax.random.key(5),
    jax.random.key(6),
)


def test_every_rule_has_its_row():
    assert RULE_ROWS.keys() == RULES.table.keys()


@pytest.mark.parametrize("name", RULE_ROWS)
def test_steps_keep_the_form_of_what_they_change_and_lower_the_losses(name):
    rule = create_rule(name, **RULE_ROWS[name])
    assert isinstance(rule, GradientRule)
    trained = start(PARAMS)
    state = rule.init(PARAMS, 2, jax.random.key(7))
    step = jax.jit(rule.wrap(step_parts(scalars)))
    losses = []
    for _ in range(20):
        outcome = step(trained, state, BATCH)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            (outcome.trained, outcome.state), (trained, state)
        )
        moved = jax.tree.map(jnp.subtract, outcome.trained.params, trained.params)
        chex.assert_trees_all_close(moved, outcome.updates, atol=1e-5)
        trained, state = outcome.trained, outcome.state
        losses.append(float(outcome.loss))
    assert step._cache_size() == 1
    assert losses[-1] < 0.1 * losses[0]


def test_flags_say_what_a_step_needs():
    flags = {
        name: (rule.is_plain_sum, rule.takes_exit_gradients, rule.looks_ahead)
        for name, rule in ((name, create_rule(name, **row)) for name, row in RULE_ROWS.items())
    }
    assert flags.pop("sum") == (True, False, False)
    assert flags.pop("meta_gf") == (False, True, True)
    assert flags.pop("wpn") == (False, False, True)
    assert set(flags.values()) == {(False, True, False)}
