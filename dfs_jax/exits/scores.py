"""Measures of an exit's confidence, which thresholds are compared with.

    "max_softmax"  max_c p_c
    "entropy"      1 - H(p) / log(classes), H(p) = -sum_c p_c log p_c
    "margin"       the largest p_c minus the second largest
    "patience"     number of consecutive exits, up to this one, that gave this answer

p is the softmax of the exit's logits divided by its temperature. Higher values mean more
confidence; the first three lie in [0, 1]. Compiled stages, recorded logits and runtimes without jax
use the same code, in float32: on arrays of jax with `jax.numpy`, on others with numpy.

References: Huang et al., ICLR 2018 (maximum); Teerapittayanon et al., "BranchyNet", ICPR 2016
(entropy); Zhou et al., "BERT Loses Patience", NeurIPS 2020 (patience).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dfs_jax.registry import Registry
from dfs_jax.types import PyTree

if TYPE_CHECKING:
    import jax


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
    measure: Measure, logits: Any, temperature: Any, history: PyTree
) -> tuple[ExitAnswers, PyTree]:
    """Returns an exit's answers, given its logits `[batch, classes]`, and the measure's history.

    Example:
      >>> answers, _ = answer(margin, np.log(np.array([[0.75, 0.25]])), 1.0, None)
      >>> answers.predicted.tolist(), answers.confidence.round(3).tolist()
      ([0], [0.5])
    """
    numpy = namespace(logits)
    logits = numpy.asarray(logits, numpy.float32)
    probabilities = softmax(logits / numpy.asarray(temperature, numpy.float32))
    predicted = logits.argmax(axis=-1).astype(numpy.int32)
    confidence, history = measure(probabilities, predicted, history)
    return ExitAnswers(probabilities, predicted, confidence), history


def namespace(array: Any) -> Any:
    """Returns numpy for its arrays, and `jax.numpy` for those of jax."""
    if isinstance(array, np.ndarray | np.generic):
        return np
    import jax.numpy as jnp

    return jnp


def softmax(logits: jax.Array) -> jax.Array:
    """Returns the softmax over the last axis."""
    numpy = namespace(logits)
    raised = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def max_softmax(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns the largest probability."""
    del predicted, history
    return probabilities.max(axis=-1), None


def entropy(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns 1 minus the entropy, as a fraction of the entropy of a uniform distribution."""
    del predicted, history
    numpy = namespace(probabilities)
    logs = numpy.log(numpy.where(probabilities == 0, 1, probabilities))  # 0 log 0 = 0
    summed = numpy.sum(-probabilities * logs, axis=-1)
    return 1 - summed / numpy.log(numpy.float32(probabilities.shape[-1])), None


def margin(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns the largest probability minus the second largest."""
    numpy = namespace(probabilities)
    classes = numpy.arange(probabilities.shape[-1])
    others = numpy.where(classes == predicted[:, None], 0, probabilities)
    del history
    return numpy.max(probabilities, axis=-1) - numpy.max(others, axis=-1), None


def patience(
    probabilities: jax.Array, predicted: jax.Array, history: PyTree
) -> tuple[jax.Array, PyTree]:
    """Returns the number of consecutive exits, up to this one, with this answer: 1, 2, ..."""
    numpy = namespace(probabilities)
    if history is None:
        agreeing = numpy.ones(predicted.shape, numpy.float32)
    else:
        before, agreeing = history
        agreeing = numpy.where(predicted == before, agreeing + 1, numpy.float32(1))
    # NaN probabilities have no answer to agree with.
    confidence = numpy.where(numpy.isnan(probabilities[:, 0]), numpy.float32(numpy.nan), agreeing)
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
