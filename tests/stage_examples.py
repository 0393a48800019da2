"""Tiny stages for the tests of early-exit inference, and what a policy would do with them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.inference.confidence import exit_predictions
from dfs_jax.inference.policy import Policy
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


def make_predictor(policy: Policy | None, **options) -> EarlyExitPredictor:
    """Returns a predictor of the tiny stages that runs them always, whatever the times."""
    chosen = {"batch_size": 7, "shapes": (1, 3, 7), "fall_back": False, **options}
    return EarlyExitPredictor(STAGES, EXAMPLE, policy, **chosen)


def simulated(policy: Policy, batch: np.ndarray, stages: Sequence[Stage] = STAGES):
    """Returns what the policy makes of the whole network's answers: exits, classes, probabilities.

    Confidences that lie near a threshold would make a test depend on rounding: there are none.
    """
    logits = recorded_logits(stages, [(batch, np.ones(len(batch), bool))])
    predictions = exit_predictions(
        logits,
        np.zeros(len(batch), int),
        measure=policy.measure_function,
        temperatures=policy.temperatures,
    )
    confidence = np.asarray(predictions.confidence)
    for k in range(policy.num_exits):
        assert not policy.is_close(k, confidence[k]).any()
    taken = policy.exits(confidence)
    rows = np.arange(len(batch))
    scaled = logits.astype(np.float64) / np.array(policy.temperatures)[:, None, None]
    exponentials = np.exp(scaled - scaled.max(-1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(-1, keepdims=True))[taken, rows]
    return taken, logits.argmax(-1)[taken, rows], probabilities, confidence[taken, rows]
