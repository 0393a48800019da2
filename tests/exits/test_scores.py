"""Confidence measures: each against its definition, one example at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.exits.confidence import exit_predictions
from dfs_jax.exits.scores import MEASURES, answer
from dfs_jax.types import UserError

EXITS, EXAMPLES, CLASSES = 3, 11, 5


def slow_max(history):
    return max(history[-1])


def slow_entropy(history):
    return 1 + sum(p * math.log(p) for p in history[-1]) / math.log(CLASSES)


def slow_margin(history):
    *_, second, first = sorted(history[-1])
    return first - second


def slow_patience(history):
    answers = [p.index(max(p)) for p in history]
    agreeing = 1
    while agreeing < len(answers) and answers[-1 - agreeing] == answers[-1]:
        agreeing += 1
    return agreeing


SLOW = {
    "max_softmax": slow_max,
    "entropy": slow_entropy,
    "margin": slow_margin,
    "patience": slow_patience,
}


def random_logits(classes=CLASSES):
    rng = np.random.default_rng(3)
    return rng.standard_normal((EXITS, EXAMPLES, classes)).astype(np.float32)


@pytest.mark.parametrize("name", SLOW)
def test_every_measure_is_its_definition(name):
    # Three classes agree often, by chance.
    logits, temperatures = random_logits(), (1.0, 0.5, 2.0)
    logits[1, : EXAMPLES // 2] = logits[0, : EXAMPLES // 2]
    scaled = logits.astype(np.float64) / np.array(temperatures)[:, None, None]
    probabilities = np.exp(scaled) / np.exp(scaled).sum(-1, keepdims=True)
    labels = np.zeros(EXAMPLES, np.int32)
    got = exit_predictions(
        logits, labels, measure=MEASURES.resolve(name), temperatures=temperatures
    )
    for k in range(EXITS):
        for n in range(EXAMPLES):
            expected = SLOW[name](probabilities[: k + 1, n].tolist())
            assert got.confidence[k, n] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(got.predicted, logits.argmax(-1))
    np.testing.assert_allclose(got.loss, -np.log(probabilities[:, :, 0]), rtol=1e-5)
    np.testing.assert_array_equal(got.ensemble, probabilities.mean(0).argmax(-1))
    if name == "patience":
        assert {1.0, 2.0} <= set(np.ravel(got.confidence).tolist())


GUESSES = {"max_softmax": 1 / 3, "entropy": 0, "margin": 0}


@pytest.mark.parametrize("name", GUESSES)
def test_bounds(name):
    logits = jnp.array([[50.0, -50, -50], [0, 0, 0]])
    answers, _ = answer(MEASURES.resolve(name), logits, 1.0, None)
    np.testing.assert_allclose(answers.confidence, [1, GUESSES[name]], atol=1e-6)


@pytest.mark.parametrize("name", SLOW)
def test_what_is_no_number_is_never_sure(name):
    logits = jnp.asarray(random_logits()[0]).at[0, 2].set(jnp.nan)
    answers, _ = answer(MEASURES.resolve(name), logits, 1.0, None)
    assert np.isnan(answers.confidence).tolist() == [True] + [False] * (EXAMPLES - 1)


@pytest.mark.parametrize("name", SLOW)
def test_rows_are_independent_under_jit(name):
    """The content of padding does not affect the other examples of a batch."""
    measure = MEASURES.resolve(name)

    @jax.jit
    def two_exits(first, second):
        _, history = answer(measure, first, 1.0, None)
        return answer(measure, second, 1.0, history)[0]

    logits = random_logits()
    whole = two_exits(logits[0], logits[1])
    part = two_exits(logits[0, 3:5], logits[1, 3:5])
    np.testing.assert_allclose(whole.confidence[3:5], part.confidence, rtol=1e-6)


def test_mistakes():
    with pytest.raises(UserError, match="unknown confidence measure 'sureness'"):
        MEASURES.resolve("sureness")
    with pytest.raises(ValueError, match="zip"):
        exit_predictions(random_logits(), np.zeros(EXAMPLES, int), temperatures=[1.0, 2.0])
