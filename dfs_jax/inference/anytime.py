"""Anytime prediction: an answer after every exit, so that computation can stop at any time.

    ensemble None       the exit's own probabilities p_k
    ensemble "mean"     the mean of p_1 ... p_k
    ensemble "product"  proportional to the geometric mean of p_1 ... p_k

With `monotone=True` an example keeps its answer until a later one is more confident (has a larger
largest probability), so that its confidence never falls from exit to exit.

Reference: Jazbec et al., "Towards Anytime Classification in Early-Exit Architectures by Enforcing
Conditional Monotonicity", NeurIPS 2023 (product of experts; keeping the most confident answer).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.exits.scores import namespace, softmax
from dfs_jax.inference.onnx_stages import OnnxStages
from dfs_jax.types import PyTree, UserError

ENSEMBLES = (None, "mean", "product")


class AnytimeAnswer(NamedTuple):
    """Answer after an exit.

    Attributes:
      exit_index: the exit, 0-based.
      probabilities: class probabilities, `[n, classes]` float32.
      predicted: class of the largest probability, `[n]`.
    """

    exit_index: int
    probabilities: np.ndarray
    predicted: np.ndarray


class AnytimePredictor:
    """Yields answers exit by exit; stages beyond the last answer taken are not computed.

    Args:
      stages: functions `(carry) -> (carry, logits)`, shallow first, or the stages of an ONNX
        export.
      temperatures: temperature of each exit; None for 1.
      ensemble: None, "mean" or "product".
      monotone: whether an example keeps its most confident answer so far.

    Raises:
      UserError: an unknown ensemble, or a number of temperatures other than that of the stages.

    Example: the second of two stages contradicts the first with less confidence.
      >>> stages = [lambda x: (x, x), lambda x: (x, -x / 2)]
      >>> x = np.array([[2.0, 0.0]], np.float32)
      >>> [a.predicted.tolist() for a in AnytimePredictor(stages)(x)]
      [[0], [1]]
      >>> [a.predicted.tolist() for a in AnytimePredictor(stages, monotone=True)(x)]
      [[0], [0]]
    """

    def __init__(
        self,
        stages: Sequence[Any],
        temperatures: Sequence[float] | None = None,
        *,
        ensemble: str | None = None,
        monotone: bool = False,
    ):
        if ensemble not in ENSEMBLES:
            raise UserError(f'unknown ensemble {ensemble!r}: choose None, "mean" or "product"')
        self._temperatures = (1.0,) * len(stages) if temperatures is None else tuple(temperatures)
        if len(self._temperatures) != len(stages):
            raise UserError(
                f"{len(stages)} stages take {len(stages)} temperatures, "
                f"got {len(self._temperatures)}"
            )
        programs = [
            functools.partial(_anytime_program, ensemble, monotone, k) for k in range(len(stages))
        ]
        self._stages, self._run = stages, programs
        if not isinstance(stages, OnnxStages):
            from dfs_jax.inference.compiled import compiled
            from dfs_jax.inference.stages import as_pytrees

            self._stages, self._run = as_pytrees(stages), list(map(compiled, programs))

    def __call__(self, images: Any) -> Iterator[AnytimeAnswer]:
        """Yields an `AnytimeAnswer` for each exit, shallow first; stop iterating to stop computing.

        Args:
          images: images `[n, height, width, channels]`.
        """
        carry: PyTree = images
        for k, run in enumerate(self._run):
            carry, probabilities = run(self._stages[k], np.float32(self._temperatures[k]), carry)
            answer = np.asarray(probabilities)
            yield AnytimeAnswer(k, answer, answer.argmax(axis=-1))


def _anytime_program(
    ensemble: str | None,
    monotone: bool,
    k: int,
    stage: Any,
    temperature: Any,
    carry: PyTree,
) -> tuple[PyTree, Any]:
    inner, total, best = (carry, None, None) if k == 0 else carry
    inner, logits = stage(inner)
    numpy = namespace(logits)
    scaled = numpy.asarray(logits, numpy.float32) / temperature
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    log_p = shifted - numpy.log(numpy.exp(shifted).sum(axis=-1, keepdims=True))
    p = numpy.exp(log_p)
    if ensemble is not None:
        new = p if ensemble == "mean" else log_p
        total = new if total is None else total + new
        p = total / (k + 1) if ensemble == "mean" else softmax(total / (k + 1))
    if best is not None:
        is_surer = p.max(axis=-1) > best.max(axis=-1)
        p = numpy.where(is_surer[:, None], p, best)
    return (inner, total, p if monotone else None), p
