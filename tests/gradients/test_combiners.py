"""Every registered combiner: hand-solved cases, properties, slow references, types and states."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, nnls

from dfs_jax.gradients import RULES, create_rule
from dfs_jax.gradients.cagrad import CAGrad
from dfs_jax.gradients.combiner import Combiner
from dfs_jax.gradients.gram import combine, gram_matrix
from dfs_jax.gradients.nash_mtl import NashMTL, bargain
from dfs_jax.gradients.pcgrad import PCGrad
from dfs_jax.gradients.upgrad import UPGrad
from dfs_jax.gradients.weighted_sum import WeightedSum
from dfs_jax.types import UserError

COMBINER_ROWS = {"weighted_sum": {}, "pcgrad": {}, "cagrad": {}, "nash_mtl": {}, "upgrad": {}}
NAMES = list(COMBINER_ROWS)
DETERMINISTIC = [name for name in NAMES if name != "pcgrad"]
KEY = jax.random.key(5)
EXITS, WIDTH = 5, 11


def build(name):
    return create_rule(name, **COMBINER_ROWS[name])


@functools.partial(jax.jit, static_argnums=0)
def update(combiner, grads, key=KEY):
    """The combined gradients; equal combiners are compiled once."""
    params = jax.tree.map(lambda leaf: leaf[0], grads)
    return combiner.update(grads, combiner.init_trunk(params), params, key=key)[0]


def combined(combiner, vectors, key=KEY):
    """The combination of gradients given as rows, which are filled up to one width."""
    rows = np.zeros((len(vectors), WIDTH), np.float32)
    rows[:, : len(vectors[0])] = vectors
    return np.asarray(update(combiner, {"block1": rows}, key)["block1"])[: len(vectors[0])]


def gradients(seed=0, *, common=0.0, exits=EXITS, width=WIDTH):
    """Gradients of very different lengths; `common` is what they share."""
    rng = np.random.default_rng(seed)
    vectors = common * rng.normal(size=width) + rng.normal(size=(exits, width))
    return vectors * np.exp(rng.normal(size=(exits, 1)))


CONFLICTING = [gradients(seed) for seed in range(4)]
AGREEING = [np.abs(gradients(seed)) for seed in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_equal_gradients_give_their_sum(name):
    one = gradients()[0]
    np.testing.assert_allclose(combined(build(name), [one] * EXITS), EXITS * one, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_exit_is_left_alone(name):
    one = gradients()[:1]
    np.testing.assert_allclose(combined(build(name), one), one[0], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_exits_without_a_gradient_disturb_nothing(name):
    vectors = CONFLICTING[0][:2]
    with_zeros = np.stack([np.zeros(WIDTH), vectors[0], np.zeros(WIDTH), vectors[1]])
    alone = combined(build(name), vectors)
    np.testing.assert_allclose(combined(build(name), with_zeros), alone, rtol=1e-4, atol=1e-5)
    nothing = combined(build(name), np.zeros((3, WIDTH)))
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize(
    "combiner",
    [PCGrad("mean"), UPGrad("mean"), CAGrad(0.5, "paper"), CAGrad(0.5, "released"), NashMTL(1.0)],
    ids=str,
)
def test_means_are_over_the_exits_that_have_a_gradient(combiner):
    vectors = CONFLICTING[0][:2]
    with_zeros = np.stack([np.zeros(WIDTH), vectors[0], np.zeros(WIDTH), vectors[1]])
    alone = combined(combiner, vectors)
    np.testing.assert_allclose(combined(combiner, with_zeros), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_order_of_the_exits_does_not_matter(name):
    vectors, order = CONFLICTING[1], [3, 0, 4, 2, 1]
    there = combined(build(name), vectors[order])
    np.testing.assert_allclose(there, combined(build(name), vectors), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_combination_scales_with_the_gradients(name, factor):
    vectors = CONFLICTING[2]
    scaled = combined(build(name), factor * vectors)
    np.testing.assert_allclose(
        scaled / factor, combined(build(name), vectors), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vectors", [[[1, 0], [-1, 0]], [[1, 0], [1, 1e-4], [-2, 0]]])
def test_opposite_gradients_give_finite_numbers(name, vectors):
    assert np.isfinite(combined(build(name), vectors)).all()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_finite_are_not_hidden(name):
    vectors = CONFLICTING[0].copy()
    vectors[2, 3] = np.nan
    assert not np.isfinite(combined(build(name), vectors)).all()


def tree_of(vectors, dtype=jnp.float32):
    """The same numbers as a trunk's gradients; the first exit does not reach the second block."""
    block1, bias, block2 = np.split(vectors, [6, 8], axis=1)
    return {
        "block1": {
            "w": jnp.asarray(block1.reshape(-1, 2, 3), dtype),
            "b": jnp.asarray(bias, dtype),
        },
        "block2": {"w": jnp.asarray(block2[1:], dtype)},
    }


def tree_and_rows(dtype=jnp.float32):
    vectors = CONFLICTING[3].copy()
    vectors[0, 8:] = 0
    return tree_of(vectors, dtype), vectors


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_some_exits_do_not_reach(name):
    tree, vectors = tree_and_rows()
    params = jax.tree.map(lambda leaf: leaf[0], tree)
    combiner = build(name)
    result = update(combiner, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, params)
    flat = combined(combiner, vectors)
    ours = np.concatenate(
        [result["block1"]["w"].ravel(), result["block1"]["b"], result["block2"]["w"]]
    )
    np.testing.assert_allclose(ours, flat, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_gradients_are_summed_in_float32(name):
    tree, _ = tree_and_rows(jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    combiner = build(name)
    ours, theirs = update(combiner, tree), update(combiner, exact)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(ours))
    chex.assert_trees_all_equal(ours, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), theirs))


def test_long_sums_of_bfloat16_do_not_stop_growing():
    grads = {"block1": jnp.full((2, 100, 1000), 0.01, jnp.bfloat16)}
    np.testing.assert_allclose(gram_matrix(grads), 1e5 * float(jnp.bfloat16(0.01)) ** 2, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_form_and_nothing_is_compiled_twice(name):
    combiner = build(name)
    params = {"block1": jnp.zeros(WIDTH)}
    state = combiner.init_trunk(params)
    jitted = jax.jit(combiner.update)
    for seed in range(3):
        grads = {"block1": jnp.asarray(gradients(seed), jnp.float32)}
        _, new = jitted(grads, state, params, key=jax.random.key(seed))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_descent_ends_where_no_exit_can_gain_without_another_losing(name):
    """Three bowls around the corners of a triangle: the end must lie in the triangle."""
    corners = jnp.asarray([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    steepness = jnp.asarray([1.0, 0.2, 3.0])
    combiner = build(name)

    def step(x, inputs):
        rate, key = inputs
        grads = {"x": steepness[:, None] * (x - corners)}
        return x - rate * combiner.update(grads, (), {"x": x}, key=key)[0]["x"], None

    rates = 0.2 * 0.98 ** jnp.arange(300)
    start, keys = jnp.asarray([-3.0, 5.0]), jax.random.split(KEY, 300)
    x, _ = jax.lax.scan(step, start, (rates, keys))
    barycentric = np.linalg.solve(np.vstack([np.asarray(corners).T, np.ones(3)]), [*x, 1])
    assert barycentric.min() > -0.02


def test_gram_matrix_and_combination_by_hand():
    grads = {"block1": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "block2": jnp.array([[[5.0], [6.0]]])}
    np.testing.assert_array_equal(gram_matrix(grads), [[5, 11], [11, 25 + 61]])
    result = combine(grads, jnp.array([10.0, 2.0]))
    np.testing.assert_array_equal(result["block1"], [16, 28])
    np.testing.assert_array_equal(result["block2"], [[10], [12]])


def test_weighted_sum():
    vectors = CONFLICTING[0]
    np.testing.assert_allclose(combined(WeightedSum(), vectors), vectors.sum(0), rtol=1e-5)
    weighted = combined(WeightedSum((1, 0, 2, 0, 0.5)), vectors)
    expected = vectors[0] + 2 * vectors[2] + 0.5 * vectors[4]
    np.testing.assert_allclose(weighted, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"5 exits take 5 weights in the sum, got \(1, 2\)"):
        combined(WeightedSum((1, 2)), vectors)


def pcgrad_by_hand(vectors, orders):
    """As the paper writes it, on whole vectors."""
    total = np.zeros(vectors.shape[1])
    for i, order in enumerate(orders):
        p = vectors[i].copy()
        for j in order:
            if j != i and p @ vectors[j] < 0:
                p -= (p @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
        total += p
    return total


@pytest.mark.parametrize("vectors", CONFLICTING)
def test_pcgrad_is_the_papers_loop_in_one_of_its_orders(vectors):
    numbers = jnp.broadcast_to(jnp.arange(EXITS), (EXITS, EXITS))
    orders = np.asarray(jax.random.permutation(KEY, numbers, axis=1, independent=True))
    assert len({tuple(order) for order in orders.tolist()}) > 1  # each exit has its own
    expected = pcgrad_by_hand(vectors, orders)
    np.testing.assert_allclose(combined(PCGrad(), vectors), expected, rtol=1e-4, atol=1e-5)
    mean = combined(PCGrad(scaling="mean"), vectors)
    np.testing.assert_allclose(mean, expected / EXITS, rtol=1e-4, atol=1e-5)


def test_pcgrads_order_comes_from_the_key():
    vectors = CONFLICTING[0]
    first, again, other = (combined(PCGrad(), vectors, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_pcgrad_by_hand():
    """(1, 0) loses half of (-1, 1), and (-1, 1) its part along (1, 0)."""
    np.testing.assert_allclose(combined(PCGrad(), [[1, 0], [-1, 1]]), [0.5, 1.5], rtol=1e-5)


@pytest.mark.parametrize("vectors", AGREEING)
@pytest.mark.parametrize("combiner", [PCGrad(), UPGrad()], ids=["pcgrad", "upgrad"])
def test_gradients_that_do_not_conflict_are_left_alone(combiner, vectors):
    np.testing.assert_allclose(combined(combiner, vectors), vectors.sum(0), rtol=1e-4)


def cagrad_dual(vectors, radius):
    """The weights by scipy, from several starts."""
    gram = vectors @ vectors.T
    exits = len(gram)
    mean = np.full(exits, 1 / exits)
    reach = radius * np.sqrt(mean @ gram @ mean)

    def objective(w):
        return w @ gram @ mean + reach * np.sqrt(w @ gram @ w)

    sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1}
    starts = [mean, *(0.9 * np.eye(exits) + 0.1 / exits)]
    runs = [
        minimize(objective, w, bounds=[(0, 1)] * exits, constraints=sums_to_one, tol=1e-12)
        for w in starts
    ]
    return min(runs, key=lambda run: run.fun).x


@pytest.mark.parametrize("radius", [0.2, 0.7])
@pytest.mark.parametrize("vectors", CONFLICTING)
def test_cagrad_is_the_best_within_its_ball(vectors, radius):
    d = combined(CAGrad(radius, "paper"), vectors)
    mean = vectors.mean(0)
    distance = np.linalg.norm(d - mean)
    assert distance <= radius * np.linalg.norm(mean) * (1 + 1e-4)
    dual = cagrad_dual(vectors, radius) @ vectors
    best = mean + radius * np.linalg.norm(mean) * dual / np.linalg.norm(dual)
    assert (vectors @ d).min() == pytest.approx((vectors @ best).min(), abs=1e-3)
    np.testing.assert_allclose(d, best, atol=2e-3 * np.linalg.norm(mean))


def test_cagrad_by_hand():
    """The mean of (4, 0) and (0, 2) is (2, 1); the second gains least, so all goes to (0, 1)."""
    d = combined(CAGrad(0.4, "paper"), [[4, 0], [0, 2]])
    np.testing.assert_allclose(d, [2, 1 + 0.4 * np.sqrt(5)], rtol=1e-5)
    np.testing.assert_allclose(combined(CAGrad(0.4), [[4, 0], [0, 2]]), d * 2 / 1.4, rtol=1e-5)
    released = combined(CAGrad(0.4, "released"), [[4, 0], [0, 2]])
    np.testing.assert_allclose(released, d * 2 / 1.16, rtol=1e-5)


def test_cagrad_of_radius_zero_is_the_sum():
    vectors = CONFLICTING[1]
    np.testing.assert_allclose(combined(CAGrad(0), vectors), vectors.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_nash_solves_its_equation_on_independent_gradients(seed):
    vectors = gradients(seed)
    gram = vectors @ vectors.T
    norms = np.sqrt(np.diag(gram))
    alpha = np.asarray(bargain(jnp.asarray(gram / np.outer(norms, norms), jnp.float32))) / norms
    assert (alpha > 0).all()
    np.testing.assert_allclose((gram @ alpha) * alpha, 1, rtol=1e-3)
    expected = np.sqrt(np.linalg.norm(gram)) * alpha @ vectors
    np.testing.assert_allclose(combined(NashMTL(), vectors), expected, rtol=2e-3, atol=1e-3)


def test_nash_by_hand():
    """Orthogonal gradients: alpha_i = 1 / norm_i, and the Frobenius norm is sqrt(4^4 + 3^4)."""
    expected = (4**4 + 3**4) ** 0.25
    np.testing.assert_allclose(combined(NashMTL(), [[4, 0], [0, 3]]), [expected] * 2, rtol=1e-4)
    clipped = combined(NashMTL(max_norm=1.0), [[4, 0], [0, 3]])
    np.testing.assert_allclose(clipped, [0.5**0.5] * 2, rtol=1e-4)
    small = combined(NashMTL(max_norm=1.0), [[0.04, 0], [0, 0.03]])
    np.testing.assert_allclose(small, [expected / 100] * 2, rtol=1e-4)


def test_nashs_direction_is_the_same_however_the_losses_are_scaled():
    vectors = CONFLICTING[2]
    scaled = np.asarray([[0.1], [10], [3], [1], [0.5]]) * vectors
    a, b = combined(NashMTL(), vectors), combined(NashMTL(), scaled)
    np.testing.assert_allclose(a / np.linalg.norm(a), b / np.linalg.norm(b), atol=1e-3)


@pytest.mark.parametrize("vectors", CONFLICTING)
def test_upgrad_projects_onto_the_dual_cone(vectors):
    """A projection is what is left after the nearest point of the opposite cone (Moreau)."""
    projections = [g - vectors.T @ -nnls(vectors.T, -g)[0] for g in vectors]
    d = combined(UPGrad(), vectors)
    np.testing.assert_allclose(d, np.sum(projections, 0), atol=1e-3 * np.abs(vectors).max())
    assert (vectors @ d).min() > -1e-3 * np.linalg.norm(vectors) ** 2
    mean = combined(UPGrad(scaling="mean"), vectors)
    np.testing.assert_allclose(mean, d / EXITS, rtol=1e-4, atol=1e-6)


def test_upgrad_by_hand():
    np.testing.assert_allclose(combined(UPGrad(), [[1, 0], [-1, 1]]), [0.5, 1.5], rtol=1e-4)
    np.testing.assert_allclose(combined(UPGrad(), [[1, 0], [-1, 0]]), [0, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("weighted_sum", {"weights": (1, -1)}, r"finite and not negative, got \(1, -1\)"),
        ("weighted_sum", {"weights": (0, 0.0)}, r"must be above 0 .* got \(0, 0.0\)"),
        ("weighted_sum", {"radius": 0.4}, "gradient rule 'weighted_sum' has no option 'radius'"),
        ("pcgrad", {"scaling": "product"}, "scaling must be one of sum, mean, got 'product'"),
        ("cagrad", {"radius": 1.0}, r"radius must lie in \[0, 1\), got 1.0"),
        ("cagrad", {"scaling": "mean"}, "scaling must be one of sum, released, paper, got 'mean'"),
        ("nash_mtl", {"max_norm": 0.0}, "max_norm must be finite and above 0, got 0.0"),
        ("upgrad", {"scaling": "released"}, "scaling must be one of sum, mean, got 'released'"),
        ("mgda", {}, "unknown gradient rule 'mgda': choose one of cagrad, meta_gf, nash_mtl"),
    ],
)
def test_mistakes_are_told(name, options, message):
    with pytest.raises(UserError, match=message):
        create_rule(name, **options)


def test_every_combiner_has_its_row():
    rules = {name: create_rule(name) for name in RULES.table}
    combiners = {name for name, rule in rules.items() if isinstance(rule, Combiner)}
    assert COMBINER_ROWS.keys() == combiners
