"""Programs of a staged network: one call for each stage, and one small array to read.

The host pays a fixed time for each array that it reads, so a stage returns its answers as one
float32 array, `[batch, classes + 2]`:

    probabilities [classes] | confidence | predicted class

Stages that are JAX functions are compiled (`dfs_jax.inference.compiled`), those of ONNX files run
in ONNX Runtime (`dfs_jax.inference.onnx`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dfs_jax.exits.scores import Measure
from dfs_jax.inference.onnx_stages import OnnxStages
from dfs_jax.inference.single import Single
from dfs_jax.inference.waiting import Buffer, Carry
from dfs_jax.types import Example


class Programs(Protocol):
    """Programs of the stages and of the whole network.

    Attributes:
      example: shape and type of one image.
      classes: number of classes.
      num_exits: number of exits.
      carries: shapes and types of each stage's input for one example, without the batch.
      stages: the stages.
    """

    example: Any
    classes: int
    num_exits: int
    carries: list[tuple[Any, ...]]
    stages: Any

    def with_temperatures(self, temperatures: Sequence[float]) -> Programs:
        """Returns the same programs with other temperatures."""
        ...

    def run(self, k: int, carry: Carry) -> tuple[Carry, np.ndarray]:
        """Runs stage k on images (k = 0) or on the carry of the stage before.

        Returns:
          The next stage's carry, empty after the last stage, and the answers
          `[batch, classes + 2]`, on the host. The computation has finished.
        """
        ...

    def run_whole(self, images: Any) -> np.ndarray:
        """Runs the whole network as one program; returns the last exit's answers."""
        ...

    def single(self) -> Single:
        """Returns a run of one example at a time, which belongs to its caller."""
        ...

    def make_buffer(self, k: int, capacity: int) -> Buffer:
        """Returns storage for the inputs of stage k."""
        ...


def make_programs(
    stages: Sequence[Any], measure: Measure, temperatures: Sequence[float], example: Example
) -> Programs:
    """Returns the programs of a staged network.

    Args:
      stages: functions `(carry) -> (carry, logits)`, or the stages of ONNX files.
      measure: measure of confidence.
      temperatures: temperature of each exit.
      example: shape and type of one image.
    """
    if isinstance(stages, OnnxStages):
        from dfs_jax.inference.onnx_programs import OnnxPrograms

        return OnnxPrograms(stages, measure, temperatures, example)
    from dfs_jax.inference.compiled import CompiledPrograms

    return CompiledPrograms(stages, measure, temperatures, example)
