"""WPN: worked by hand, who leaves where against an obvious loop, weights, mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.exits.distribution import exit_distribution
from dfs_jax.gradients import Batch
from dfs_jax.gradients.wpn import WPN, assigned
from dfs_jax.losses import create_loss
from dfs_jax.types import ExitOutputs
from tests.support.meta_problems import KEY, RATE, adams_mean, scalars, start, step_parts

ORIGIN = {"block1": jnp.float32(0), "block2": jnp.float32(0)}
# Halves are every other example: (1, 3) and (2, 1), of which 2 is the more confident one.
BATCH = Batch(jnp.array([1.0, 2.0, 3.0, 1.0]), jnp.array([1.0, 3.0, 2.0, -1.0]), KEY, KEY)
METHOD = WPN(strength=0.5, p=1.0, hidden_size=3, weight_decay=0.0, learning_rate=0.25)


def first_step(method, batch=BATCH):
    """From a network of zeros: all weights are 1, and only its last bias learns."""
    state = method.init(ORIGIN, 2, KEY)
    state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    return method.wrap(step_parts(scalars))(start(ORIGIN), state, batch)


def test_a_step_worked_by_hand():
    """Both exits' gradients are -(1 * 1 + 3 * 2) / 2 = -7/2 on the first half.

    The trial with weights w_i of 1 is p_i = r w_i 7/2 = 0.35. On the second half exit 1 keeps the
    first example, x = 2, y = 3, and exit 2 the other, x = 1, y = -1; so d/dw_1 is
    7/2 r 2 (2 * 0.35 - 3) = -1.61 and d/dw_2 is 7/2 r (0.35 + 1) = 0.4725. The biases b_i move
    w_i by e/2 and the other one by -e/2: d/db_1 = e/2 (-1.61 - 0.4725) = -0.520625 = -d/db_2.
    Adam's first step makes b = (0.25, -0.25), and the step is taken with 1 +- e tanh 0.25.
    """
    found = first_step(METHOD)
    bias = adams_mean(found.state.opt_state)["params"]["Dense_1"]["bias"]
    np.testing.assert_allclose(bias, [-0.520625, 0.520625], rtol=1e-5)
    np.testing.assert_allclose(
        found.state.params["params"]["Dense_1"]["bias"], [0.25, -0.25], rtol=1e-5
    )
    weights = 1 + 0.5 * np.tanh([0.25, -0.25])
    gradient = np.mean([1 * 1, 2 * 3, 3 * 2, 1 * -1])
    moved = [found.trained.params["block1"], found.trained.params["block2"]]
    np.testing.assert_allclose(moved, RATE * weights * gradient, rtol=1e-5)


def test_exchanged_halves_teach_twice():
    """The second trial is on (2, 1), by the weights that the first taught; its gradient is 5/2."""
    found = first_step(WPN(**{**vars(METHOD), "exchange": True}))
    weights = 1 + 0.5 * np.tanh([0.25, -0.25])
    ahead = RATE * weights * 2.5
    slopes = 2.5 * RATE * np.array([3 * (3 * ahead[0] - 2), ahead[1] - 1])
    second = 0.25 * (1 - np.tanh(0.25) ** 2) * (slopes[0] - slopes[1])
    mean = adams_mean(found.state.opt_state)["params"]["Dense_1"]["bias"][0]
    assert float(mean) == pytest.approx(0.9 * -0.520625 + second, rel=1e-4)


def test_the_network_learns_at_intervals_and_weighs_at_every_step():
    method = WPN(**{**vars(METHOD), "interval": 3})
    state, trained = method.init(ORIGIN, 2, KEY), start(ORIGIN)
    step = jax.jit(method.wrap(step_parts(scalars)))
    changed = []
    for _ in range(5):
        before = state.params
        trained, state, *_ = step(trained, state, BATCH)
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.params)
        changed.append(any(jax.tree.leaves(moved)))
    assert changed == [True, False, False, True, False]


@pytest.mark.parametrize(("centre", "axes"), [("all", None), ("examples", 1), ("exits", 0)])
def test_weights_have_mean_one_over_what_is_asked(centre, axes):
    method = WPN(centre=centre, strength=0.4)
    theta = method.init(ORIGIN, 3, KEY).params
    losses = jnp.asarray(np.random.default_rng(0).exponential(size=(3, 7)), jnp.float32)
    weights = np.asarray(method.weigh(theta, losses))
    np.testing.assert_allclose(weights.mean(axes), 1, rtol=1e-5)
    assert weights.std() > 1e-3
    assert np.abs(weights - 1).max() < 2 * 0.4
    order = np.array([3, 0, 6, 1, 2, 5, 4])  # an example's weights depend on its own losses
    np.testing.assert_allclose(method.weigh(theta, losses[:, order]), weights[:, order], rtol=1e-5)


def obvious_assignment(confidence, p):
    exits, n = confidence.shape
    shares, left = exit_distribution(p, exits), list(range(n))
    rows = np.zeros((exits, n), bool)
    for i in range(exits):
        best = sorted(left, key=lambda k: -confidence[i, k])
        taken = best if i == exits - 1 else best[: int(np.floor(n * shares[i]))]
        rows[i, taken] = True
        left = [k for k in left if k not in taken]
    return rows


@pytest.mark.parametrize("p", [0.05, 0.75, 1.0, 2.0])
def test_who_leaves_where(p):
    rng = np.random.default_rng(1)
    for exits, n in ((4, 11), (1, 3), (5, 2)):
        confidence = rng.uniform(size=(exits, n)).astype(np.float32)
        found = np.asarray(assigned(jnp.asarray(confidence), p))
        np.testing.assert_array_equal(found, obvious_assignment(confidence, p))
        np.testing.assert_array_equal(found.sum(0), 1)


@pytest.mark.parametrize("name", ["deep_supervision", "byot", "distillation"])
def test_losses_are_the_means_of_their_examples(name):
    rng = np.random.default_rng(2)
    outputs = ExitOutputs(
        jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32),
        tuple(jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(3)),
    )
    loss, labels = create_loss(name, label_smoothing=0.1), jnp.array([0, 1, 1, 0, 1])
    by_example = loss.example_losses(outputs, labels)
    assert by_example.shape == (3, 5)
    np.testing.assert_allclose(by_example.mean(1), loss(outputs, labels), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1"),
        ({"hidden_layers": 0}, "hidden_layers must be a whole number"),
        ({"interval": 0}, "interval must be a whole number"),
        ({"strength": 1.0}, r"strength must lie in \[0, 1\)"),
        ({"centre": "mat"}, "centre must be one of all, examples, exits, got 'mat'"),
        ({"p": 0.0}, "the budget parameter p must be above 0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        WPN(**options)
