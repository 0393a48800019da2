"""Methods that look ahead, all of them: on networks, in a run's state, and what they refuse."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dfs_jax.forks import create_fork
from dfs_jax.gradients import RULES, Batch, Trained, create_rule
from dfs_jax.gradients.meta_gf import MetaGF
from dfs_jax.gradients.wpn import WPN, assigned
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.training.experiment import build_experiment, initial_state, training_step
from dfs_jax.training.passes import deal, make_step_parts
from dfs_jax.training.sharding import put_batch
from dfs_jax.types import UserError
from tests.support.helpers import TINY_CLASSES, TinyNetwork, tiny_config
from tests.support.mesh_cases import MODELS, NAMES
from tests.support.meta_problems import adams_mean

META_ROWS = {"meta_gf": {}, "wpn": {}}
KEY = jax.random.key(4)
LOSS = create_loss("deep_supervision")
RATE = 0.3
TINY = {"model.name": "tests.support.helpers:TinyNetwork", "batch_size": 6}


def test_rows():
    assert {name: type(create_rule(name, **row)) for name, row in META_ROWS.items()} == {
        "meta_gf": MetaGF,
        "wpn": WPN,
    }
    rules = {name: create_rule(name) for name in RULES.table}
    assert set(META_ROWS) == {name for name, rule in rules.items() if rule.looks_ahead}


class Problem:
    """A network of random numbers in float64, a batch, and trials without any of our parts."""

    def __init__(self, model, fork):
        self.model, self.fork = model, fork
        shapes = jax.eval_shape(lambda: init_variables(model, KEY, (8, 8, 3)))
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.5, 1, x.shape)), shapes)
        optimizer = optax.sgd(RATE)
        self.trained = Trained(**drawn, opt_state=optimizer.init(drawn["params"]))
        images = jnp.asarray(rng.normal(size=(8, 8, 8, 3)))
        self.batch = Batch(images, jnp.arange(8) % TINY_CLASSES, KEY, KEY)
        self.parts = make_step_parts(model, fork, LOSS, optimizer)

    def outputs(self, params, images):
        variables = {"params": params, "batch_stats": self.trained.batch_stats}
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
        return self.model.apply(variables, images, self.fork, **options)[0]

    def losses(self, params, images, labels):
        return LOSS.example_losses(self.outputs(params, images), labels)

    def after(self, grads):
        return jax.tree.map(lambda w, g: w - RATE * g, self.trained.params, grads)


class Fusing(Problem):
    """Gradients fused tensor by tensor; the losses ahead are those of the same batch."""

    method = MetaGF()
    field = "logits"

    def trial(self, logits):
        losses = lambda p: self.losses(p, *self.batch[:2]).mean(1)  # noqa: E731
        trunk, heads = split_trunk_and_heads(jax.jacrev(losses)(self.trained.params))

        def fuse(grads, v):
            reaches = [jnp.any(g != 0) for g in grads]
            weights = [jnp.where(r, jnp.exp(v[i]), 0) for i, r in enumerate(reaches)]
            fused = sum(w * g for w, g in zip(weights, grads, strict=True))
            return sum(reaches) * fused / sum(weights)

        fused = jax.tree.map(fuse, trunk, logits)
        return self.after({**fused, **jax.tree.map(lambda g: g.sum(0), heads)})

    def ahead(self, params):
        return self.losses(params, *self.batch[:2]).mean(1).sum()


class Predicting(Problem):
    """A step on one half by predicted weights; the losses ahead are where the other half leaves."""

    method = WPN(hidden_size=5, weight_decay=0.0)
    field = "params"

    def trial(self, theta):
        images, labels = (deal(x, 2)[0] for x in self.batch[:2])

        def weighted(params):
            losses = self.losses(params, images, labels)
            weights = self.method.weigh(theta, jax.lax.stop_gradient(losses))
            return (weights * losses).mean(1).sum()

        return self.after(jax.grad(weighted)(self.trained.params))

    def ahead(self, params):
        images, labels = (deal(x, 2)[1] for x in self.batch[:2])
        confidence = jax.nn.softmax(self.outputs(params, images).logits).max(-1)
        leaves = assigned(jax.lax.stop_gradient(confidence), self.method.p)
        losses = self.losses(params, images, labels)
        return sum(
            (own * row).sum() / jnp.maximum(own.sum(), 1)
            for own, row in zip(leaves, losses, strict=True)
        )


SMALL_VGG = {"width": 3, "stage_sizes": (1, 1), "stage_multipliers": (1, 2)}
NETWORKS = [
    pytest.param(lambda: TinyNetwork(TINY_CLASSES), "plain", id="tiny"),
    *(
        pytest.param(
            lambda: create_model("vgg7", num_classes=TINY_CLASSES, **SMALL_VGG),
            fork,
            id=f"vgg-{fork}",
            marks=pytest.mark.slow,
        )
        for fork in ("plain", "dfs")
    ),
]


@pytest.mark.parametrize(("network", "fork"), NETWORKS)
@pytest.mark.parametrize("kind", [Fusing, Predicting])
def test_meta_gradients_are_finite_differences(kind, network, fork):
    """In float64, through real networks.

    A fork that stops gradients makes them another thing than the losses' slopes: there the trial is
    differentiated, and the losses ahead have the gradient that any step would see.
    """
    with jax.enable_x64(True):
        problem, rng = kind(network(), create_fork(fork)), np.random.default_rng(1)
        trained, method = problem.trained, problem.method
        state = method.init(trained.params, problem.model.num_exits, KEY)
        flat, unravel = ravel_pytree(getattr(state, problem.field))
        flat = flat + rng.normal(size=flat.shape)
        state = state._replace(**{problem.field: unravel(flat)})
        found = jax.jit(method.wrap(problem.parts))(trained, state, problem.batch)
        slopes, _ = ravel_pytree(adams_mean(found.state.opt_state))
        towards = rng.normal(size=flat.shape)

        @jax.jit
        def difference(step):
            here, there = (problem.trial(unravel(flat + s * towards)) for s in (-step, step))
            if fork == "plain":
                return (problem.ahead(there) - problem.ahead(here)) / (2 * step)
            of_ahead, _ = ravel_pytree(jax.grad(problem.ahead)(problem.trial(unravel(flat))))
            return of_ahead @ (ravel_pytree(there)[0] - ravel_pytree(here)[0]) / (2 * step)

        expected = float(difference(1e-5))
        assert float(slopes @ towards) == pytest.approx(expected, rel=1e-5)
        assert abs(expected) > 1e-4


def run(steps=3, **changes):
    """The state after some steps."""
    experiment = build_experiment(tiny_config(**changes))
    state, step = initial_state(experiment), training_step(experiment)
    rng = np.random.default_rng(0)
    shape = (experiment.config.batch_size, *experiment.dataset.image_shape)
    for _ in range(steps):
        images = rng.integers(0, 256, shape).astype(np.uint8)
        labels = np.arange(shape[0], dtype=np.int32) % TINY_CLASSES
        state = step(state, *put_batch((images, labels), experiment.mesh))
    assert int(state.first_bad_step) < 0
    return jax.device_get(state)


@pytest.mark.slow
def test_micro_batches_give_what_the_batch_gives():
    changes = {**TINY, "gradients.name": "meta_gf", "gradients.exits": "vmap"}
    whole, micro = run(**changes), run(**changes, accumulate_steps=3)
    chex.assert_trees_all_close(micro.params, whole.params, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda v: np.any(v != 0), whole.rule_state.logits["block1"])
    assert all(jax.tree.leaves(moved))  # what one exit alone reaches has nothing to learn


class NoExamples:
    """A loss without values by example."""

    def __call__(self, outputs, labels):
        return LOSS(outputs, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradients.name": "dr_mgf"},
            "unknown gradient rule 'dr_mgf': choose one of",
        ),
        (
            {"gradients.window": 3},
            "gradient rule 'sum' has no option 'window'",
        ),
        (
            {"gradients.name": "meta_gf", "gradients.p": 1.0},
            "gradient rule 'meta_gf' has no option 'p'",
        ),
        (
            {"gradients.name": "wpn", "gradients.window": 3},
            "gradient rule 'wpn' has no option 'window'",
        ),
        (
            {"gradients.name": "wpn", "gradients.p": -1.0},
            "gradient rule 'wpn': the budget parameter p must",
        ),
        (
            {"gradients.name": "wpn", "gradients.exits": "scan"},
            "gradients.exits='scan' has no effect with 'wpn', which takes no gradients of",
        ),
        (
            {"gradients.name": "meta_gf", "gradients.window": 3, "epochs": 2},
            "rounds of 9 steps for 2 exits, which do not divide the run's 10",
        ),
        (
            {
                "gradients.name": "meta_gf",
                "model.name": "tests.gradients.test_combined_training:WithStem",
            },
            "parameters lie under block1.. and head1.., this one also has stem",
        ),
        ({"gradients.name": "wpn", "accumulate_steps": 2}, "accumulate_steps=2 micro batches"),
        ({"gradients.name": "wpn", "batch_size": 5}, "batch_size 5 must be a multiple of 2"),
        (
            {"gradients.name": "wpn", "loss.name": "tests.gradients.test_meta:NoExamples"},
            "loss NoExamples does not say what each one's is",
        ),
        (
            {"gradients.name": "wpn", "model.name": "vgg7", "batch_norm_groups": 2},
            "half of the batch, 3 examples, which batch_norm_groups=2 does not divide",
        ),
    ],
)
def test_what_makes_no_sense_is_told_before_training(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(tiny_config(**{**TINY, **changes}))


def test_what_looks_ahead_is_more_than_one_pass():
    def is_one_pass(**changes):
        return build_experiment(tiny_config(**TINY, **changes)).rule.is_plain_sum

    assert is_one_pass()
    assert not is_one_pass(**{"gradients.name": "wpn"})
    assert not is_one_pass(**{"gradients.name": "pcgrad"})


OPTIONS = {
    "meta_gf": {"gradients.name": "meta_gf"},
    "wpn": {"gradients.name": "wpn"},
    "channels": {
        "gradients.name": "meta_gf",
        "gradients.granularity": "channel",
        "gradients.normalisation": "sigmoid",
    },
    "rounds": {"gradients.name": "meta_gf", "gradients.window": 1, "epochs": 7},
    "byot": {"gradients.name": "meta_gf", "loss.name": "byot"},
    "wpn-byot": {"gradients.name": "wpn", "loss.name": "byot", "gradients.exchange": True},
    "intervals": {"gradients.name": "wpn", "gradients.interval": 2},
}
KINDS = {
    "plain": {"fork.name": "plain"},
    "groups": {"batch_norm_groups": 2},
    "bfloat16": {"compute_dtype": "bfloat16", "remat": True, "optimizer.name": "adamw"},
}
# Under deep feature surgery, with the kernels of the CPU, unless the kind says otherwise.
TRAINED = [
    *(
        (network, name, None)
        for network in ("resnet18", "msdnet", "small_vit")
        for name in META_ROWS
    ),
    *(("vgg7", name, None) for name in OPTIONS),
    *(("vgg7", name, kind) for name in META_ROWS for kind in KINDS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "name", "kind"), TRAINED)
def test_every_network_trains_by_every_method(network, name, kind):
    changes = {
        "model.name": NAMES.get(network, network),
        **{f"model.{option}": value for option, value in MODELS[network].items()},
        "batch_size": 4,
        "optimizer.weight_decay": 0.0,
        **KINDS.get(kind, {}),
        **OPTIONS[name],
    }
    state = run(7 if name == "rounds" else 2, **changes)
    start = jax.device_get(initial_state(build_experiment(tiny_config(**changes))))

    def moved(now, then):
        return jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), now, then))

    assert np.mean(moved(state.params, start.params)) > 0.7
    assert any(moved(state.rule_state[0], start.rule_state[0]))
