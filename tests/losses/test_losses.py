"""Losses against values computed by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.losses import LOSSES, create_loss
from dfs_jax.losses.deep_supervision import DeepSupervision, exit_cross_entropies
from dfs_jax.losses.distillation import BYOT, MultiExitDistillation, safe_norm
from dfs_jax.types import ExitOutputs, UserError

EXITS, BATCH, CLASSES, WIDTH = 3, 5, 7, 11
RNG = np.random.default_rng(0)
LABELS = jnp.asarray([6, 0, 3, 3, 1])
OUTPUTS = ExitOutputs(
    jnp.asarray(RNG.normal(size=(EXITS, BATCH, CLASSES)), jnp.float32),
    tuple(jnp.asarray(RNG.normal(size=(BATCH, WIDTH)), jnp.float32) for _ in range(EXITS)),
)
LOSS_ROWS = {
    "deep_supervision": {"exit_weights": (1.0, 2.0, 0.5)},
    "byot": {"kd_weight": 0.4, "temperature": 2.0, "feature_weight": 0.1},
    "distillation": {"teacher": "deeper", "temperature": 2.0},
}


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def entropies_by_hand(logits, labels):
    """Mean cross-entropy of each exit, example by example."""
    return [
        np.mean([-np.log(softmax(z)[label]) for z, label in zip(exit_logits, labels, strict=True)])
        for exit_logits in np.asarray(logits, np.float64)
    ]


@pytest.mark.parametrize("name", LOSS_ROWS)
def test_every_loss_gives_one_finite_value_an_exit(name):
    loss = create_loss(name, **LOSS_ROWS[name])
    values, gradient = jax.value_and_grad(lambda o: loss(o, LABELS).sum())(OUTPUTS)
    chex.assert_shape(loss(OUTPUTS, LABELS), (EXITS,))
    chex.assert_tree_all_finite((values, gradient))
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, OUTPUTS)


@pytest.mark.parametrize("name", LOSS_ROWS)
def test_a_loss_that_says_so_couples_no_exits(name):
    """Exit e's loss has no gradient at the other exits' outputs: per-exit gradients rely on it."""
    loss = create_loss(name, **LOSS_ROWS[name])
    assert not loss.couples_exits
    jacobian = jax.jacrev(lambda o: loss(o, LABELS))(OUTPUTS)
    for e in range(EXITS):
        for j in range(EXITS):
            parts = (jacobian.logits[e, j], jacobian.features[j][e])
            assert any(bool(jnp.any(part)) for part in parts) == (e == j), (e, j)


def test_cross_entropy_of_known_probabilities():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    entropies = exit_cross_entropies(logits, jnp.asarray([0, 2]))
    np.testing.assert_allclose(entropies, [[-np.log(0.5), -np.log(0.8)]], rtol=1e-6)


def test_deep_supervision_is_the_mean_over_examples_times_the_weight():
    expected = np.asarray(entropies_by_hand(OUTPUTS.logits, LABELS))
    np.testing.assert_allclose(DeepSupervision()(OUTPUTS, LABELS), expected, rtol=1e-5)
    weighted = DeepSupervision(exit_weights=[0, 1, 2.5])(OUTPUTS, LABELS)
    np.testing.assert_allclose(weighted, expected * [0, 1, 2.5], rtol=1e-5)


def test_linear_weights_grow_with_depth():
    linear = DeepSupervision(exit_weights="linear")(OUTPUTS, LABELS)
    plain = DeepSupervision(exit_weights="constant")(OUTPUTS, LABELS)
    np.testing.assert_array_equal(plain, DeepSupervision()(OUTPUTS, LABELS))
    np.testing.assert_allclose(linear, plain * np.asarray([0.5, 1.0, 1.5]), rtol=1e-6)


def test_label_smoothing_spreads_its_share_evenly():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25]]]))
    smoothed = exit_cross_entropies(logits, jnp.asarray([0]), label_smoothing=0.3)
    expected = -(0.8 * np.log(0.5) + 2 * 0.1 * np.log(0.25))
    np.testing.assert_allclose(smoothed, [[expected]], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kd_weight": 0.6, "temperature": 1.5}])
def test_byot_by_hand(options):
    g, t, w = options.get("kd_weight", 0.3), options.get("temperature", 3.0), 0.03
    logits = np.asarray(OUTPUTS.logits, np.float64)
    features = [np.asarray(f, np.float64) for f in OUTPUTS.features]
    entropies = entropies_by_hand(OUTPUTS.logits, LABELS)
    teacher = softmax(logits[-1] / t)
    expected = []
    for i in range(EXITS - 1):
        kd = np.mean(-(teacher * np.log(softmax(logits[i] / t))).sum(-1))
        fd = np.sqrt(((features[i] - features[-1]) ** 2).sum())
        expected.append((1 - g) * entropies[i] + g * kd + w * fd)
    values = BYOT(**options)(OUTPUTS, LABELS)
    np.testing.assert_allclose(values, [*expected, entropies[-1]], rtol=1e-5)


@pytest.mark.parametrize("teacher", ["last", "deeper"])
def test_distillation_by_hand(teacher):
    g, t, scale = 0.3, 2.5, 1.7
    loss = MultiExitDistillation(kd_weight=g, temperature=t, teacher=teacher, scale=scale)
    logits = np.asarray(OUTPUTS.logits, np.float64)
    entropies = entropies_by_hand(OUTPUTS.logits, LABELS)
    expected = []
    for i in range(EXITS):
        teachers = [EXITS - 1] if teacher == "last" else range(i + 1, EXITS)
        kds = [
            np.mean(-(softmax(logits[j] / t) * np.log(softmax(logits[i] / t))).sum(-1))
            for j in teachers
        ]
        kd = np.mean(kds) if i < EXITS - 1 else 0
        expected.append(scale * ((1 - g) * entropies[i] + g * t**2 * kd))
    np.testing.assert_allclose(loss(OUTPUTS, LABELS), expected, rtol=1e-5)


def test_distillation_without_teachers_is_deep_supervision():
    labels_alone = MultiExitDistillation(kd_weight=0, scale=1, label_smoothing=0.2)
    smooth = DeepSupervision(label_smoothing=0.2)(OUTPUTS, LABELS)
    np.testing.assert_allclose(labels_alone(OUTPUTS, LABELS), smooth, rtol=1e-6)
    half = MultiExitDistillation()(OUTPUTS, LABELS)[-1]
    np.testing.assert_allclose(half, DeepSupervision()(OUTPUTS, LABELS)[-1], rtol=1e-6)


def test_byot_teacher_is_detached():
    byot = BYOT()
    early = jax.grad(lambda o: byot(o, LABELS)[:-1].sum())(OUTPUTS)
    np.testing.assert_array_equal(early.logits[-1], 0)
    np.testing.assert_array_equal(early.features[-1], 0)
    assert np.abs(early.logits[:-1]).min() > 0
    assert all(np.abs(f).min() > 0 for f in early.features[:-1])
    last = jax.grad(lambda o: byot(o, LABELS)[-1])(OUTPUTS)
    np.testing.assert_array_equal(last.logits[:-1], 0)
    assert np.abs(last.logits[-1]).min() > 0


def test_byot_gradient_at_distance_zero_is_zero():
    same = OUTPUTS._replace(features=(OUTPUTS.features[0],) * EXITS)
    gradient = jax.grad(lambda o: BYOT()(o, LABELS).sum())(same)
    chex.assert_tree_all_finite(gradient)
    for feature in gradient.features:
        np.testing.assert_array_equal(feature, 0)


def test_safe_norm():
    x = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])
    value, gradient = jax.value_and_grad(safe_norm)(x)
    assert value == 5
    np.testing.assert_allclose(gradient, x / 5, rtol=1e-6)
    assert safe_norm(jnp.zeros(3)) == 0


def test_byot_without_features_needs_no_adaptation():
    byot = BYOT(feature_weight=0)
    assert not byot.adapts_features
    assert BYOT().adapts_features
    uneven = OUTPUTS._replace(features=(jnp.ones((BATCH, 2)), *OUTPUTS.features[1:]))
    chex.assert_shape(byot(uneven, LABELS), (EXITS,))


def test_byot_smooths_labels():
    plain = BYOT(kd_weight=0, feature_weight=0, label_smoothing=0.2)(OUTPUTS, LABELS)
    smooth = DeepSupervision(label_smoothing=0.2)(OUTPUTS, LABELS)
    np.testing.assert_allclose(plain, smooth, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "deep_supervision",
            {"label_smoothing": 1.0},
            r"label_smoothing must lie in \[0, 1\), got",
        ),
        ("deep_supervision", {"exit_weights": (1, -2)}, r"finite and not negative, got \(1, -2\)"),
        ("deep_supervision", {"exit_weights": (float("nan"),)}, "finite and not negative"),
        (
            "deep_supervision",
            {"exit_weights": "steep"},
            "constant or linear, or one .* got 'steep'",
        ),
        ("deep_supervision", {"exit_weights": 2}, "or one number an exit, got 2"),
        ("deep_supervision", {"temperature": 3.0}, "has no option 'temperature'"),
        ("byot", {"kd_weight": 1.5}, r"kd_weight must lie in \[0, 1\], got 1.5"),
        ("byot", {"temperature": 0}, "temperature must be above 0, got 0"),
        ("byot", {"feature_weight": -1}, "feature_weight must be at least 0, got -1"),
        ("byot", {"label_smoothing": -0.1}, "label_smoothing must lie"),
        ("distillation", {"kd_weight": -0.5}, r"kd_weight must lie in \[0, 1\], got -0.5"),
        ("distillation", {"temperature": float("inf")}, "temperature must be above 0, got inf"),
        ("distillation", {"teacher": "first"}, "teacher must be one of last, deeper, got 'first'"),
        ("distillation", {"scale": 0}, "scale must be finite and above 0, got 0"),
        ("hinge", {}, "unknown loss 'hinge': choose one of byot, deep_supervision, distillation"),
    ],
)
def test_mistakes_are_told(name, options, message):
    with pytest.raises(UserError, match=message):
        create_loss(name, **options)


def test_another_number_of_weights_than_exits_is_refused():
    with pytest.raises(ValueError, match=r"3 exits take 3 exit_weights, got \(1, 2\)"):
        DeepSupervision(exit_weights=(1, 2))(OUTPUTS, LABELS)


def test_every_loss_has_its_row():
    assert LOSS_ROWS.keys() == LOSSES.table.keys()
