"""Exits marked inside any JAX function: values, derivatives, and the stages that it is cut into."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from dfs_jax.costs.flops import exit_costs
from dfs_jax.costs.operations import count_operations
from dfs_jax.forks import create_fork
from dfs_jax.inference.stages import check_stages, model_stages
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.tracing import exit_logits, skip_dead_gradients, stages_of, with_exit_logits
from dfs_jax.types import UserError
from tests.support.marks import slow
from tests.support.networks import SMALL_MSDNET

WIDTH, CLASSES, BATCH = 7, 5, 3
WAYS = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}


def parameters():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    block = lambda: jax.random.normal(next(keys), (WIDTH, WIDTH)) / WIDTH**0.5  # noqa: E731
    head = lambda: jax.random.normal(next(keys), (WIDTH, CLASSES))  # noqa: E731
    return {"blocks": [block() for _ in range(3)], "heads": [head() for _ in range(3)]}


def network(params, x, way="plain", mark=exit_logits):
    """Three blocks, each in a call of its own that also marks an exit; and the logits as a list."""
    logits = []
    for i, (w, head) in enumerate(zip(params["blocks"], params["heads"], strict=True)):

        def block(w, head, x, i=i):
            x = jnp.tanh(x @ w) + jnp.arange(WIDTH) / WIDTH
            forked = FeatureSurgery(0.3)(x, exit_index=i, num_exits=3)
            return forked.to_trunk, mark(i, forked.to_head @ head)

        x, of_exit = WAYS[way](block)(w, head, x)
        logits.append(of_exit)
    return x, jnp.stack(logits)


X = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
EXAMPLE = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)


@pytest.mark.parametrize("way", WAYS)
def test_marked_logits_come_back_and_have_their_gradients(way):
    params = parameters()

    def loss(params, x, read):
        result, logits = read(params, x)
        return jnp.sum(jnp.sin(logits)), (result, logits)

    def by_marks(params, x):
        (result, _), logits = with_exit_logits(functools.partial(network, way=way))(params, x)
        return result, logits

    def by_hand(params, x):
        return network(params, x, mark=lambda i, logits: logits)

    grads, found = jax.jit(jax.grad(functools.partial(loss, read=by_marks), has_aux=True))(
        params, X
    )
    plain, expected = jax.grad(functools.partial(loss, read=by_hand), has_aux=True)(params, X)
    for a, e in zip(
        jax.tree.leaves((grads, found)), jax.tree.leaves((plain, expected)), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(by_marks, (None, 0))(params, jnp.stack([X, 2 * X]))[1]
    np.testing.assert_allclose(mapped[1], by_hand(params, 2 * X)[1], rtol=1e-5, atol=1e-6)


def test_training_skips_dead_gradients():
    """A product takes m multiply-adds forward and as many for each gradient.

    Heads but the last read 5 live channels of 7, blocks 2 and 3 read 2 of 7, block 1 reads data.
    """
    params = parameters()

    def loss(params, x):
        return jnp.sum(jnp.sin(with_exit_logits(network)(params, x)[1]))

    def macs(f):
        return count_operations(jax.make_jaxpr(f)(params, X))

    block, head = BATCH * WIDTH * WIDTH, BATCH * WIDTH * CLASSES
    naive = 3 * (3 * block + 3 * head) - block
    assert macs(jax.grad(loss)) == naive
    saved = 2 * block * 5 // 7 + 2 * head * 2 // 7
    assert macs(jax.grad(skip_dead_gradients(loss))) == naive - saved


def run(stages, x):
    carry, found = x, []
    for stage in stages:
        carry, logits = jax.jit(stage)(carry)
        found.append(logits)
    return jnp.stack(found)


def multiply_adds(stage, carry):
    """With the weights as arguments: products with constants do not count."""
    return count_operations(jax.make_jaxpr(lambda stage, carry: stage(carry))(stage, carry))


@pytest.mark.parametrize("way", WAYS)
def test_stages_compute_the_marked_logits_once_at_any_batch_size(way):
    params = parameters()
    stages = stages_of(functools.partial(network, way=way), params, EXAMPLE)
    assert check_stages(stages, EXAMPLE) == CLASSES
    for x in (X, X[:1], jnp.concatenate([X, 3 * X])):
        np.testing.assert_allclose(run(stages, x), network(params, x)[1], rtol=1e-6, atol=1e-6)
    carry, macs = jax.ShapeDtypeStruct(X.shape, X.dtype), []
    for stage in stages:
        macs.append(multiply_adds(stage, carry))
        carry, _ = jax.eval_shape(stage, carry)
    assert macs == [BATCH * WIDTH * (WIDTH + CLASSES)] * 3
    assert carry == ()


def test_a_carry_is_what_a_hand_written_cut_carries():
    """The fork's two parts, 2 and 5 channels, and nothing that does not depend on the examples."""
    stages = stages_of(network, parameters(), EXAMPLE)
    carry, _ = jax.eval_shape(stages[0], jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32))
    assert sum(np.prod(x.shape) for x in carry) == BATCH * WIDTH


def test_weights_are_leaves_and_can_be_exchanged():
    params = parameters()
    stages = stages_of(network, params, EXAMPLE)
    other = jax.tree.map(lambda w: 2 * w, params)
    names = [list(stage.args[0]) for stage in stages]
    assert names == [[f"blocks/{i}", f"heads/{i}"] for i in range(3)]
    of_stages = list(zip(other["blocks"], other["heads"], strict=True))
    exchanged = jax.tree.unflatten(jax.tree.structure(stages), jax.tree.leaves(of_stages))
    np.testing.assert_allclose(run(exchanged, X), network(other, X)[1], rtol=1e-6, atol=1e-6)


def test_a_symbolic_batch():
    params = parameters()
    (batch,) = export.symbolic_shape("batch")
    first, *_ = stages_of(network, params, EXAMPLE)
    shape = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)
    exported = export.export(jax.jit(first))(shape)
    np.testing.assert_allclose(exported.call(X)[1], network(params, X)[1][0], rtol=1e-6, atol=1e-6)


def test_a_branch_that_no_early_exit_reads_waits():
    def branched(w, x):
        late = jnp.tanh(x @ w)  # written first, read by the last exit alone
        early = x[:, :2] @ w[:2]
        exit_logits(0, early)
        exit_logits(1, late + early)

    w = jnp.ones((WIDTH, WIDTH))
    stages = stages_of(branched, w, EXAMPLE)
    carry, _ = jax.eval_shape(stages[0], jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32))
    assert multiply_adds(stages[0], X) == BATCH * 2 * WIDTH
    assert sorted(x.shape for x in carry) == [(BATCH, WIDTH), (BATCH, WIDTH)]  # x and early


def looped(w, x):
    return lax.scan(lambda x, _: (exit_logits(0, x @ w), None), x, None, length=2)[0]


def conditional(w, x):
    return lax.cond(x[0, 0] > 0, lambda x: exit_logits(0, x @ w), lambda x: x, x)


def twice(w, x):
    return exit_logits(1, exit_logits(0, x @ w)) + exit_logits(1, x)


def flattened(w, x):
    x = jnp.sin(x @ w).reshape(-1)
    exit_logits(0, x.reshape(-1, WIDTH))
    exit_logits(1, jnp.tanh(x).reshape(-1, WIDTH))


def transposed(w, x):
    x = jnp.sin(x @ w).T
    exit_logits(0, (x + 1).T)
    exit_logits(1, jnp.tanh(x).T)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (looped, "exit_logits stands inside 'scan'"),
        (conditional, "exit_logits stands inside 'cond'"),
        (twice, r"must mark the exits 0, 1, ... once each, got 0, 1, 1"),
        (lambda w, x: exit_logits(1, x @ w), "once each, got 1"),
        (lambda w, x: x @ w, "once each, got none"),
    ],
)
def test_what_cannot_be_cut_is_one_sentence(function, message):
    w = jnp.ones((WIDTH, WIDTH))
    for cut in (lambda: stages_of(function, w, EXAMPLE), lambda: with_exit_logits(function)(w, X)):
        with pytest.raises(UserError, match=message):
            cut()


def test_a_carry_without_the_batch_is_named():
    message = r"stage 1 would hand reshape.*\[14\] for a batch of 2"
    with pytest.raises(UserError, match=message):
        stages_of(flattened, jnp.ones((WIDTH, WIDTH)), EXAMPLE)


def test_a_carry_has_the_batch_first_where_the_function_has_it_last():
    w = parameters()["blocks"][0]
    stages = stages_of(transposed, w, EXAMPLE)
    (carry,), _ = stages[0](X)
    np.testing.assert_allclose(carry, jnp.sin(X @ w), rtol=1e-6)
    logits = with_exit_logits(transposed)(w, X)[1]
    np.testing.assert_allclose(run(stages, X), logits, rtol=1e-6)


@pytest.mark.parametrize("index", [-1, 1.0, True, "0"])
def test_an_index_that_is_no_exit(index):
    with pytest.raises(UserError, match="exit_index must be a whole number of at least 0"):
        exit_logits(index, X)


MODELS = {
    "vgg7": {"width": 4, "stage_sizes": (1, 1, 1)},
    "resnet18": {"width": 4, "stage_sizes": (1, 1)},
    "msdnet": {**SMALL_MSDNET, "num_exits": 4, "prune": "min"},
    "vit_tiny": {"width": 6, "heads": 2, "depth": 3, "patch_size": 5, "first_exit_layer": 2},
}


@pytest.mark.parametrize("name", slow(MODELS, "resnet18", "vit_tiny"))
def test_built_in_models_cost_no_more_up_to_any_exit_than_their_blocks(name):
    model = create_model(name, num_classes=CLASSES, cpu_kernels=False, **MODELS[name])
    variables = init_variables(model, jax.random.key(0), (10, 15, 3))
    fork, example = create_fork("dfs"), jax.ShapeDtypeStruct((10, 15, 3), jnp.float32)
    stages = model_stages(model, variables, fork, example)
    images = jax.random.normal(jax.random.key(1), (2, 10, 15, 3))
    carry, staged_carry, by_blocks, macs = images, images, [], []
    for i, stage in enumerate(stages):
        macs.append(multiply_adds(stage, staged_carry))
        staged_carry, _ = jax.eval_shape(stage, staged_carry)
        carry = model.apply(variables, fork, i, carry, method="run_block")
        by_blocks.append(model.apply(variables, fork, i, carry, method="run_head").logits)
    np.testing.assert_allclose(run(stages, images), by_blocks, rtol=1e-4, atol=1e-5)
    counted = exit_costs(model, (10, 15, 3))
    np.testing.assert_array_equal(np.cumsum(macs), [2 * cost.macs for cost in counted])
    saved = [cost.published_macs - cost.macs for cost in counted]
    assert min(saved) >= 0
    assert (saved[0] > 0) == (name == "msdnet")
