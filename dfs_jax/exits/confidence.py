"""Predictions of all exits, and their accuracies (anytime prediction)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.exits.scores import Measure, answer, max_softmax
from dfs_jax.losses.deep_supervision import exit_cross_entropies


class ExitPredictions(NamedTuple):
    """Predictions of the exits for n examples, shallow exit first.

    Attributes:
      confidence: confidence, `[exits, n]` float32: the largest softmax probability, or another
        measure of `dfs_jax.exits.scores`.
      predicted: class of the largest logit (the first of equals), `[exits, n]` int32.
      ensemble: class of the largest mean of the softmax probabilities over all exits, including
        the last, `[n]` int32.
      loss: cross-entropy in nats, `[exits, n]` float32.
      labels: labels, `[n]` int32.
    """

    confidence: Any
    predicted: Any
    ensemble: Any
    loss: Any
    labels: Any

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return self.labels.shape[0]

    def correct(self) -> Any:
        """Returns whether each exit classifies each example correctly, `[exits, n]` bool."""
        return self.predicted == self.labels[None]


def exit_predictions(
    logits: jax.Array,
    labels: jax.Array,
    *,
    measure: Measure = max_softmax,
    temperatures: Sequence[float] | jax.Array | None = None,
) -> ExitPredictions:
    """Reduces logits to the quantities that evaluation needs; pure, for use in a jitted step.

    Args:
      logits: logits `[exits, n, classes]`; softmax and cross-entropy are computed in float32.
      labels: integer labels, `[n]`.
      measure: measure of confidence.
      temperatures: temperature of each exit, which divides its logits; None for 1.

    Returns:
      `ExitPredictions` of jax arrays.

    Example:
      >>> logits = jnp.log(jnp.array([[[0.6, 0.4]], [[0.2, 0.8]]]))
      >>> p = exit_predictions(logits, jnp.array([1]))
      >>> p.predicted.tolist(), p.ensemble.tolist()
      ([[0], [1]], [1])
    """
    logits = jnp.asarray(logits, jnp.float32)
    scales = [1.0] * len(logits) if temperatures is None else temperatures
    history, exits = None, []
    for i, temperature in zip(range(len(logits)), scales, strict=True):
        answers, history = answer(measure, logits[i], temperature, history)
        exits.append(answers)
    probabilities, predicted, confidence = (jnp.stack(x) for x in zip(*exits, strict=True))
    return ExitPredictions(
        confidence=confidence,
        predicted=predicted,
        ensemble=jnp.argmax(jnp.mean(probabilities, axis=0), axis=-1).astype(jnp.int32),
        loss=exit_cross_entropies(logits / jnp.asarray(scales)[:, None, None], labels),
        labels=jnp.asarray(labels, jnp.int32),
    )


def concatenate_predictions(
    parts: Sequence[ExitPredictions], masks: Sequence[Any] | None = None
) -> ExitPredictions:
    """Joins the batches of one pass over a data set into host arrays, without the padding.

    Args:
      parts: predictions for each batch, in order.
      masks: masks of the examples of each batch, `[n]` bool, False for padding; None if no batch is
        padded.

    Returns:
      `ExitPredictions` of numpy arrays in which every example counts once.

    Raises:
      ValueError: no batches, or masks whose number or sizes do not match them.

    Example:
      >>> batch = exit_predictions(jnp.zeros((2, 3, 5)), jnp.zeros(3, int))
      >>> concatenate_predictions([batch, batch], [[1, 1, 1], [1, 0, 0]]).num_examples
      4
    """
    if not parts:
        raise ValueError("there are no predictions to join: the data set gave no batch")
    if masks is None:
        masks = [np.ones(part.num_examples, bool) for part in parts]
    kept = []
    for part, mask in zip(parts, masks, strict=True):
        mask = np.asarray(mask, bool)
        if mask.shape != (part.num_examples,):
            raise ValueError(f"{part.num_examples} examples take as many masks, got {mask.shape}")
        kept.append([np.asarray(field)[..., mask] for field in part])
    return ExitPredictions(*(np.concatenate(fields, axis=-1) for fields in zip(*kept, strict=True)))


def anytime_accuracy(predictions: ExitPredictions) -> np.ndarray:
    """Returns each exit's accuracy over all examples, `[exits]`, as fractions.

    Raises:
      ValueError: no examples.
    """
    _check_not_empty(predictions)
    return np.count_nonzero(np.asarray(predictions.correct()), axis=1) / predictions.num_examples


def ensemble_accuracy(predictions: ExitPredictions) -> float:
    """Returns the accuracy of the mean of all exits' probabilities, a fraction.

    Raises:
      ValueError: no examples.
    """
    _check_not_empty(predictions)
    correct = np.asarray(predictions.ensemble) == np.asarray(predictions.labels)
    return np.count_nonzero(correct) / predictions.num_examples


def _check_not_empty(predictions: ExitPredictions) -> None:
    if predictions.num_examples == 0:
        raise ValueError("there is no accuracy of 0 examples")
