"""Training with combiners: the step, the state of a run, configs, many devices, every method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, digits_vgg7
from dfs_jax.combiners import create_combiner
from dfs_jax.combiners.weighted_sum import WeightedSum
from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.evaluate import evaluate_run
from dfs_jax.training.experiment import abstract_state, build_experiment
from dfs_jax.training.loop import train
from dfs_jax.training.state import create_state
from dfs_jax.training.step import combiner_key, make_gradient_fn, step_keys
from dfs_jax.types import UserError
from tests.helpers import TINY_CLASSES, TinyNetwork, tiny_config
from tests.test_combiners import COMBINER_ROWS
from tests.test_loop import interrupt_at

MODEL, FORK, LOSS = TinyNetwork(TINY_CLASSES), create_fork("dfs"), create_loss("deep_supervision")
LABELS = jnp.asarray([2, 0, 1])


def state_and_images(combiner=None, seed=0):
    """A state of random numbers, without compiling an initialisation, and a batch."""
    shapes = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0), (4, 4, 3)))
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    state = create_state(
        variables,
        optax.identity(),
        jax.random.key(7),
        num_exits=2,
        keep_average=False,
        combiner=combiner,
    )
    return state, jnp.asarray(rng.normal(size=(3, 4, 4, 3)), jnp.float32)


def gradients_of(combiner, state, images):
    fn = make_gradient_fn(MODEL, FORK, LOSS, combiner)
    return fn(state, images, LABELS, step_keys(state)[1])


def test_combiners_see_the_trunk_and_heads_keep_their_own_gradients():
    combiners = {name: create_combiner(name) for name in COMBINER_ROWS}
    combiners["weighted"] = WeightedSum((0.5, 3.0))
    state, images = state_and_images()

    @jax.jit
    def run(state, images):
        """All of them, and each by the book, from a backward pass of the whole network an exit."""

        def losses(params):
            outputs = MODEL.apply({"params": params}, images, FORK, train=True)
            return LOSS(outputs, LABELS)

        values, by_exit = losses(state.params), jax.jacrev(losses)(state.params)
        trunk, heads = split_trunk_and_heads(by_exit)
        own = jax.tree.map(lambda leaf: leaf.sum(0), heads)
        ours = {name: gradients_of(c, state, images) for name, c in combiners.items()}
        book = {
            name: {**c.update(trunk, (), None, key=combiner_key(state))[0], **own}
            for name, c in combiners.items()
        }
        return values, ours, book

    values, ours, book = run(state, images)
    for name, found in ours.items():
        chex.assert_trees_all_close(found.grads, book[name], rtol=1e-4, atol=1e-5)
        assert float(found.loss) == pytest.approx(float(values.sum()), rel=1e-6)
        chex.assert_trees_all_equal(found.logits, ours["weighted_sum"].logits)
    kernels = {name: found.grads["block1"]["kernel"] for name, found in ours.items()}
    assert not np.allclose(kernels["weighted_sum"], kernels["nash_mtl"])


def test_a_plain_sum_is_the_ordinary_backward_pass():
    state, images = state_and_images()
    none, plain, ones = (
        str(jax.make_jaxpr(lambda s, x, c=combiner: gradients_of(c, s, x))(state, images))
        for combiner in (None, WeightedSum(), WeightedSum((1, 1)))
    )
    assert none == plain
    assert plain != ones


def test_the_combiners_key_is_its_own_and_changes_every_step():
    start, _ = state_and_images()
    states = [start.replace(step=step) for step in (0, 1)]
    keys = [key for state in states for key in (*step_keys(state), combiner_key(state))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6


STATEFUL = {
    "model.name": "tests.helpers:TinyNetwork",
    "combiner.name": "tests.helpers:Remembering",
    "epochs": 2,
}


def test_a_combiners_state_is_saved_and_resumed_to_the_bit(tmp_path, monkeypatch):
    config = tiny_config(**STATEFUL)
    assert train(config, tmp_path / "whole").stopped_by is None
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, tmp_path / "parts").step == 5
    train(config, tmp_path / "parts")
    target = abstract_state(build_experiment(config))
    whole, parts = (
        Checkpoints(tmp_path / name, read_only=True).restore("latest", target)[0]
        for name in ("whole", "parts")
    )
    assert int(whole.combiner_state["steps"]) == int(whole.step) == 12
    assert any(np.any(leaf) for leaf in jax.tree.leaves(whole.combiner_state["last"]))
    chex.assert_trees_all_equal(parts, whole)


class Transposed:
    """A combiner that does not keep to the shapes."""

    def init(self, params):
        return ()

    def update(self, per_exit_grads, state, params, *, key):
        return jax.tree.map(lambda leaf: leaf[0].T, per_exit_grads), state


class Growing(Transposed):
    """A combiner whose state does not keep its shape."""

    def update(self, per_exit_grads, state, params, *, key):
        return params, (jnp.zeros(1), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combiner.name": "mgda"}, "unknown combiner 'mgda'"),
        ({"combiner.radius": 0.4}, "combiner 'weighted_sum' has no option 'radius'"),
        ({"combiner.weights": (1.0, 2.0)}, r"6 exits take 6 weights in the sum, got \(1.0, 2.0\)"),
        ({"combiner.exits": "scan"}, "combiner.exits='scan' has no effect with a plain sum"),
        (
            {"combiner.name": "pcgrad", "combiner.exits": "all"},
            "exits must be one of vmap, unroll, scan, got 'all'",
        ),
        (
            {"combiner.name": "tests.test_combined_training:Transposed"},
            "combiner Transposed returns gradients of other shapes or types",
        ),
        (
            {"combiner.name": "tests.test_combined_training:Growing"},
            "combiner Growing returns a state of other shapes or types",
        ),
        ({"loss.exit_weights": (1, 2)}, r"6 exits take 6 exit_weights, got \(1, 2\)"),
        ({"loss.exit_weights": "cubic"}, "exit_weights must be constant or linear"),
    ],
)
def test_what_makes_no_sense_is_told_before_training(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(tiny_config(**changes))


SHARDED = """
from jax.sharding import NamedSharding, PartitionSpec as P
from dfs_jax.combiners.exit_gradients import exit_gradients
from dfs_jax.models import create_model
from tests.test_combined_training import *
jax.config.update("jax_enable_x64", True)
model = create_model("vgg7", num_classes=3, width=2, stage_sizes=(1, 1), stage_multipliers=(1, 2),
    cpu_kernels=False)
shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (8, 8, 3)))
rng = np.random.default_rng(0)
variables = jax.tree.map(lambda x: rng.uniform(-0.5, 1, x.shape), shapes)
batch = rng.normal(size=(6, 8, 8, 3)), np.arange(6) % 3

def run(variables, images, labels):
    key, results = jax.random.key(1), {}
    for exits in ("vmap", "unroll"):
        found = exit_gradients(model, FORK, LOSS, variables, images, labels, key=key, exits=exits)
        results[exits] = found
    for name in COMBINER_ROWS:
        results[name] = create_combiner(name).update(found.trunk, (), None, key=key)[0]
    return results

one = jax.jit(run)(variables, *batch)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = [jax.device_put(array, NamedSharding(mesh, P("data"))) for array in batch]
two = jax.jit(run)(jax.device_put(variables, NamedSharding(mesh, P())), *split)
assert two["vmap"].logits.sharding.num_devices == 2
chex.assert_trees_all_close(two, one, rtol=1e-7, atol=1e-9)
"""


def test_two_devices_give_what_one_gives(request, monkeypatch):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    monkeypatch.setenv("XLA_FLAGS", flags)
    subprocess.run([sys.executable, "-c", SHARDED], check=True, cwd=request.config.rootpath)


def digits(method, **changes):
    config = digits_vgg7.get_config(method)
    config.update_from_flattened_dict({"epochs": 12, "model.width": 8, **changes})
    return config


TOGETHER = {
    "dfs and pcgrad": digits("dfs", **{"combiner.name": "pcgrad"}),
    "ge, distillation and cagrad": digits(
        "ge", **{"loss.name": "distillation", "combiner.name": "cagrad"}
    ),
    "byot and nash_mtl": digits("byot", **{"combiner.name": "nash_mtl"}),
    "linear weights": digits("dsn", **{"loss.exit_weights": "linear"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*common.METHODS, *TOGETHER])
def test_every_method_learns_the_digits(name, tmp_path):
    config = TOGETHER[name] if name in TOGETHER else digits(name)
    train(config, tmp_path)
    evaluation = evaluate_run(tmp_path, build_experiment(config), split="test")
    assert evaluation.reported.correct().mean(axis=1)[-1] > 0.9
