"""Meta-GF: worked by hand, fused gradients, rounds against an obvious loop, mistakes."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfs_jax.gradients import Batch
from dfs_jax.gradients.meta_gf import MetaGF
from dfs_jax.types import TrunkAndHeads
from tests.support.meta_problems import KEY, RATE, adams_mean, start, step_parts

# Both exits read both parameters: l_i = |w - c_i|^2 / 2, an example for each coordinate.
CENTRES = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)


def shared(params, images):
    """Each exit's loss is that of its own centre: `[exits, batch]`, batch = coordinates."""
    del images
    return np.sqrt(2).astype(np.float32) * (params["block1"] - CENTRES)


BATCH = Batch(jnp.zeros(2), jnp.zeros(2), KEY, KEY)
ORIGIN = {"block1": jnp.zeros(2)}


def first_step(method):
    parts = step_parts(shared)
    state = method.init(ORIGIN, 2, KEY)
    return method.wrap(parts)(start(ORIGIN), state, BATCH)


def test_a_step_worked_by_hand():
    """At w = 0 the gradients are -c_i, and the trial with equal weights is w' = r (c_1 + c_2).

    There the losses' gradient is 2 w' - c_1 - c_2 = (2 r - 1) (1, 2). Weight a_1 grows by v_1 at a
    rate of 1/4 while a_2 shrinks, and the update is 2 r (a_1 c_1 + a_2 c_2); so d/dv_1 is
    (2 r - 1) (1, 2) . r / 2 (c_1 - c_2) = -3/2 r (2 r - 1) = 0.12 at r = 0.1: v_1 falls by Adam's
    first step, its learning rate, v_2 grows by it, and the step is taken with those.
    """
    found = first_step(MetaGF(learning_rate=0.25))
    np.testing.assert_allclose(adams_mean(found.state.opt_state)["block1"], [0.12, -0.12], 1e-5)
    np.testing.assert_allclose(found.state.logits["block1"], [-0.25, 0.25], rtol=1e-5)
    first = 1 / (1 + np.exp(0.5))
    expected = 2 * RATE * np.array([first, 2 * (1 - first)])
    np.testing.assert_allclose(found.trained.params["block1"], expected, rtol=1e-5)
    assert float(found.loss) == pytest.approx(0.5 + 2.0)


def test_the_trial_is_the_optimizers_own():
    """With momentum from a step before, the trial lies elsewhere, and so does the gradient."""
    optimizer = optax.sgd(RATE, momentum=0.9)
    method, parts = MetaGF(), step_parts(shared, optimizer)
    trained = start(ORIGIN, optimizer)
    moving, _ = parts.update(trained, {"block1": jnp.array([-1.0, 0.0])})
    moving = moving._replace(params=ORIGIN)
    found = method.wrap(parts)(moving, method.init(ORIGIN, 2, KEY), BATCH)
    ahead = RATE * (np.array([1.0, 2.0]) + 0.9 * np.array([1.0, 0.0]))
    slope = (2 * ahead - [1, 2]) @ (CENTRES[0] - CENTRES[1]) * RATE / 2
    np.testing.assert_allclose(adams_mean(found.state.opt_state)["block1"][0], slope, rtol=1e-5)


def test_adams_root_without_a_gradient_leaves_no_hole():
    """A coordinate that no exit moves has no slope in Adam's root, and takes nothing with it."""
    optimizer, at = optax.adam(RATE), {"block1": jnp.zeros(3)}

    def flat(params, images):
        return shared({"block1": params["block1"][:2]}, images)

    method = MetaGF()
    step = method.wrap(step_parts(flat, optimizer))
    found = step(start(at, optimizer), method.init(at, 2, KEY), BATCH)
    learned = [*jax.tree.leaves(found.state.logits), *jax.tree.leaves(found.trained.params)]
    assert all(np.isfinite(leaf).all() for leaf in learned)


def test_weights_that_learn_lower_the_losses_more_than_equal_ones():
    def losses(method, steps=40):
        parts, state = step_parts(shared), method.init(ORIGIN, 2, KEY)
        trained, step = start(ORIGIN), jax.jit(method.wrap(parts))
        for _ in range(steps):
            trained, state, loss, *_ = step(trained, state, BATCH)
        return float(loss)

    # Equal weights are the plain sum, which ends at the best point; few steps do not get there.
    assert losses(MetaGF(learning_rate=0.1), 4) < losses(MetaGF(learning_rate=1e-6), 4)


def test_equal_gradients_give_their_sum_whatever_the_weights():
    logits = {"block1": jnp.array([0.3, -1.0, 2.0]), "block2": jnp.array([5.0, 1.0, 0.5])}
    row = jnp.array([2.0, -3.0])
    grads = TrunkAndHeads({"block1": jnp.tile(row, (3, 1)), "block2": jnp.tile(row, (2, 1))}, {})
    for normalisation in ("softmax", "sigmoid"):
        fused = MetaGF(normalisation=normalisation).fused(grads, logits)
        np.testing.assert_allclose(fused["block1"], 3 * row, rtol=1e-6)
        np.testing.assert_allclose(fused["block2"], 2 * row, rtol=1e-6)
        mean = MetaGF(normalisation=normalisation, scaling="mean").fused(grads, logits)
        np.testing.assert_allclose(mean["block1"], row, rtol=1e-6)


def test_weights_are_of_the_last_exits_and_heads_keep_theirs():
    logits = {"block2": jnp.log(jnp.array([9.0, 1.0, 3.0]))}
    grads = TrunkAndHeads({"block2": jnp.array([[4.0], [8.0]])}, {"head1": jnp.array([7.0])})
    fused = MetaGF(scaling="mean").fused(grads, logits)
    np.testing.assert_allclose(fused["block2"], [0.25 * 4 + 0.75 * 8], rtol=1e-6)
    np.testing.assert_array_equal(fused["head1"], [7.0])
    logits = {"block2": jnp.array([0.0, 1.0, -1.0])}
    sigmoid = MetaGF(scaling="mean", normalisation="sigmoid").fused(grads, logits)
    first, second = (1 / (1 + np.exp(-v)) for v in (1.0, -1.0))
    expected = (first * 4 + second * 8) / (first + second)
    np.testing.assert_allclose(sigmoid["block2"], [expected], rtol=1e-6)


def test_exits_without_a_gradient_take_no_part():
    logits = {"block1": jnp.array([100.0, 1.0, 2.0])}
    rows = jnp.array([[0.0, 0.0], [1.0, 2.0], [3.0, 5.0]])
    fuse = MetaGF().fused
    fused = fuse(TrunkAndHeads({"block1": rows}, {}), logits)
    alone = fuse(TrunkAndHeads({"block1": rows[1:]}, {}), logits)
    np.testing.assert_allclose(fused["block1"], alone["block1"], rtol=1e-6)
    nothing = TrunkAndHeads({"block1": jnp.zeros_like(rows)}, {})
    np.testing.assert_array_equal(fuse(nothing, logits)["block1"], 0)
    slopes = jax.grad(lambda v: fuse(nothing, v)["block1"].sum())(logits)
    np.testing.assert_array_equal(slopes["block1"], 0)
    broken = fuse(TrunkAndHeads({"block1": rows.at[1, 0].set(jnp.nan)}, {}), logits)
    assert not np.isfinite(broken["block1"]).all()


def test_channels_have_weights_of_their_own():
    """A fork that cuts channels leaves each to the exits that train it."""
    method = MetaGF(granularity="channel")
    kernel = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    kernel[0, :, 0] = 0  # exit 1 trains channel 2 alone
    logits = method.init({"block1": jnp.zeros((5, 2))}, 3, KEY).logits
    assert logits["block1"].shape == (3, 2)
    logits = {"block1": logits["block1"].at[1, 0].set(np.log(3))}
    fused = method.fused(TrunkAndHeads({"block1": jnp.asarray(kernel)}, {}), logits)["block1"]
    first = 2 * (0.75 * kernel[1, :, 0] + 0.25 * kernel[2, :, 0])
    np.testing.assert_allclose(fused[:, 0], first, rtol=1e-5)
    np.testing.assert_allclose(fused[:, 1], kernel[:, :, 1].sum(0), rtol=1e-5, atol=1e-6)


WINDOW, AUXILIARY, MEMORY, LEARNING_RATE = 3, 0.2, 0.6, 0.05


def obvious_rounds(rounds):
    """Two exits trained in turn from the same start, then their weights, as a plain loop."""
    w, v = np.zeros(2), np.zeros(2)
    adam = optax.adam(LEARNING_RATE)
    adam_state = adam.init(jnp.zeros(2))
    for _ in range(rounds):
        moved = []
        for exit_index in range(2):
            own = w.copy()
            factors = np.where(np.arange(2) == exit_index, 1, AUXILIARY)
            for _ in range(WINDOW):
                own = own - RATE * (factors[:, None] * (own - CENTRES)).sum(0)
            moved.append(own - w)
        before, moved = v, np.stack(moved)
        for _ in range(WINDOW):
            a = np.exp(v) / np.exp(v).sum()
            slope = (2 * (w + a @ moved) - CENTRES.sum(0)) @ (a[:, None] * (moved - a @ moved)).T
            update, adam_state = adam.update(jnp.asarray(slope, jnp.float32), adam_state)
            v = v + np.asarray(update)
        w = w + (np.exp(v) / np.exp(v).sum()) @ moved
        v = MEMORY * before + (1 - MEMORY) * v
    return w, v


def test_rounds_are_the_published_loop():
    method = MetaGF(LEARNING_RATE, window=WINDOW, auxiliary=AUXILIARY, memory=MEMORY)
    step = jax.jit(method.wrap(step_parts(shared)))
    trained, state = start(ORIGIN), method.init(ORIGIN, 2, KEY)
    for rounds in range(3):
        w, v = obvious_rounds(rounds)
        np.testing.assert_allclose(trained.params["block1"], w, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.logits["block1"], v, rtol=1e-4, atol=1e-6)
        for taken in range(3 * WINDOW):
            unchanged = trained.params
            trained, state, *_ = step(trained, state, BATCH)
            if taken < 3 * WINDOW - 1:  # the run's own parameters wait for the end of the round
                chex.assert_trees_all_equal(trained.params, unchanged)
    assert np.abs(trained.params["block1"]).min() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"granularity": "layer"}, "granularity must be one of tensor, channel, got 'layer'"),
        ({"normalisation": "none"}, "normalisation must be one of softmax, sigmoid"),
        ({"scaling": "max"}, "scaling must be one of sum, mean, got 'max'"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"memory": 0.9}, "memory=0.9 has no effect without a window"),
        ({"auxiliary": 0.1}, "auxiliary=0.1 has no effect without a window"),
        ({"window": 3, "memory": 1.0}, r"memory must lie in \[0, 1\), got 1.0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MetaGF(**options)
