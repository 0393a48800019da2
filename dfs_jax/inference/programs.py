"""Compiled programs of a staged network: one call for each stage, and one small array to read.

The host pays a fixed time for each array that it reads, so a stage returns its answers as one
float32 array, `[batch, classes + 2]`:

    probabilities [classes] | confidence | predicted class

A program is compiled for each batch shape. Temperatures are arguments, so that another policy with
the same measure needs no compilation.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from dfs_jax.exits.scores import Measure, answer
from dfs_jax.inference.stages import Stage, as_pytrees, check_stages, last_logits
from dfs_jax.tracing.cpu import compiler_options
from dfs_jax.types import PyTree


class Programs:
    """Compiled stages and the compiled whole network.

    Args:
      stages: functions `(carry) -> (carry, logits)`.
      measure: measure of confidence.
      temperatures: temperature of each exit.
      example: shape and type of one image.

    Attributes:
      carries: shapes and types of each stage's input for one example, without the batch.
      classes: number of classes.
      num_exits: number of exits.
      stages: the functions, with their weights on the device.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        measure: Measure,
        temperatures: Sequence[float],
        example: jax.ShapeDtypeStruct,
    ):
        self.example = example
        self.classes = check_stages(stages, example)
        self.num_exits = len(stages)
        self.stages = _free(as_pytrees(stages))
        self._temperatures = [jnp.float32(t) for t in temperatures]
        # A separate jitted function for each stage: its cache stays small and look-ups fast.
        last, options = self.num_exits - 1, compiler_options(jax.default_backend())
        self._run = [
            jax.jit(
                functools.partial(_stage_program, measure, i == 0, i == last),
                compiler_options=options,
            )
            for i in range(self.num_exits)
        ]
        self._whole = jax.jit(functools.partial(_whole_program, measure), compiler_options=options)
        self.carries = self._trace_carries()

    def with_temperatures(self, temperatures: Sequence[float]) -> Programs:
        """Returns the same compiled programs with other temperatures."""
        programs = copy.copy(self)
        programs._temperatures = [jnp.float32(t) for t in temperatures]
        return programs

    def run(self, k: int, carry: PyTree) -> tuple[PyTree, np.ndarray]:
        """Runs stage k on images (k = 0) or on the carry of the stage before.

        Returns:
          The next stage's carry (None after the last stage), on the device, and the answers
          `[batch, classes + 2]`, on the host. The computation has finished.
        """
        carry, answers = self._run[k](self.stages[k], self._temperatures[k], carry)
        return carry, np.asarray(answers)

    def run_whole(self, images: Any) -> np.ndarray:
        """Runs the whole network as one program; returns the last exit's answers."""
        return np.asarray(self._whole(self.stages, self._temperatures[-1], images))

    def _trace_carries(self) -> list[PyTree]:
        taken: list[PyTree] = [self.example]
        batch: PyTree = jax.ShapeDtypeStruct((1, *self.example.shape), self.example.dtype)
        for k in range(self.num_exits - 1):
            batch, _ = jax.eval_shape(self._run[k], self.stages[k], self._temperatures[k], batch)
            taken.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
        return taken


def _free(stages: PyTree) -> PyTree:
    """Returns the stages with weights on the default device, committed to no device or mesh.

    Outputs are committed if weights are, but carries that the host repacks are not, so that every
    program would be compiled twice. Weights on other devices stay there.
    """
    default = jnp.zeros(()).device

    def free(leaf: Any) -> Any:
        is_there = isinstance(leaf, jax.Array) and default in leaf.sharding.device_set
        return jnp.asarray(np.asarray(leaf)) if is_there and leaf.committed else leaf

    return jax.tree.map(free, stages)


def _stage_program(
    measure: Measure,
    is_first: bool,
    is_last: bool,
    stage: Partial,
    temperature: jax.Array,
    carry: PyTree,
) -> tuple[PyTree, jax.Array]:
    inner, history = (carry, None) if is_first else carry
    inner, logits = stage(inner)
    answers, history = answer(measure, logits, temperature, history)
    return None if is_last else (inner, history), _pack(*answers)


def _whole_program(
    measure: Measure, stages: Sequence[Partial], temperature: jax.Array, images: jax.Array
) -> jax.Array:
    answers, _ = answer(measure, last_logits(stages, images), temperature, None)
    return _pack(*answers)


def _pack(probabilities: jax.Array, predicted: jax.Array, confidence: jax.Array) -> jax.Array:
    columns = (confidence[:, None], predicted[:, None].astype(jnp.float32))
    return jnp.concatenate([probabilities, *columns], axis=-1)
