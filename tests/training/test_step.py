"""One training step: what it changes, what it counts, what it notices."""

from __future__ import annotations

import traceback

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from dfs_jax.forks import create_fork
from dfs_jax.gradients.summed import Sum
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.training.experiment import build_experiment, initial_state, training_step
from dfs_jax.training.sharding import (
    check_batch_size,
    create_mesh,
    put_batch,
    replicated,
    round_up_to_devices,
)
from dfs_jax.training.state import NO_BAD_STEP, create_state
from dfs_jax.training.step import make_eval_step, make_train_step, step_keys
from dfs_jax.types import UserError
from tests.support.helpers import TinyNetwork, tiny_config

BATCH, CLASSES, RATE = 5, 3, 0.05
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
MODEL = create_model("vgg7", num_classes=CLASSES, width=2)
FORK = create_fork("dfs")
LOSS = create_loss("deep_supervision")
MESH = create_mesh()


def augment(images, key):
    """Draws one number for the whole batch, so that the key is seen to change every step."""
    return images + jax.random.randint(key, (), 0, 7).astype(jnp.uint8)


def batch(seed=0):
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 200, (BATCH, 8, 8, 3)).astype(np.uint8)
    return images, draw.integers(0, CLASSES, BATCH).astype(np.int32)


def fresh_state(optimizer, keep_average=False):
    variables = init_variables(MODEL, jax.random.key(3), (8, 8, 3))
    state = create_state(
        variables, optimizer, jax.random.key(7), num_exits=6, keep_average=keep_average
    )
    return jax.device_put(state, replicated(MESH))


@pytest.fixture(scope="module")
def averaging():
    """A step that keeps a moving average, with its optimizer; compiled once for the module."""
    optimizer = optax.sgd(RATE, momentum=0.9)
    step = make_train_step(
        MODEL, FORK, LOSS, Sum(), optimizer, augment, mean=MEAN, std=STD, mesh=MESH, ema_decay=0.75
    )
    return optimizer, step


@jax.jit
def obvious_step(state, images, labels):
    """The same step by the book, for SGD's first step: momentum has nothing to add yet."""
    pixels = augment(images, step_keys(state).augment).astype(jnp.float32) / 255
    pixels = (pixels - jnp.array(MEAN)) / jnp.array(STD)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, updated = MODEL.apply(variables, pixels, FORK, train=True, mutable=["batch_stats"])
        return LOSS(outputs, labels).sum(), (outputs.logits, updated["batch_stats"])

    (loss, (logits, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    params = jax.tree.map(lambda w, g: w - RATE * g, state.params, grads)
    return params, stats, loss, (jnp.argmax(logits, -1) == labels).sum(axis=1)


def test_a_step_is_the_obvious_one(averaging):
    optimizer, step = averaging
    images, labels = batch()
    params, stats, loss, correct = obvious_step(fresh_state(optimizer, True), images, labels)
    state = step(fresh_state(optimizer, True), *put_batch((images, labels), MESH))
    chex.assert_trees_all_close(state.params, params, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(state.batch_stats, stats, rtol=1e-5, atol=1e-6)
    assert float(state.totals.loss) == pytest.approx(BATCH * float(loss), rel=1e-5)
    assert state.totals.correct.tolist() == correct.tolist()
    assert (int(state.step), int(state.totals.examples)) == (1, BATCH)
    assert int(state.first_bad_step) == NO_BAD_STEP


def test_the_average_follows_the_parameters(averaging):
    optimizer, step = averaging
    before = fresh_state(optimizer, True)
    start = jax.device_get({"params": before.params, "batch_stats": before.batch_stats})
    state = step(before, *put_batch(batch(), MESH))
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, start, trained)
    chex.assert_trees_all_close(state.averaged, expected, rtol=1e-5, atol=1e-6)
    assert state.eval_variables is state.averaged


def test_steps_sum_up_and_their_keys_differ(averaging):
    optimizer, step = averaging
    state = fresh_state(optimizer, True)
    first = jax.random.key_data(jnp.stack(step_keys(state))).tolist()
    for seed in range(3):
        state = step(state, *put_batch(batch(seed), MESH))
    assert (int(state.step), int(state.totals.examples)) == (3, 3 * BATCH)
    assert jax.random.key_data(jnp.stack(step_keys(state))).tolist() != first
    assert step._cache_size() == 1  # one program for every step
    assert state.params["block1"]["conv"]["kernel"].sharding.is_fully_replicated


def test_the_first_bad_step_is_recorded_and_stays(averaging):
    optimizer, step = averaging
    state = step(fresh_state(optimizer, True), *put_batch(batch(), MESH))
    broken = jax.tree.map(lambda x: x * jnp.nan, state.params)
    state = state.replace(params=jax.device_put(broken, replicated(MESH)))
    for seed in (1, 2):
        state = step(state, *put_batch(batch(seed), MESH))
    assert int(state.first_bad_step) == 1  # the second step, 0-based


def test_evaluation_leaves_out_the_padding_and_uses_running_statistics(averaging):
    optimizer, _ = averaging
    variables = fresh_state(optimizer).eval_variables
    eval_step = make_eval_step(MODEL, FORK, mean=MEAN, std=STD, mesh=MESH)
    images, labels = batch()
    whole = jax.device_get(eval_step(variables, *put_batch((images, labels), MESH)))
    other = np.concatenate([images[:2], np.zeros((3, 8, 8, 3), np.uint8)])
    part = jax.device_get(eval_step(variables, *put_batch((other, labels), MESH)))
    np.testing.assert_allclose(whole.confidence[:, :2], part.confidence[:, :2], rtol=1e-6)


def mesh_of(count):
    """A mesh that claims `count` devices; only its shape is asked for."""
    return Mesh(np.array([jax.devices()[0]] * count), ("data",))


def test_batches_and_devices():
    check_batch_size(6, mesh_of(3))
    assert round_up_to_devices(7, mesh_of(3)) == 9
    for size in (7, 0, -3):
        with pytest.raises(UserError, match=rf"batch_size {size} .* 3 device.*multiple of 3"):
            check_batch_size(size, mesh_of(3))


def test_two_functions_stand_between_a_training_step_and_the_model():
    """The rule's step and the loss; what transforms the loss stands in between, as JAX does."""
    seen = []

    class Watched(TinyNetwork):
        def block(self, i, carry, *, train):
            seen.append(
                [frame for frame in traceback.extract_stack() if "dfs_jax" in frame.filename]
            )
            return super().block(i, carry, train=train)

    experiment = build_experiment(tiny_config())
    model = Watched(num_classes=experiment.dataset.num_classes)
    experiment = experiment._replace(model=model)
    state = initial_state(experiment)
    images = jnp.zeros((6, *experiment.dataset.image_shape), jnp.uint8)
    seen.clear()
    training_step(experiment).trace(state, images, jnp.zeros(6, jnp.int32))
    names = [frame.name for frame in seen[0] if "tracing" not in frame.filename]
    between = names[names.index("train_step") + 1 : names.index("__call__")]
    assert between == ["step", "total_loss"]
