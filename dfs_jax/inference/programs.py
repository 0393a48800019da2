"""The compiled programs of a staged network: one call and one small array to read for each stage.

What a stage says of its examples comes as one float32 array, `[batch, classes + 2]`, since every
array that the host reads takes its time:

    probabilities [classes] | confidence | predicted class

A program is compiled for each batch shape that it meets. Temperatures are arguments, so another
policy with the same measure compiles nothing.
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
    """The stages and the whole network, compiled.

    Args:
      stages: functions of what came before.
      measure: how sure an exit is.
      temperatures: one for each exit.
      example: one image's shape and type.

    Attributes:
      carries: what each stage takes, shapes and types of one example, without the batch.
      classes: how many.
      num_exits: how many.
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
        # A function of its own for each stage: their caches stay small, and lookups quick.
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
        """Returns the same compiled programs, to be run with other temperatures."""
        programs = copy.copy(self)
        programs._temperatures = [jnp.float32(t) for t in temperatures]
        return programs

    def run(self, k: int, carry: PyTree) -> tuple[PyTree, np.ndarray]:
        """Runs stage k on images (k = 0) or on what the stage before returned.

        Returns:
          What the next stage takes (None after the last), still on the device, and the answers
          `[batch, classes + 2]`, on the host; everything is computed when it returns.
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
    """Returns the stages with weights on the default device, tied neither to it nor to a mesh.

    What programs give would be tied as their weights are, and what the host puts together never
    is, so that every program would be compiled twice. Weights that lie elsewhere stay there.
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
