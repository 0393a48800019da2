"""Predictions of every exit: hand-computed values, padding, and the ensemble."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.exits.confidence import (
    ExitPredictions,
    anytime_accuracy,
    concatenate_predictions,
    ensemble_accuracy,
    exit_predictions,
)

EXITS, EXAMPLES, CLASSES = 3, 7, 5


def random_case(seed=0, examples=EXAMPLES):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((EXITS, examples, CLASSES)).astype(np.float32)
    return logits, rng.integers(0, CLASSES, examples)


def test_every_field_equals_its_definition():
    logits, labels = random_case()
    got = jax.jit(exit_predictions)(logits, labels)
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(got.confidence, probabilities.max(axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(got.predicted, probabilities.argmax(axis=-1))
    np.testing.assert_array_equal(got.ensemble, probabilities.mean(axis=0).argmax(axis=-1))
    for i in range(EXITS):
        for n in range(EXAMPLES):
            expected = -np.log(probabilities[i, n, labels[n]])
            np.testing.assert_allclose(got.loss[i, n], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.labels, labels)


def test_shapes_and_types():
    logits, labels = random_case()
    for dtype in (jnp.float32, jnp.bfloat16):
        got = exit_predictions(jnp.asarray(logits, dtype), labels)
        chex.assert_shape([got.confidence, got.predicted, got.loss], (EXITS, EXAMPLES))
        chex.assert_shape([got.ensemble, got.labels], (EXAMPLES,))
        chex.assert_type([got.confidence, got.loss], jnp.float32)
        chex.assert_type([got.predicted, got.ensemble, got.labels], jnp.int32)


def test_ensemble_means_probabilities_not_logits_or_votes():
    # Two exits lean slightly to class 0, one is sure of class 1: votes say 0, probabilities 1.
    probabilities = jnp.array([[[0.55, 0.45]], [[0.55, 0.45]], [[0.01, 0.99]]])
    assert exit_predictions(jnp.log(probabilities), jnp.array([1])).ensemble.tolist() == [1]
    # One exit's logits dwarf the others' while its probability saturates: mean logits say 0.
    logits = jnp.array([[[40.0, 0.0]], [[0.0, 5.0]], [[0.0, 5.0]]])
    assert exit_predictions(logits, jnp.array([1])).ensemble.tolist() == [1]


def test_huge_logits_stay_finite():
    got = exit_predictions(jnp.array([[[1e4, -1e4]]]), jnp.array([1]))
    assert got.confidence.tolist() == [[1.0]]
    assert got.loss.tolist() == [[2e4]]


def test_accuracies_by_hand():
    predicted = np.array([[1, 0, 3, 0], [1, 2, 3, 0]])
    zeros = np.zeros((2, 4))
    p = ExitPredictions(zeros, predicted, np.array([1, 0, 0, 0]), zeros, np.array([1, 2, 3, 4]))
    assert anytime_accuracy(p).tolist() == [0.5, 0.75]
    assert ensemble_accuracy(p) == 0.25


def test_padding_is_dropped_and_order_kept():
    logits, labels = random_case(examples=11)
    whole = jax.device_get(exit_predictions(logits, labels))
    padded = np.concatenate([logits, logits[:, :1]], axis=1)
    padded_labels = np.append(labels, labels[0])
    starts = range(0, 12, 4)
    parts = [exit_predictions(padded[:, s : s + 4], padded_labels[s : s + 4]) for s in starts]
    masks = [np.arange(s, s + 4) < 11 for s in starts]
    joined = concatenate_predictions(parts, masks)
    assert joined.num_examples == 11
    chex.assert_trees_all_close(joined, whole, rtol=1e-6)
    for got, expected in zip(joined, whole, strict=True):
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype
    np.testing.assert_allclose(anytime_accuracy(joined), anytime_accuracy(whole))
    assert concatenate_predictions(parts).num_examples == 12


def test_mistakes_raise():
    part = exit_predictions(*random_case())
    with pytest.raises(ValueError, match="7 examples take as many masks"):
        concatenate_predictions([part], [np.ones(3, bool)])
    with pytest.raises(ValueError, match="zip"):
        concatenate_predictions([part, part], [np.ones(EXAMPLES, bool)])
    with pytest.raises(ValueError, match="no predictions"):
        concatenate_predictions([])
    empty = concatenate_predictions([part], [np.zeros(EXAMPLES, bool)])
    for accuracy in (anytime_accuracy, ensemble_accuracy):
        with pytest.raises(ValueError, match="0 examples"):
            accuracy(empty)
