"""Training with combiners: the step, the state of a run, configs, devices, every method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from benchmarks.comparison import compare, method_configs
from configs import digits_vgg7
from dfs_jax.forks import create_fork
from dfs_jax.gradients import Batch, Trained, create_rule
from dfs_jax.gradients.combiner import Combiner
from dfs_jax.gradients.summed import Sum
from dfs_jax.gradients.weighted_sum import WeightedSum
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import abstract_state, build_experiment
from dfs_jax.training.loop import train
from dfs_jax.training.methods import METHODS
from dfs_jax.training.passes import make_step_parts
from dfs_jax.training.sharding import create_mesh, put_batch, replicated
from dfs_jax.training.state import create_state
from dfs_jax.training.step import make_train_step, step_keys
from dfs_jax.types import UserError
from tests.gradients.test_combiners import COMBINER_ROWS
from tests.support.helpers import TINY_CLASSES, TinyNetwork, tiny_config
from tests.support.marks import slow
from tests.training.test_loop import interrupt_at

MODEL, FORK, LOSS = TinyNetwork(TINY_CLASSES), create_fork("dfs"), create_loss("deep_supervision")
LABELS = jnp.asarray([2, 0, 1])


def state_and_images(seed=0):
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
    )
    return state, jnp.asarray(rng.normal(size=(3, 4, 4, 3)), jnp.float32)


def gradients_of(rule, state, images):
    """The outcome of a step without an optimizer: its updates are the gradients."""
    parts = make_step_parts(MODEL, FORK, LOSS, optax.identity())
    keys = step_keys(state)
    trained = Trained(state.params, state.batch_stats, state.opt_state)
    batch = Batch(images, LABELS, keys.dropout, keys.rule)
    return rule.wrap(parts)(trained, (), batch)


def test_combiners_see_the_trunk_and_heads_keep_their_own_gradients():
    combiners = {name: create_rule(name) for name in COMBINER_ROWS}
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
            name: {**c.update(trunk, (), None, key=step_keys(state).rule)[0], **own}
            for name, c in combiners.items()
        }
        return values, ours, book

    values, ours, book = run(state, images)
    for name, found in ours.items():
        chex.assert_trees_all_close(found.updates, book[name], rtol=1e-4, atol=1e-5)
        assert float(found.loss) == pytest.approx(float(values.sum()), rel=1e-6)
        chex.assert_trees_all_equal(found.logits, ours["weighted_sum"].logits)
    kernels = {name: found.updates["block1"]["kernel"] for name, found in ours.items()}
    assert not np.allclose(kernels["weighted_sum"], kernels["nash_mtl"])


def test_a_plain_sum_is_the_ordinary_backward_pass():
    state, images = state_and_images()

    @jax.jit
    def run(state, images):
        def total(params):
            outputs = MODEL.apply({"params": params}, images, FORK, train=True)
            return LOSS(outputs, LABELS).sum()

        rules = Sum(), WeightedSum()
        return jax.grad(total)(state.params), [gradients_of(r, state, images) for r in rules]

    book, found = run(state, images)
    for outcome in found:
        chex.assert_trees_all_close(outcome.updates, book, rtol=1e-5, atol=1e-6)


def test_the_rules_key_is_its_own_and_changes_every_step():
    start, _ = state_and_images()
    states = [start.replace(step=step) for step in (0, 1)]
    keys = [key for state in states for key in step_keys(state)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6


# Each stopped after four of its steps: Meta-GF while an exit is trained alone.
STATEFUL = {
    "combiner": {"gradients.name": "tests.support.helpers:Remembering"},
    "meta_gf": {"gradients.name": "meta_gf", "gradients.window": 4},
    "wpn": {"gradients.name": "wpn", "batch_size": 6},
}


@pytest.mark.parametrize("name", slow(STATEFUL, "meta_gf", "wpn"))
def test_a_methods_state_is_saved_and_resumed_to_the_bit(name, tmp_path, monkeypatch):
    changes = {"model.name": "tests.support.helpers:TinyNetwork", "epochs": 2, **STATEFUL[name]}
    config = tiny_config(**changes)
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
    steps = [leaf for leaf in jax.tree.leaves(whole.rule_state) if leaf.dtype == jnp.int32]
    assert int(whole.step) == config.epochs * (30 // config.batch_size)
    assert int(whole.step) in map(int, steps)
    learned = [leaf for leaf in jax.tree.leaves(whole.rule_state) if leaf.ndim]
    assert any(np.any(leaf) for leaf in learned)
    chex.assert_trees_all_equal(parts, whole)


class Transposed(Combiner):
    """A combiner that does not keep to the shapes."""

    def update(self, per_exit_grads, state, params, *, key):
        return jax.tree.map(lambda leaf: leaf[0].T, per_exit_grads), state


class WithStem(TinyNetwork):
    """A network with parameters that belong to no exit."""

    def setup(self):
        super().setup()
        self.stem = nn.Dense(3)

    def block(self, i, carry, *, train):
        return super().block(i, carry if i else self.stem(carry), train=train)


class Growing(Transposed):
    """A combiner whose state does not keep its shape."""

    def update(self, per_exit_grads, state, params, *, key):
        return params, (jnp.zeros(1), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradients.name": "mgda"}, "unknown gradient rule 'mgda'"),
        ({"gradients.radius": 0.4}, "gradient rule 'sum' has no option 'radius'"),
        (
            {"gradients.name": "weighted_sum", "gradients.weights": (1.0, 2.0)},
            r"3 exits take 3 weights in the sum, got",
        ),
        (
            {"gradients.exits": "scan"},
            "gradients.exits='scan' has no effect with 'sum'",
        ),
        (
            {"gradients.name": "pcgrad", "gradients.exits": "all"},
            "exits must be one of vmap, unroll, scan, got 'all'",
        ),
        (
            {"gradients.name": "tests.gradients.test_combined_training:Transposed"},
            "gradient rule Transposed returns gradients of other shapes or types",
        ),
        (
            {"gradients.name": "tests.gradients.test_combined_training:Growing"},
            "gradient rule Growing returns a state of other shapes or types",
        ),
        (
            {
                "gradients.name": "pcgrad",
                "model.name": "tests.gradients.test_combined_training:WithStem",
            },
            "parameters lie under block1.. and head1.., this one also has stem",
        ),
        ({"loss.exit_weights": (1, 2)}, r"3 exits take 3 exit_weights, got \(1, 2\)"),
        ({"loss.exit_weights": "cubic"}, "exit_weights must be constant or linear"),
    ],
)
def test_what_makes_no_sense_is_told_before_training(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(tiny_config(**changes))


class EveryCombiner(Combiner):
    """Trains by one combiner; its state has the gradients that each of them gives."""

    def init_trunk(self, params):
        return dict.fromkeys(COMBINER_ROWS, params)

    def update(self, per_exit_grads, state, params, *, key):
        for name in COMBINER_ROWS:
            grads, _ = create_rule(name).update(per_exit_grads, (), params, key=key)
            state = {**state, name: grads}
        return state["upgrad"], state


def compare_devices():
    """A step of VGG7 on four devices against one, by every way through the exits, in float64."""
    jax.config.update("jax_enable_x64", True)
    options = {"stage_sizes": (1, 1), "stage_multipliers": (1, 2), "cpu_kernels": False}
    model = create_model("vgg7", num_classes=TINY_CLASSES, width=3, **options)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (8, 8, 3)))
    rng = np.random.default_rng(6)  # of gradients that conflict
    variables = jax.tree.map(lambda x: rng.uniform(-0.5, 1, x.shape), shapes)
    images = rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    optimizer, rule = optax.sgd(0.1, momentum=0.9), EveryCombiner()

    def step(mesh, exits):
        state = create_state(
            variables,
            optimizer,
            jax.random.key(7),
            num_exits=model.num_exits,
            keep_average=False,
            rule=rule,
        )
        run = make_train_step(
            model,
            create_fork("plain"),
            LOSS,
            rule,
            optimizer,
            lambda images, key: images,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
            mesh=mesh,
            exits=exits,
        )
        batch = put_batch((images, np.arange(8) % TINY_CLASSES), mesh)
        state = run(jax.device_put(state, replicated(mesh)), *batch)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(state.params))
        return jax.device_get(state)

    four = create_mesh()
    assert four.size == 4
    one = Mesh(four.devices.ravel()[:1].reshape([1] * four.devices.ndim), four.axis_names)
    reference = step(one, "scan")
    for exits in ("vmap", "unroll"):
        found = step(four, exits)
        chex.assert_trees_all_close(found, reference, rtol=1e-9, atol=1e-9)
    kernels = {name: g["block1"]["conv"]["kernel"] for name, g in reference.rule_state.items()}
    plain = kernels.pop("weighted_sum")
    assert all(np.abs(kernel - plain).max() > 1e-3 for kernel in kernels.values())


@pytest.mark.slow
def test_four_devices_give_what_one_gives(request, monkeypatch):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", flags)
    cache = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    program = (
        "from tests.gradients.test_combined_training import compare_devices; compare_devices()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=request.config.rootpath)


# As a config's colon takes them, and what else is set.
LEARNING = [
    *((method, {}) for method in METHODS),
    ("dfs+pcgrad", {}),
    ("ge+distillation+cagrad", {}),
    ("byot+nash_mtl", {}),
    ("dfs+meta_gf", {}),
    ("dfs+wpn", {}),
    ("meta_gf", {"gradients.granularity": "channel", "gradients.normalisation": "sigmoid"}),
    ("meta_gf", {"gradients.window": 18, "epochs": 84}),
    ("wpn", {"gradients.exchange": True, "gradients.learning_rate": 1e-3}),
    ("dsn", {"loss.exit_weights": "linear"}),
    ("distillation", {"loss.teacher": "deeper"}),
    ("dfs", {"fork.referencing": "trunk_only"}),
    ("dfs", {"fork.referencing": "none"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), LEARNING, ids=str)
def test_every_method_learns_the_digits(method, changes, tmp_path):
    file = Path(digits_vgg7.__file__)
    configs = method_configs(file, [method], {"epochs": 12, "model.width": 8, **changes})
    found = compare(configs, [0], tmp_path)
    assert found is not None
    assert found[method][0].exits[-1] > 0.9
