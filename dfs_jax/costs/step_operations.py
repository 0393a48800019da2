"""Counts the operations of one training step, as JAX differentiates it and in theory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.costs.operations import over_all_runs, product
from dfs_jax.forks import Fork
from dfs_jax.gradients import Batch
from dfs_jax.gradients.summed import summed_loss
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.tracing.live_elements import live_elements, live_share, values_with_gradient
from dfs_jax.tracing.traced import Kind, Operation, TracedProgram, Value, multiply_adds_by_input
from dfs_jax.types import PyTree

_IMAGES = 2  # traced together, since batch statistics need several values for each channel


class StepCost(NamedTuple):
    """Multiply-adds of one training step for one image, by their results.

    Attributes:
      forward: multiply-adds of the outputs of convolutions and matrix products.
      weight_gradients: multiply-adds of gradients of weights.
      input_gradients: multiply-adds of gradients of inputs (of both if neither is a weight).
    """

    forward: int
    weight_gradients: int
    input_gradients: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)


def traced_step_cost(
    model: MultiExitModel, fork: Fork, loss: Loss, image_shape: tuple[int, int, int]
) -> StepCost:
    """Counts a step as JAX runs it: a forward pass and the gradient of the summed losses.

    A product that depends on the loss's gradient is the gradient of a weight if no other product
    depends on it, and that of an input otherwise. Both count like the forward product: with
    padding, without the zeros that a stride inserts into gradients.

    Args:
      model: backbone, with the adaptation layers that the loss needs.
      fork: fork at each exit.
      loss: loss of the exits.
      image_shape: `(height, width, channels)`.

    Raises:
      UserError: the model refuses images of this shape.
      ValueError: products in a loop of unknown length.
    """
    function, variables = _loss_function(model, fork, loss), _variables(model, image_shape)

    def step(params: PyTree, batch_stats: PyTree, images: jax.Array, seed: jax.Array):
        value, pullback = jax.vjp(lambda params: function(params, batch_stats, images), params)
        return value, pullback(seed)

    inputs = (*variables, _traced_images(image_shape), jax.ShapeDtypeStruct((), jnp.float32))
    program = _trace(step, inputs, (Kind.WEIGHT, Kind.WEIGHT, Kind.ACTIVATION, Kind.GRADIENT))
    forward = weight_gradients = input_gradients = 0
    read: set[Value] = set()  # read by products of gradients later in the program
    for operation in reversed(program.operations):
        (output, *_), macs = operation.outputs, _product(operation, program)
        is_gradient = macs > 0 and program.kind(output) == Kind.GRADIENT
        if not is_gradient:
            forward += macs
        elif output in read:
            input_gradients += _input_gradient(operation, macs)
        else:
            weight_gradients += macs
        if is_gradient or not read.isdisjoint(operation.outputs):
            read.update(operation.inputs)
    return _of_one_image(forward, weight_gradients, input_gradients)


def theoretical_step_cost(
    model: MultiExitModel, fork: Fork, loss: Loss, image_shape: tuple[int, int, int]
) -> StepCost:
    """Counts a step without unnecessary gradients.

        forward + weight gradients + the input gradients of channels that carry gradient

    Values behind a `stop_gradient`, where forks cut, need no gradient, and neither do images. A
    network of L equal layers thus costs 3L-1 units without, and 3L-1-(1-beta)(L-1) with Deep
    Feature Surgery. `dfs_jax.tracing.live_elements` finds them element by element.

    Args and Raises as in `traced_step_cost`.
    """
    model = model.clone(partitioned_backward=False)
    function, variables = _loss_function(model, fork, loss), _variables(model, image_shape)
    inputs = (*variables, _traced_images(image_shape))
    program = _trace(function, inputs, (Kind.WEIGHT, Kind.WEIGHT, Kind.ACTIVATION))
    elements = live_elements(program, len(jax.tree.leaves(variables[0])))
    trained = values_with_gradient(program)
    costs = {Kind.WEIGHT: 0, Kind.ACTIVATION: 0}
    total = 0
    for operation in program.operations:
        macs = _product(operation, program)
        total += macs
        if macs and operation.outputs[0] in trained:
            for position, operand in enumerate(operation.inputs):
                share = live_share(operation, position, elements[operand], macs)
                costs[program.kind(operand)] += share
    return _of_one_image(total, costs[Kind.WEIGHT], costs[Kind.ACTIVATION])


def _variables(model: MultiExitModel, image_shape: tuple[int, int, int]) -> tuple[PyTree, PyTree]:
    """Returns the shapes of the parameters and of the batch statistics."""
    found = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    return found["params"], found["batch_stats"]


def _traced_images(image_shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_IMAGES, *image_shape), jnp.float32)


def _of_one_image(*counts: int) -> StepCost:
    return StepCost(*(count // _IMAGES for count in counts))


def _loss_function(
    model: MultiExitModel, fork: Fork, loss: Loss
) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """Returns `(params, batch_stats, images) -> summed losses`, in training mode."""
    total_loss = summed_loss(model, fork)

    def function(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        batch = Batch(images, jnp.zeros(len(images), int), key, key)
        return total_loss(params, batch_stats, batch, loss)[0]

    return function


def _trace(function: Callable, inputs: Sequence[PyTree], kinds: Sequence[Kind]) -> TracedProgram:
    """Traces a function, given the kind of each of its arguments."""
    leaves = [len(jax.tree.leaves(tree)) for tree in inputs]
    by_leaf = [kind for kind, n in zip(kinds, leaves, strict=True) for _ in range(n)]
    return TracedProgram(jax.make_jaxpr(function)(*inputs), by_leaf)


def _product(operation: Operation, program: TracedProgram) -> int:
    return over_all_runs(operation, product(operation, program))


def _input_gradient(operation: Operation, macs: int) -> int:
    """Counts the gradient of an input like the forward product."""
    if operation.name != "conv_general_dilated":
        return macs
    return over_all_runs(operation, multiply_adds_by_input(operation))
