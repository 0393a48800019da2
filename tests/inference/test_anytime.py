"""Anytime prediction: running ensembles by definition, and confidence that never falls."""

import itertools

import jax
import numpy as np
import pytest

from dfs_jax.inference.anytime import AnytimePredictor
from dfs_jax.inference.stages import recorded_logits
from dfs_jax.types import UserError
from tests.support.stage_examples import CLASSES, EXITS, STAGES, images

TEMPERATURES = (0.7, 1.0, 1.9)


def own_probabilities(batch, temperatures=TEMPERATURES):
    logits = recorded_logits(STAGES, [(batch, np.ones(len(batch), bool))]).astype(np.float64)
    exponentials = np.exp(logits / np.array(temperatures)[:, None, None])
    return exponentials / exponentials.sum(-1, keepdims=True)


def slow_running(p, ensemble):
    """After each exit, one example at a time."""
    expected = np.empty_like(p)
    for k, n in itertools.product(range(EXITS), range(p.shape[1])):
        known = p[: k + 1, n]
        if ensemble == "product":
            expected[k, n] = known.prod(axis=0) ** (1 / (k + 1))
            expected[k, n] /= expected[k, n].sum()
        else:
            expected[k, n] = known.mean(axis=0) if ensemble == "mean" else known[-1]
    return expected


def slow_surest(p):
    expected = p.copy()
    for k, n in itertools.product(range(1, EXITS), range(p.shape[1])):
        if expected[k, n].max() <= expected[k - 1, n].max():
            expected[k, n] = expected[k - 1, n]
    return expected


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize("ensemble", [None, "mean", "product"])
def test_equals_its_definition(ensemble, monotone):
    batch = images(23)
    expected = slow_running(own_probabilities(batch), ensemble)
    expected = slow_surest(expected) if monotone else expected
    predictor = AnytimePredictor(STAGES, TEMPERATURES, ensemble=ensemble, monotone=monotone)
    answers = list(predictor(batch))
    assert [a.exit_index for a in answers] == list(range(EXITS))
    got = np.stack([a.probabilities for a in answers])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal([a.predicted for a in answers], got.argmax(-1))
    falls = np.diff(got.max(-1), axis=0) < 0
    assert falls.any() == (not monotone)


def test_temperatures_are_1_unless_given():
    got = [a.probabilities for a in AnytimePredictor(STAGES)(images(5))]
    np.testing.assert_allclose(got, own_probabilities(images(5), (1.0,) * EXITS), atol=1e-5)


def test_what_is_not_asked_for_is_not_computed():
    ran = []

    def watched(k):
        def stage(carry):
            jax.debug.callback(lambda: ran.append(k))
            return STAGES[k](carry)

        return stage

    answers = AnytimePredictor([watched(k) for k in range(EXITS)])(images(5))
    for expected in ([0], [0, 1]):
        assert next(answers).probabilities.shape == (5, CLASSES)
        jax.effects_barrier()
        assert ran == expected


def test_mistakes():
    with pytest.raises(UserError, match="unknown ensemble 'vote'"):
        AnytimePredictor(STAGES, ensemble="vote")
    with pytest.raises(UserError, match="3 stages take 3 temperatures, got 2"):
        AnytimePredictor(STAGES, (1.0, 2.0))
