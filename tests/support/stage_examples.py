"""Tiny stages for the tests of early-exit inference, and what a policy would do with them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.inference.policy import Policy, last_exit_only
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.stages import Stage, recorded_logits

SHAPE, CLASSES, EXITS = (2, 1, 3), 5, 3
EXAMPLE = jax.ShapeDtypeStruct(SHAPE, np.float32)


def tiny_stages() -> list[Stage]:
    """Three stages whose carry is a pytree: a feature, and a whole number that goes along."""
    draw = np.random.default_rng(1)
    mix = draw.standard_normal((EXITS, 6, 6)).astype(np.float32)
    heads = draw.standard_normal((EXITS, 6, CLASSES)).astype(np.float32)

    def make(k: int) -> Stage:
        def stage(carry):
            if k == 0:
                carry = {"x": carry.reshape(len(carry), 6), "depth": jnp.zeros(len(carry), int)}
            x = jnp.tanh(carry["x"] @ mix[k])
            depth = carry["depth"] + 1
            return {"x": x, "depth": depth}, 2 * x @ heads[k] + (depth != k + 1)[:, None] * 100

        return stage

    return [make(k) for k in range(EXITS)]


STAGES = tiny_stages()


def images(n: int, seed: int = 0) -> np.ndarray:
    """Returns `[n, 2, 1, 3]` float32."""
    return np.random.default_rng(seed).standard_normal((n, *SHAPE)).astype(np.float32)


def make_predictor(
    policy: Policy,
    *,
    batch_size: int = 7,
    shapes: tuple[int, ...] = (1, 3, 7),
    fall_back: bool = False,
) -> EarlyExitPredictor:
    """Returns a predictor of the tiny stages that runs them always, whatever the times.

    Its counts are its own; its programs are compiled once for all tests.
    """
    return _compiled(policy.measure, batch_size, shapes, fall_back).with_policy(policy)


@functools.cache
def _compiled(
    measure: str, batch_size: int, shapes: tuple[int, ...], fall_back: bool
) -> EarlyExitPredictor:
    nobody = Policy(last_exit_only(EXITS).thresholds, measure)
    options = {"batch_size": batch_size, "shapes": shapes, "fall_back": fall_back}
    return EarlyExitPredictor(STAGES, EXAMPLE, nobody, **options)


def simulated(policy: Policy, batch: np.ndarray, stages: Sequence[Stage] = STAGES):
    """Returns what the policy makes of the whole network's answers: exits, classes, probabilities.

    In float64 on the host. Confidences that lie near a threshold would make a test depend on
    rounding: there are none.
    """
    filled = np.zeros((-(-len(batch) // 64) * 64, *batch.shape[1:]), batch.dtype)
    filled[: len(batch)] = batch
    logits = recorded_logits(stages, [(filled, np.arange(len(filled)) < len(batch))])
    scaled = logits.astype(np.float64) / np.array(policy.temperatures)[:, None, None]
    exponentials = np.exp(scaled - scaled.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    confidence = _confidence(policy.measure, probabilities)
    for k in range(policy.num_exits):
        assert not policy.is_close(k, confidence[k]).any()
    taken, rows = policy.exits(confidence), np.arange(len(batch))
    predicted = logits.argmax(-1)[taken, rows]
    return taken, predicted, probabilities[taken, rows], confidence[taken, rows]


def _confidence(measure: str, probabilities: np.ndarray) -> np.ndarray:
    ranked = np.sort(probabilities, axis=-1)
    if measure == "max_softmax":
        return ranked[..., -1]
    if measure == "margin":
        return ranked[..., -1] - ranked[..., -2]
    if measure == "entropy":
        return 1 + (probabilities * np.log(probabilities)).sum(-1) / np.log(CLASSES)
    predicted = probabilities.argmax(-1)
    agreeing = np.ones(predicted.shape)
    for k in range(1, len(predicted)):
        agreeing[k] += agreeing[k - 1] * (predicted[k] == predicted[k - 1])
    return agreeing
