"""One example at a time, from stage to stage without queues.

A session of ONNX Runtime that is called with arrays makes objects for every input and output, which
takes as long as a small stage. So the arrays are made once, each stage writes where the next one
reads, and sessions are bound to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dfs_jax.inference.onnx_stages import BoundStage, OnnxStages
from dfs_jax.types import Example


class Single(Protocol):
    """Runs the stages on one example at a time. It holds the example: it belongs to one caller."""

    def start(self, image: np.ndarray) -> None:
        """Takes an image `[1, height, width, channels]`."""
        ...

    def run(self, k: int) -> np.ndarray:
        """Runs stage k, once the stages before it have run.

        Returns:
          Answers of the exit, `[1, classes + 2]` (see `dfs_jax.inference.programs`).
        """
        ...

    def run_whole(self) -> np.ndarray:
        """Runs the whole network as one program; returns the last exit's answers."""
        ...


class SingleInTurn:
    """A single example through programs that are called with carries, a `Single`.

    Args:
      programs: the programs (`dfs_jax.inference.programs.Programs`).
    """

    def __init__(self, programs: Any):
        self._programs = programs
        self._carries: list[Any] = [()] * (programs.num_exits + 1)

    def start(self, image: np.ndarray) -> None:
        self._carries[0] = (image,)

    def run(self, k: int) -> np.ndarray:
        self._carries[k + 1], answers = self._programs.run(k, self._carries[k])
        return answers

    def run_whole(self) -> np.ndarray:
        return self._programs.run_whole(self._carries[0][0])


class SingleInOnnx:
    """A single example in sessions of ONNX Runtime that are bound to arrays, a `Single`.

    Args:
      stages: the stages.
      example: shape and type of one image.
      answer: function `(k, logits, history) -> (answers, history)` of exit k, 0-based.
    """

    def __init__(
        self,
        stages: OnnxStages,
        example: Example,
        answer: Callable[[int, np.ndarray, Any], tuple[np.ndarray, Any]],
    ):
        self._image = np.zeros((1, *example.shape), example.dtype)
        self._answer = answer
        self._stages: list[BoundStage] = []
        carry: tuple[np.ndarray, ...] = (self._image,)
        for stage in stages:
            self._stages.append(stage.bound(carry))
            carry = self._stages[-1].carry
        whole = stages.whole
        self._whole = self._stages if whole is None else [whole.bound((self._image,))]
        self._histories: list[Any] = [None] * (len(stages) + 1)

    def start(self, image: np.ndarray) -> None:
        self._image[...] = image

    def run(self, k: int) -> np.ndarray:
        logits = self._stages[k]()
        answers, self._histories[k + 1] = self._answer(k, logits, self._histories[k])
        return answers

    def run_whole(self) -> np.ndarray:
        for stage in self._whole:
            logits = stage()
        return self._answer(len(self._stages) - 1, logits, None)[0]
