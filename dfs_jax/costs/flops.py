"""Counts the cost of each exit in the traced program, without executing anything.

The model's blocks and heads are traced to jaxprs, whose operations are counted by what they
compute, not by the names of layers, so that any backbone with the model contract can be counted.
`python -m dfs_jax.reports.cost_report --config=FILE.py` prints the costs of a config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from dfs_jax.forks.plain import PlainFork
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.tracing.stages_of import stages_of
from dfs_jax.tracing.traced import (
    Kind,
    Operation,
    TracedProgram,
    Value,
    multiply_adds,
)
from dfs_jax.types import PyTree


class ExitCost(NamedTuple):
    """Cost of the network up to and including one exit.

    Earlier heads are included, except in `macs_without_earlier_heads`.

    Attributes:
      exit: 1-based label, shallow first.
      params: number of trainable parameters.
      macs: multiply-adds for one image of the stages that early-exit inference runs; they leave to
        later stages what an exit does not need. 1 MAC = 2 FLOPs.
      published_macs: multiply-adds for one image of everything that the blocks compute, as in the
        published code.
      literature_flops: FLOPs for one image as counted in the literature on multi-exit networks.
      macs_without_earlier_heads: multiply-adds of the trunk and this exit's head alone.
    """

    exit: int
    params: int
    macs: int
    published_macs: int
    literature_flops: int
    macs_without_earlier_heads: int


class PartCount(NamedTuple):
    """A number for each block and each head, shallow first."""

    blocks: tuple[int, ...]
    heads: tuple[int, ...]

    def up_to_exit(self, i: int) -> int:
        """Returns the sum over blocks and heads up to and including exit i (0-based)."""
        return sum(self.blocks[: i + 1]) + sum(self.heads[: i + 1])

    def without_earlier_heads(self, i: int) -> int:
        """Returns the sum over blocks up to exit i (0-based), and its head."""
        return sum(self.blocks[: i + 1]) + self.heads[i]


def exit_costs(model: MultiExitModel, image_shape: tuple[int, int, int]) -> tuple[ExitCost, ...]:
    """Counts the cost of each exit for one image, in evaluation mode.

        multiply-adds      of convolutions and matrix products with weights or activations
        literature_flops   those, plus 1 per element of a linear's bias, 1 per element of a ReLU,
                           and k x k per pooled output; a pool over all positions counts them all

    Biases of convolutions, normalisation, other non-linearities and additions are free. Everything
    that a block computes counts, even if an exit does not need it, except in `macs`. Adaptation
    layers are used by a loss in training only and do not count.

    Args:
      model: unbound backbone.
      image_shape: `(height, width, channels)`.

    Returns:
      One `ExitCost` for each exit, shallow first.

    Raises:
      UserError: the model refuses images of this shape.
      ValueError: the model has parameters outside its blocks and heads, or counted operations in a
        loop of unknown length.

    Reference: Huang et al., "Multi-Scale Dense Networks", ICLR 2018, for the literature's count.

    Example: two 3x3 convolutions with 2 channels on 8x8 pixels, heads of 2 x 5.
      >>> from dfs_jax.models import create_model
      >>> vgg = create_model("vgg7", num_classes=5, width=2)
      >>> first = exit_costs(vgg, (8, 8, 3))[0]
      >>> first.params, first.macs, first.literature_flops
      (70, 3466, 3722)
    """
    parts = _Parts(model, image_shape)
    params = parts.parameters()
    macs, literature = parts.operations(MULTIPLY_ADDS), parts.operations(LITERATURE_FLOPS)
    staged = parts.staged_operations(MULTIPLY_ADDS)
    return tuple(
        ExitCost(
            exit=i + 1,
            params=params.up_to_exit(i),
            macs=sum(staged[: i + 1]),
            published_macs=macs.up_to_exit(i),
            literature_flops=literature.up_to_exit(i),
            macs_without_earlier_heads=macs.without_earlier_heads(i),
        )
        for i in range(model.num_exits)
    )


class _Parts:
    """The parts of a model by its contract: abstract variables, and a traced program for each."""

    def __init__(self, model: MultiExitModel, image_shape: tuple[int, int, int]):
        # `clone` in every case: it also detaches the model from a parent.
        self.model = model.clone(adapt_features=False)
        self.variables = jax.eval_shape(
            lambda: init_variables(self.model, jax.random.key(0), image_shape)
        )
        self.blocks, self.heads = [], []
        self.images = carry = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        for i in range(model.num_exits):
            block, carry = self._trace("run_block", i, carry)
            head, _ = self._trace("run_head", i, carry)
            self.blocks.append(block)
            self.heads.append(head)

    def operations(self, rules: Mapping[str, Rule]) -> PartCount:
        """Counts each part's operations by the rules."""
        return PartCount(
            tuple(count_by(block, rules) for block in self.blocks),
            tuple(count_by(head, rules) for head in self.heads),
        )

    def staged_operations(self, rules: Mapping[str, Rule]) -> list[int]:
        """Counts the operations of each stage of early-exit inference."""

        def network(variables, images):
            self.model.apply(variables, images, PlainFork())

        counts = []
        carry: PyTree = self.images
        example = jax.ShapeDtypeStruct(self.images.shape[1:], self.images.dtype)
        for stage in stages_of(network, self.variables, example):
            program, shapes = jax.make_jaxpr(lambda stage, carry: stage(carry), return_shape=True)(
                stage, carry
            )
            counts.append(count_by(_traced(program, stage), rules))
            carry, _ = shapes
        return counts

    def parameters(self) -> PartCount:
        """Counts each part's trainable parameters, by the contract's names."""
        sizes = {name: _size(tree) for name, tree in self.variables["params"].items()}
        labels = range(1, self.model.num_exits + 1)
        blocks = tuple(sizes.pop(f"block{label}", 0) for label in labels)
        heads = tuple(sizes.pop(f"head{label}", 0) for label in labels)
        if sizes:
            raise ValueError(
                f"parameters must lie under block1, head1, ..., but this model also has "
                f"{', '.join(sizes)}"
            )
        return PartCount(blocks, heads)

    def _trace(self, part: str, i: int, carry: PyTree) -> tuple[TracedProgram, PyTree]:
        def run(variables, carry):
            output: Any = self.model.apply(variables, PlainFork(), i, carry, method=part)
            return output if part == "run_block" else output.logits

        program, shapes = jax.make_jaxpr(run, return_shape=True)(self.variables, carry)
        return _traced(program, self.variables), shapes


def _traced(program: ClosedJaxpr, weights: PyTree) -> TracedProgram:
    """Returns a program whose first inputs are weights, and the others activations."""
    count = len(jax.tree.leaves(weights))
    activations = len(program.jaxpr.invars) - count
    return TracedProgram(program, [Kind.WEIGHT] * count + [Kind.ACTIVATION] * activations)


def _size(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_operations(program: ClosedJaxpr) -> int:
    """Counts the multiply-adds of a program that `jax.make_jaxpr` traced.

    A scan counts as often as it runs, a conditional as its most expensive branch; inner jaxprs
    (jit, remat, custom derivatives) count where they are called. A product with a constant (a
    matrix that resizes images, a kernel that cuts patches) is not a layer of a network and does not
    count. All inputs of the program are taken as variable.

    Raises:
      ValueError: a `while` loop, which runs an unknown number of times, contains operations.

    Example:
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
