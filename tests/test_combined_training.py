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

from configs import common, digits_vgg7
from dfs_jax.analysis.comparison import compare, method_configs
from dfs_jax.combiners import create_combiner
from dfs_jax.combiners.weighted_sum import WeightedSum
from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import abstract_state, build_experiment
from dfs_jax.training.loop import train
from dfs_jax.training.sharding import create_mesh, put_batch, replicated
from dfs_jax.training.state import create_state
from dfs_jax.training.step import combiner_key, make_gradient_fn, make_train_step, step_keys
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


# Each stopped after four of its steps: Meta-GF while an exit is trained alone.
STATEFUL = {
    "combiner": {"combiner.name": "tests.helpers:Remembering"},
    "meta_gf": {"meta.name": "meta_gf", "meta.window": 4},
    "wpn": {"meta.name": "wpn", "batch_size": 6},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_methods_state_is_saved_and_resumed_to_the_bit(name, tmp_path, monkeypatch):
    changes = {"model.name": "tests.helpers:TinyNetwork", "epochs": 2, **STATEFUL[name]}
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
    steps = [leaf for leaf in jax.tree.leaves(whole.combiner_state) if leaf.dtype == jnp.int32]
    assert int(whole.step) == config.epochs * (30 // config.batch_size)
    assert int(whole.step) in map(int, steps)
    learned = [leaf for leaf in jax.tree.leaves(whole.combiner_state) if leaf.ndim]
    assert any(np.any(leaf) for leaf in learned)
    chex.assert_trees_all_equal(parts, whole)


class Transposed:
    """A combiner that does not keep to the shapes."""

    def init(self, params):
        return ()

    def update(self, per_exit_grads, state, params, *, key):
        return jax.tree.map(lambda leaf: leaf[0].T, per_exit_grads), state


class WithStem(TinyNetwork):
    """A network with parameters that belong to no exit."""

    def setup(self):
        super().setup()
        self.stem = nn.Dense(3)

    def block(self, i, carry, live=None, *, train):
        return super().block(i, carry if i else self.stem(carry), live, train=train)


class Growing(Transposed):
    """A combiner whose state does not keep its shape."""

    def update(self, per_exit_grads, state, params, *, key):
        return params, (jnp.zeros(1), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combiner.name": "mgda"}, "unknown combiner 'mgda'"),
        ({"combiner.radius": 0.4}, "combiner 'weighted_sum' has no option 'radius'"),
        ({"combiner.weights": (1.0, 2.0)}, r"3 exits take 3 weights in the sum, got \(1.0, 2.0\)"),
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
        (
            {"combiner.name": "pcgrad", "model.name": "tests.test_combined_training:WithStem"},
            "parameters lie under block1.. and head1.., this one also has stem",
        ),
        ({"loss.exit_weights": (1, 2)}, r"3 exits take 3 exit_weights, got \(1, 2\)"),
        ({"loss.exit_weights": "cubic"}, "exit_weights must be constant or linear"),
    ],
)
def test_what_makes_no_sense_is_told_before_training(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(tiny_config(**changes))


class EveryCombiner:
    """Trains by one combiner; its state has the gradients that each of them gives."""

    def init(self, params):
        return dict.fromkeys(COMBINER_ROWS, params)

    def update(self, per_exit_grads, state, params, *, key):
        for name in COMBINER_ROWS:
            grads, _ = create_combiner(name).update(per_exit_grads, (), params, key=key)
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
    optimizer, combiner = optax.sgd(0.1, momentum=0.9), EveryCombiner()

    def step(mesh, exits):
        state = create_state(
            variables,
            optimizer,
            jax.random.key(7),
            num_exits=model.num_exits,
            keep_average=False,
            combiner=combiner,
        )
        run = make_train_step(
            model,
            create_fork("plain"),
            LOSS,
            optimizer,
            lambda images, key: images,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
            mesh=mesh,
            combiner=combiner,
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
    kernels = {name: g["block1"]["conv"]["kernel"] for name, g in reference.combiner_state.items()}
    plain = kernels.pop("weighted_sum")
    assert all(np.abs(kernel - plain).max() > 1e-3 for kernel in kernels.values())


@pytest.mark.slow
def test_four_devices_give_what_one_gives(request, monkeypatch):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", flags)
    cache = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    program = "from tests.test_combined_training import compare_devices; compare_devices()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=request.config.rootpath)


# As a config's colon takes them, and what else is set.
LEARNING = [
    *((method, {}) for method in common.METHODS),
    ("dfs+pcgrad", {}),
    ("ge+distillation+cagrad", {}),
    ("byot+nash_mtl", {}),
    ("dfs+meta_gf", {}),
    ("dfs+wpn", {}),
    ("meta_gf", {"meta.granularity": "channel", "meta.normalisation": "sigmoid"}),
    ("meta_gf", {"meta.window": 18, "epochs": 84}),
    ("wpn", {"meta.exchange": True, "meta.learning_rate": 1e-3}),
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
