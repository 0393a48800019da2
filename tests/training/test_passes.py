"""Micro batches, recomputed blocks, bfloat16, groups of BatchNorm: each against the plain way."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from dfs_jax.costs.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.forks import create_fork
from dfs_jax.gradients import Batch, StepParts, Trained, create_rule
from dfs_jax.gradients.summed import Sum
from dfs_jax.layers import BatchNorm
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.training import passes as passes_module
from dfs_jax.training.passes import (
    accumulated,
    make_step_parts,
    single_exit_passes,
    summed_passes,
)
from dfs_jax.training.sharding import create_mesh, put_batch, replicated
from dfs_jax.training.state import create_state
from dfs_jax.training.step import make_eval_step, make_train_step
from dfs_jax.types import UserError
from tests.gradients.test_exit_gradients import MODELS
from tests.support.helpers import TinyNetwork

CLASSES, IMAGE_SHAPE = 3, (8, 8, 3)
KEY = jax.random.key(5)
FORK, LOSS = create_fork("dfs", partition_ratio=0.4), create_loss("deep_supervision")
WAYS = ("vmap", "unroll", "scan")


def network(name, **options):
    """A model and random variables, without compiling an initialisation."""
    if name == "tiny":
        model = TinyNetwork(CLASSES).clone(**options)
    else:
        name = "tests.gradients.test_exit_gradients:Chain" if name == "chain" else name
        model = create_model(name, num_classes=CLASSES, **{**MODELS.get(name, {}), **options})
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), IMAGE_SHAPE))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.uniform(-0.5, 1, x.shape), x.dtype)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def examples(count, seed=1):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(count, *IMAGE_SHAPE)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, CLASSES, count), jnp.int32)


KINDS = {
    "summed": lambda model: summed_passes(model, FORK),
    "single": lambda model: single_exit_passes(model, FORK, "vmap"),
}


def run_passes(passes, variables, images, labels, key=KEY):
    """Passes of a batch with its own key, as `BatchGradients`."""
    batch = Batch(images, labels, key, KEY)
    parts = StepParts(LOSS, 3, passes, passes, None, None)
    return parts.gradients(Trained(variables["params"], variables["batch_stats"], ()), batch, LOSS)


@pytest.mark.parametrize("kind", ["summed", pytest.param("single", marks=pytest.mark.slow)])
def test_micro_batches_one_after_another(kind):
    """Example by example in a Python loop: statistics go on, gradients and losses are averaged."""
    model, variables = network("chain")
    passes, (images, labels) = KINDS[kind](model), examples(6)

    @jax.jit
    def run(variables, images, labels):
        ours = run_passes(accumulated(passes, 3), variables, images, labels)
        stats, found = variables["batch_stats"], []
        for k in range(3):
            micro = {**variables, "batch_stats": stats}
            some = images[k::3], labels[k::3], jax.random.fold_in(KEY, k)
            found.append(run_passes(passes, micro, *some))
            stats = found[-1].batch_stats
        return ours, found

    ours, found = run(variables, images, labels)
    assert float(ours.loss) == pytest.approx(np.mean([f.loss for f in found]), rel=1e-5)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(f.grads for f in found))
    chex.assert_trees_all_close(ours.grads, mean, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(ours.batch_stats, found[-1].batch_stats, rtol=1e-4, atol=1e-5)
    for k in range(3):
        np.testing.assert_allclose(ours.logits[:, k::3], found[k].logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["sum", "pcgrad"])
def test_micro_batches_are_the_batch_where_nothing_couples_examples(rule):
    """Exits' gradients are averaged before they are combined, which is not linear."""
    model, variables = network("tiny")
    optimizer = optax.identity()
    trained = Trained(variables["params"], variables["batch_stats"], optimizer.init(variables))

    @jax.jit
    def run(trained, images, labels):
        batch = Batch(images, labels, KEY, KEY)
        return [
            create_rule(rule).wrap(
                make_step_parts(model, FORK, LOSS, optimizer, accumulate_steps=steps)
            )(trained, (), batch)
            for steps in (1, 4)
        ]

    once, micro = run(trained, *examples(8))
    chex.assert_trees_all_close(micro, once, rtol=1e-4, atol=1e-6)


# What is put to the test each time; the others take long to compile.
QUICK = [pytest.param("chain", WAYS[:1])]
REMAT = [*QUICK, *(pytest.param(name, WAYS, marks=pytest.mark.slow) for name in MODELS)]


@pytest.mark.parametrize(("name", "ways"), REMAT)
def test_recomputed_blocks_give_the_same_gradients(name, ways):
    with jax.enable_x64(True):
        model, variables = network(name)
        variables = jax.tree.map(lambda x: x.astype(float), variables)
        images, labels = examples(4)

        @jax.jit
        def run(variables, images, labels):
            results = []
            for remat in (False, True):
                some = model.clone(remat=remat)
                every = [summed_passes(some, FORK)]
                every += [single_exit_passes(some, FORK, way) for way in ways]
                results.append([run_passes(one, variables, images, labels) for one in every])
            return results

        plain, recomputed = run(variables, images.astype(float), labels)
        chex.assert_trees_all_close(recomputed, plain, rtol=1e-9, atol=1e-11)


def convolutions(model, variables, passes):
    images, labels = examples(4)
    run = functools.partial(run_passes, passes(model))
    text = str(jax.make_jaxpr(run)(variables, images, labels))
    return text.count("conv_general_dilated[")


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_is_one_more_pass_forward(kind):
    """Three blocks of one convolution each: 3 forward, 5 backward, and 3 again."""
    options = {"width": 3, "stage_sizes": (1, 1, 1), "cpu_kernels": False}
    model, variables = network("vgg7", **options)
    plain = convolutions(model, variables, KINDS[kind])
    again = convolutions(model.clone(remat=True), variables, KINDS[kind])
    assert (plain, again) == (8, 11)


BF16 = {
    "vgg7": {"width": 4, "stage_sizes": (1, 1, 1)},
    "resnet18": {"width": 4, "stage_sizes": (1, 1)},
    "resnet50": {"width": 4, "stage_sizes": (1, 1), "stem": "imagenet"},
    "msdnet": {**MODELS["msdnet"], "head_dropout": 0.0},
    "vit_tiny": {**MODELS["vit_tiny"], "dropout": 0.0},
}


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def operand_types(jaxpr, primitives=("conv_general_dilated", "dot_general")):
    """The types of the operands of every such operation, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in primitives:
            yield equation.primitive.name, {str(v.aval.dtype) for v in equation.invars}
        for inner in jaxprs_in_params(equation.params):
            yield from operand_types(inner, primitives)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "vgg7" else [pytest.mark.slow]) for n in BF16]
)
def test_blocks_compute_in_bfloat16_and_what_they_learn_is_float32(name):
    wide, variables = network(name, **BF16[name])
    narrow = wide.clone(dtype="bfloat16")
    images, labels = examples(8)

    @jax.jit
    def run(variables, images, labels):
        return [
            run_passes(summed_passes(m, FORK), variables, images, labels) for m in (wide, narrow)
        ]

    exact, found = run(variables, images, labels)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert cosine(found.grads, exact.grads) > 0.98
    assert cosine((found.logits, found.batch_stats), (exact.logits, exact.batch_stats)) > 0.999
    assert np.any(found.loss != exact.loss)


@pytest.mark.parametrize("name", BF16)
def test_every_convolution_and_product_of_blocks_is_in_bfloat16(name):
    model, variables = network(name, **BF16[name], dtype="bfloat16")
    if name != "vit_tiny":
        model = model.clone(cpu_kernels=False)  # they compute in float32
    images, _ = examples(2)

    def blocks(variables, images):
        """All blocks, without heads: a classifier's product is float32."""

        def run(model, x):
            for i in range(model.num_exits):
                x = model.block(i, x, train=True)
            return x

        return model.apply(variables, images, method=run, mutable=["batch_stats"])

    types = list(operand_types(jax.make_jaxpr(blocks)(variables, images).jaxpr))
    assert len(types) > 2
    assert all(found == {"bfloat16"} for _, found in types)


def test_partitioned_layers_cost_what_theory_says_in_bfloat16():
    for name in ("vgg7", "msdnet"):
        model, _ = network(name, **BF16[name], dtype="bfloat16")
        theory = theoretical_step_cost(model, FORK, LOSS, IMAGE_SHAPE)
        assert traced_step_cost(model, FORK, LOSS, IMAGE_SHAPE) == theory


def test_a_step_and_an_evaluation_in_bfloat16():
    model, variables = network("vgg7", width=2, stage_sizes=(1, 1, 1), dtype="bfloat16")
    mesh, optimizer = create_mesh(), optax.sgd(0.1, momentum=0.9)
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "mesh": mesh}
    state = create_state(variables, optimizer, KEY, num_exits=3, keep_average=True)
    types = jax.tree.map(lambda leaf: leaf.dtype, state)
    step = make_train_step(
        model, FORK, LOSS, Sum(), optimizer, lambda images, _: images, ema_decay=0.9, **statistics
    )
    images, labels = np.full((4, *IMAGE_SHAPE), 7, np.uint8), np.zeros(4, np.int32)
    batch = put_batch((images, labels), mesh)
    state = step(jax.device_put(state, replicated(mesh)), *batch)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == types
    predictions = make_eval_step(model, FORK, **statistics)(state.eval_variables, *batch)
    assert predictions.loss.dtype == jnp.float32


def test_groups_of_batch_norm_are_batches_of_their_own():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (6, 5, 7)), jnp.float32)
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=7), jnp.float32) for name in ("scale", "bias")}
    stats = {"mean": jnp.zeros(7), "var": jnp.ones(7)}
    variables = {"params": params, "batch_stats": stats}
    y, updated = BatchNorm(groups=3).apply(variables, x, train=True, mutable=["batch_stats"])
    parts = [
        BatchNorm().apply(variables, x[i : i + 2], train=True, mutable=["batch_stats"])
        for i in (0, 2, 4)
    ]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), atol=1e-5)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(new for _, new in parts))
    chex.assert_trees_all_close(updated, mean, rtol=1e-5)
    ours, alone = (BatchNorm(groups=groups).apply(variables, x, train=False) for groups in (3, 1))
    np.testing.assert_array_equal(ours, alone)
    with pytest.raises(UserError, match="a batch of 6 cannot be divided into batch_norm_groups=4"):
        BatchNorm(groups=4).apply(variables, x, train=True, mutable=["batch_stats"])


def test_batch_norm_takes_statistics_in_float32():
    """In bfloat16 the mean of 256 + 0, 1, 0, 1, ... would be 256, and the variance 0."""
    x = (256 + jnp.arange(4096) % 2 * 2).astype(jnp.bfloat16)[:, None]
    variables = {
        "params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        "batch_stats": {"mean": jnp.zeros(1), "var": jnp.zeros(1)},
    }
    norm = BatchNorm(momentum=0.0)
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 257, rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 4096 / 4095, rtol=1e-6)
    np.testing.assert_allclose(np.unique(np.float32(y)), [-1, 1], rtol=1e-2)


@pytest.mark.parametrize("name", ["vgg7", "resnet18", "msdnet"])
def test_every_batch_norm_of_a_model_has_the_groups(name):
    model, variables = network(name, **BF16[name], batch_norm_groups=2)
    images, _ = examples(3)
    with pytest.raises(UserError, match="a batch of 3 cannot be divided into batch_norm_groups=2"):
        jax.eval_shape(functools.partial(apply_training, model), variables, images)
    wide = model.clone(batch_norm_groups=1)
    images, _ = examples(4)
    halves = [jnp.concatenate([images[i : i + 2]] * 2) for i in (0, 2)]

    @jax.jit
    def run(variables, images, halves):
        """A batch that holds the same two examples twice has their statistics."""
        grouped, _ = apply_training(model, variables, images)
        parts = [apply_training(wide, variables, half)[0].logits[:, :2] for half in halves]
        return grouped.logits, jnp.concatenate(parts, axis=1)

    grouped, parts = run(variables, images, halves)
    np.testing.assert_allclose(grouped, parts, rtol=1e-3, atol=1e-4)


def apply_training(model, variables, images):
    return model.apply(
        variables, images, FORK, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )


@pytest.mark.parametrize(
    ("platform", "asked", "way"),
    [("tpu", None, "vmap"), ("cpu", None, "unroll"), ("tpu", "scan", "scan")],
)
def test_the_way_back_from_the_exits_suits_the_mesh(monkeypatch, platform, asked, way):
    """Which need not be of the devices that this process runs on."""
    taken = []

    def stop(*_, exits, **__):
        taken.append(exits)
        raise StopIteration

    monkeypatch.setattr(passes_module, "exit_gradients", stop)
    monkeypatch.setattr(passes_module, "constrain", lambda tree, *_, **__: tree)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    passes = single_exit_passes(None, None, asked, mesh=mesh)
    with pytest.raises(StopIteration):
        passes({}, {}, Batch(jnp.zeros(1), None, None, None), None)
    assert taken == [way]
