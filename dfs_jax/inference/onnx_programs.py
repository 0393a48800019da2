"""Programs of a network whose stages are ONNX models; answers are computed by numpy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfs_jax.exits.scores import Measure, answer
from dfs_jax.inference.onnx_stages import OnnxStage, OnnxStages
from dfs_jax.inference.single import Single, SingleInOnnx, SingleInTurn
from dfs_jax.inference.waiting import Buffer, Carry, HostBuffer
from dfs_jax.types import ArrayShape, Example, UserError


class OnnxPrograms:
    """Stages in ONNX Runtime; the attributes and methods are those of `Programs`.

    Args:
      stages: the stages.
      measure: measure of confidence.
      temperatures: temperature of each exit.
      example: shape and type of one image.

    Raises:
      UserError: stages that do not fit together.
    """

    def __init__(
        self,
        stages: OnnxStages,
        measure: Measure,
        temperatures: Sequence[float],
        example: Example,
    ):
        self.example, self.stages, self.num_exits = example, stages, len(stages)
        self._measure = measure
        self._temperatures = list(map(np.float32, temperatures))
        self.classes, self.carries = self._tried()

    def with_temperatures(self, temperatures: Sequence[float]) -> OnnxPrograms:
        """Returns the same programs with other temperatures."""
        programs = copy.copy(self)
        programs._temperatures = list(map(np.float32, temperatures))
        return programs

    def run(self, k: int, carry: Carry) -> tuple[Carry, np.ndarray]:
        """Runs stage k; the measure's history is the end of the carry."""
        inputs = len(self.stages[k].names)
        following, logits = self.stages[k](carry[:inputs])
        answers, history = self._answer(k, logits, carry[inputs:] if k else None)
        if k == self.num_exits - 1:
            return (), answers
        return (*following, *(history or ())), answers

    def run_whole(self, images: Any) -> np.ndarray:
        """Runs the whole network as one model; returns the last exit's answers."""
        return self._answer(self.num_exits - 1, self.stages.last_logits(images), None)[0]

    def single(self) -> Single:
        """Returns a run of one example at a time, with arrays of its own."""
        if all(isinstance(stage, OnnxStage) for stage in self.stages):
            return SingleInOnnx(self.stages, self.example, self._answer)
        return SingleInTurn(self)

    def make_buffer(self, k: int, capacity: int) -> Buffer:
        """Returns storage for the inputs of stage k."""
        return HostBuffer(self.carries[k], capacity)

    def _answer(self, k: int, logits: np.ndarray, history: Any) -> tuple[np.ndarray, Any]:
        temperature = self._temperatures[k]
        with np.errstate(all="ignore"):  # of logits that are not finite, the table says so
            answers, history = answer(self._measure, logits, temperature, history or None)
        batch, classes = logits.shape
        packed = np.empty((batch, classes + 2), np.float32)
        packed[:, :classes] = answers.probabilities
        packed[:, classes] = answers.confidence
        packed[:, classes + 1] = answers.predicted
        return packed, history

    def _tried(self) -> tuple[int, list[tuple[ArrayShape, ...]]]:
        """Runs one example of zeros; returns the number of classes and each stage's inputs."""
        carry: Carry = (np.zeros((1, *self.example.shape), self.example.dtype),)
        carries, classes = [], 0
        for k, stage in enumerate(self.stages):
            found = [(x.shape[1:], x.dtype) for x in carry[: len(stage.names)]]
            if found != [(x.shape, x.dtype) for x in stage.carry]:
                raise UserError(
                    f"stage {k + 1} reads {_listed(stage.carry)}, the stage before it hands on "
                    f"{_listed(carry)}: the files are of different networks"
                )
            carries.append(tuple(ArrayShape(x.shape[1:], x.dtype) for x in carry))
            carry, answers = self.run(k, carry)
            classes = answers.shape[1] - 2
        return classes, carries


def _listed(arrays: Sequence[Any]) -> str:
    return ", ".join(f"{np.dtype(x.dtype).name} {list(x.shape)}" for x in arrays)
