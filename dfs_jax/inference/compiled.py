"""Compiled programs of stages that are JAX functions.

A program is compiled for each batch shape. Temperatures are arguments, so that another policy with
the same measure needs no compilation. On a CPU, programs for a single image have their weights as
the kernels read them, transformed once (see `dfs_jax.tracing.hoisted`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from dfs_jax.exits.scores import Measure, answer
from dfs_jax.inference.device_buffer import DeviceBuffer
from dfs_jax.inference.single import Single, SingleInTurn
from dfs_jax.inference.stages import Stage, as_pytrees, check_stages, last_logits
from dfs_jax.inference.waiting import Buffer, Carry, HostBuffer
from dfs_jax.tracing.cpu import inference_options
from dfs_jax.tracing.hoisted import hoisted
from dfs_jax.types import Example, PyTree


class CompiledPrograms:
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
        example: Example,
    ):
        self.example = example
        self.classes = check_stages(stages, example)
        self.num_exits = len(stages)
        self.stages = _free(as_pytrees(stages))
        self._temperatures = [jnp.float32(t) for t in temperatures]
        self._whole = _AloneOrNot(functools.partial(_whole_program, measure), self.stages)
        # A separate jitted function for each stage: its cache stays small and look-ups fast.
        self._run, self.carries = [], []
        carry: PyTree = jax.ShapeDtypeStruct((1, *example.shape), example.dtype)
        for k, stage in enumerate(self.stages):
            leaves, structure = jax.tree.flatten(carry)
            self.carries.append(
                tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves)
            )
            answered = functools.partial(_answered, measure, k == 0)
            is_last = k == self.num_exits - 1
            program = functools.partial(_stage_program, answered, structure, is_last)
            self._run.append(_AloneOrNot(program, stage))
            carry, _ = jax.eval_shape(answered, stage, self._temperatures[k], carry)

    def with_temperatures(self, temperatures: Sequence[float]) -> CompiledPrograms:
        """Returns the same compiled programs with other temperatures."""
        programs = copy.copy(self)
        programs._temperatures = [jnp.float32(t) for t in temperatures]
        return programs

    def run(self, k: int, carry: Carry) -> tuple[Carry, np.ndarray]:
        """Runs stage k; the next stage's carry stays on the device."""
        carry, answers = self._run[k](self._temperatures[k], carry)
        return carry, np.asarray(answers)

    def run_whole(self, images: Any) -> np.ndarray:
        """Runs the whole network as one program; returns the last exit's answers."""
        return np.asarray(self._whole(self._temperatures[-1], images))

    def single(self) -> Single:
        """Returns a run of one example at a time."""
        return SingleInTurn(self)

    def make_buffer(self, k: int, capacity: int) -> Buffer:
        """Returns storage for the inputs of stage k."""
        on_host = jax.default_backend() == "cpu"
        return (HostBuffer if on_host else DeviceBuffer)(self.carries[k], capacity)


class _AloneOrNot:
    """A compiled function of weights, a temperature and arrays with the batch first.

    Args:
      program: function `(weights, temperature, arrays)`.
      weights: the weights.
    """

    def __init__(self, program: Callable[..., Any], weights: PyTree):
        self._program, self._weights = program, weights
        self._compiled = compiled(program)
        self._alone: Callable[..., Any] | None = None
        self._is_on_cpu = jax.default_backend() == "cpu"

    def __call__(self, temperature: jax.Array, arrays: Any) -> Any:
        if self._is_on_cpu and len(arrays[0] if isinstance(arrays, tuple) else arrays) == 1:
            if self._alone is None:
                values, run = hoisted(self._program, self._weights, temperature, arrays)
                self._alone = functools.partial(compiled(run), values)
            return self._alone(temperature, arrays)
        return self._compiled(self._weights, temperature, arrays)


def compiled(program: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled for the default device."""
    return jax.jit(program, compiler_options=inference_options(jax.default_backend()))


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


def _answered(
    measure: Measure, is_first: bool, stage: Partial, temperature: jax.Array, carry: PyTree
) -> tuple[PyTree, jax.Array]:
    inner, history = (carry, None) if is_first else carry
    inner, logits = stage(inner)
    answers, history = answer(measure, logits, temperature, history)
    return (inner, history), _pack(*answers)


def _stage_program(
    answered: Callable[..., tuple[PyTree, jax.Array]],
    structure: Any,
    is_last: bool,
    stage: Partial,
    temperature: jax.Array,
    leaves: Carry,
) -> tuple[Carry, jax.Array]:
    carry, answers = answered(stage, temperature, structure.unflatten(leaves))
    return () if is_last else tuple(jax.tree.leaves(carry)), answers


def _whole_program(
    measure: Measure, stages: Sequence[Partial], temperature: jax.Array, images: jax.Array
) -> jax.Array:
    answers, _ = answer(measure, last_logits(stages, images), temperature, None)
    return _pack(*answers)


def _pack(probabilities: jax.Array, predicted: jax.Array, confidence: jax.Array) -> jax.Array:
    columns = (confidence[:, None], predicted[:, None].astype(jnp.float32))
    return jnp.concatenate([probabilities, *columns], axis=-1)
