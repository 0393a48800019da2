"""Counts what the stages of a network compute, for any function that marks its exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from dfs_jax.costs.operations import MULTIPLY_ADDS, Rule, count_by
from dfs_jax.tracing.traced import Kind, TracedProgram
from dfs_jax.types import PyTree

_EXAMPLES = 2  # for which `stages_of` has traced the function already


def stage_costs(
    stages: Sequence[Any],
    example: jax.ShapeDtypeStruct,
    rules: Mapping[str, Rule] = MULTIPLY_ADDS,
) -> tuple[int, ...]:
    """Counts the operations of each stage for one example; nothing is executed.

    Args:
      stages: functions `(carry) -> (carry, logits)` whose weights are leaves, as `stages_of` makes.
      example: shape and type of one example.
      rules: what counts, by the names of primitives; multiply-adds by default.

    Example: a product of 5 x 5 and a head of 5 x 3, twice.
      >>> import jax.numpy as jnp
      >>> from dfs_jax.tracing import exit_logits, stages_of
      >>> def network(params, x):
      ...     for i in range(2):
      ...         x = x @ params["block"]
      ...         exit_logits(i, x @ params["head"])
      >>> params = {"block": jnp.ones((5, 5)), "head": jnp.ones((5, 3))}
      >>> example = jax.ShapeDtypeStruct((5,), jnp.float32)
      >>> stage_costs(stages_of(network, params, example), example)
      (40, 40)
    """
    counts = []
    carry: PyTree = jax.ShapeDtypeStruct((_EXAMPLES, *example.shape), example.dtype)
    for stage in stages:
        program, shapes = jax.make_jaxpr(_call, return_shape=True)(stage, carry)
        counts.append(count_by(with_weights(program, stage), rules) // _EXAMPLES)
        carry, _ = shapes
    return tuple(counts)


def with_weights(program: ClosedJaxpr, weights: PyTree) -> TracedProgram:
    """Returns a program whose first inputs are weights, and the others activations."""
    count = len(jax.tree.leaves(weights))
    activations = len(program.jaxpr.invars) - count
    return TracedProgram(program, [Kind.WEIGHT] * count + [Kind.ACTIVATION] * activations)


def _call(stage: Any, carry: PyTree) -> Any:
    return stage(carry)
