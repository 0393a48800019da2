"""Measures of an exit's confidence, which thresholds are compared with.

    "max_softmax"  max_c p_c
    "entropy"      1 - H(p) / log(classes), H(p) = -sum_c p_c log p_c
    "margin"       the largest p_c minus the second largest
    "patience"     number of consecutive exits, up to this one, that gave this answer

p is the softmax of the exit's logits divided by its temperature. Higher values mean more
confidence; the first three lie in [0, 1]. Compiled stages and recorded logits use the same code, in
float32.

References: Huang et al., ICLR 2018 (maximum); Teerapittayanon et al., "BranchyNet", ICPR 2016
(entropy); Zhou et al., "BERT Loses Patience", NeurIPS 2020 (patience).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dfs_jax.registry import Registry
from dfs_jax.types import PyTree


class Measure(Protocol):
    """Maps one exit's answers to its confidence `[batch]`, and to a history for the next exit.

    Args:
      probabilities: class probabilities, `[batch, classes]`.
      predicted: predicted classes, `[batch]`.
      history: history that the measure returned at the previous exit, a pytree with the batch
        first; None at the first exit.
    """

    def __call__(
        self, probabilities: jax.Array, predicted: jax.Array, history: PyTree
    ) -> tuple[jax.Array, PyTree]: ...


class ExitAnswers(NamedTuple):
    """Answers of one exit for a batch.

    Attributes:
      probabilities: softmax of the logits divided by the temperature, `[batch, classes]` float32.
      predicted: class of the largest logit (the first of equals), `[batch]` int32.
      confidence: confidence by the measure, `[batch]` float32.
    """

    probabilities: jax.Array
    predicted: jax.Array
    confidence: jax.Array


def answer(
    measure: Measure, logits: jax.Array, temperature: jax.Array | float, history: PyTree
) -> tuple[ExitAnswers, PyTree]:
    """Returns an exit's answers, given its logits `[batch, classes]`, and the measure's history.

    Example:
      >>> answers, _ = answer(margin, jnp.log(jnp.array([[0.75, 0.25]])), 1.0, None)
      >>> answers.predicted.tolist(), answers.confidence.round(3).tolist()
      ([0], [0.5])
    """
    logits = jnp.asarray(logits, jnp.float32)
    probabilities = jax.nn.softmax(logits / jnp.asarray(temperature, jnp.float32))
    predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    confidence, history = measure(probabilities, predicted, history)
    return ExitAnswers(probabilities, predicted, confidence), history


def max_softmax(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns the largest probability."""
    del predicted, history
    return jnp.max(probabilities, axis=-1), None


def entropy(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns 1 minus the entropy, as a fraction of the entropy of a uniform distribution."""
    del predicted, history
    summed = jnp.sum(jax.scipy.special.entr(probabilities), axis=-1)
    return 1 - summed / jnp.log(jnp.float32(probabilities.shape[-1])), None


def margin(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns the largest probability minus the second largest."""
    classes = jnp.arange(probabilities.shape[-1])
    others = jnp.where(classes == predicted[:, None], 0, probabilities)
    del history
    return jnp.max(probabilities, axis=-1) - jnp.max(others, axis=-1), None


def patience(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns the number of consecutive exits, up to this one, with this answer: 1, 2, ..."""
    if history is None:
        agreeing = jnp.ones(predicted.shape, jnp.float32)
    else:
        before, agreeing = history
        agreeing = jnp.where(predicted == before, agreeing + 1, 1)
    # NaN probabilities have no answer to agree with.
    confidence = jnp.where(jnp.isnan(probabilities[:, 0]), jnp.nan, agreeing)
    return confidence, (predicted, agreeing)


MEASURES = Registry(
    "confidence measure",
    {
        "max_softmax": max_softmax,
        "entropy": entropy,
        "margin": margin,
        "patience": patience,
    },
)
