"""Counts operations in traced programs by what they compute, not by the names of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from jax.extend.core import ClosedJaxpr

from dfs_jax.tracing.traced import Kind, Operation, TracedProgram, Value, multiply_adds


def count_operations(program: ClosedJaxpr) -> int:
    """Counts the multiply-adds of a program that `jax.make_jaxpr` traced.

    A scan counts as often as it runs, a conditional as its most expensive branch; inner jaxprs
    (jit, remat, custom derivatives) count where they are called. A product with a constant (a
    matrix that resizes images, a kernel that cuts patches) is not a layer of a network and does not
    count. All inputs of the program are taken as variable.

    Raises:
      ValueError: a `while` loop, which runs an unknown number of times, contains operations.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> program = jax.make_jaxpr(lambda a, b: jnp.tanh(a @ b))(jnp.ones((2, 3)), jnp.ones((3, 5)))
      >>> count_operations(program)
      30
    """
    inputs = [Kind.ACTIVATION] * len(program.jaxpr.invars)
    return count_by(TracedProgram(program, inputs), MULTIPLY_ADDS)


def count_by(program: TracedProgram, rules: Mapping[str, Rule]) -> int:
    """Sums the counts of all operations over all their runs, by the rules for their names.

    Raises:
      ValueError: a `while` loop, which runs an unknown number of times, contains operations.
    """
    return sum(
        over_all_runs(operation, rules[operation.name](operation, program))
        for operation in program.operations
        if operation.name in rules
    )


def over_all_runs(operation: Operation, counted: int) -> int:
    """Returns the count of one run of an operation, multiplied by its number of runs.

    Raises:
      ValueError: a `while` loop, which runs an unknown number of times, contains operations.
    """
    if counted and operation.times is None:
        raise ValueError("operations inside a while loop cannot be counted: it has no fixed length")
    return counted * (operation.times or 0)


def product(operation: Operation, program: TracedProgram) -> int:
    """Counts a convolution or matrix product of two operands that are not constant."""
    if any(program.kind(v) == Kind.CONSTANT for v in operation.inputs):
        return 0
    return multiply_adds(operation)


def linear_bias(operation: Operation, program: TracedProgram) -> int:
    """Counts the addition of weights to the result of a matrix product with weights."""
    for value, bias in (operation.inputs, operation.inputs[::-1]):
        linear = program.producer(program.before_reshaping(value))
        if linear is None or linear.name != "dot_general" or program.kind(bias) != Kind.WEIGHT:
            continue
        if {program.kind(v) for v in linear.inputs} == {Kind.WEIGHT, Kind.ACTIVATION}:
            return operation.outputs[0].size
    return 0


def relu(operation: Operation, program: TracedProgram) -> int:
    """Counts a maximum of zero and an activation; not of a variance, which LayerNorm clips."""
    literals = [program.before_reshaping(v).literal for v in operation.inputs]
    if not any(literal is not None and literal == 0 for literal in literals):
        return 0
    output = operation.outputs[0]
    is_feature = output.is_inexact and not _is_statistic(output, program)
    return output.size if is_feature and program.kind(output) == Kind.ACTIVATION else 0


def _is_statistic(value: Value, program: TracedProgram) -> bool:
    """Returns whether a value depends on activations only through sums over their channels."""
    if program.kind(value) < Kind.ACTIVATION:
        return True
    producer = program.producer(value)
    if producer is None or producer.name in MULTIPLY_ADDS:
        return False
    if producer.name == "reduce_sum":
        return len(producer.inputs[0].shape) - 1 in producer.params["axes"]
    return all(_is_statistic(v, program) for v in producer.inputs)


def window_pool(operation: Operation, program: TracedProgram) -> int:
    """Counts a pool: the number of its outputs times the size of its window."""
    if program.kind(operation.inputs[0]) != Kind.ACTIVATION:
        return 0
    return operation.outputs[0].size * math.prod(operation.params["window_dimensions"])


def global_pool(operation: Operation, program: TracedProgram) -> int:
    """Counts a pool over all positions between the batch and the channels: all their elements."""
    pooled = operation.inputs[0]
    is_pool = not {0, len(pooled.shape) - 1} & set(operation.params["axes"])
    return pooled.size if is_pool and program.kind(pooled) == Kind.ACTIVATION else 0


# Counts of one operation, by the name of its primitive.
Rule = Callable[[Operation, TracedProgram], int]
MULTIPLY_ADDS: Mapping[str, Rule] = {"conv_general_dilated": product, "dot_general": product}
LITERATURE_FLOPS: Mapping[str, Rule] = {
    **MULTIPLY_ADDS,
    "add": linear_bias,
    "max": relu,
    "reduce_max": global_pool,
    "reduce_sum": global_pool,
    "reduce_window": window_pool,
    "reduce_window_max": window_pool,
    "reduce_window_sum": window_pool,
}
