"""What one training step costs: as JAX differentiates it, and in theory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.costs.flops import over_all_runs, product
from dfs_jax.forks import Fork
from dfs_jax.gradients import Batch
from dfs_jax.gradients.summed import summed_loss
from dfs_jax.losses import Loss
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.tracing.live_elements import live_elements, live_share, values_with_gradient
from dfs_jax.tracing.traced import Kind, Operation, TracedProgram, Value, multiply_adds_by_input
from dfs_jax.types import PyTree

_IMAGES = 2  # traced together: batch statistics need more than one value of each channel


class StepCost(NamedTuple):
    """Multiply-adds of one training step on one image, by what they compute.

    Attributes:
      forward: the outputs of convolutions and matrix products.
      weight_gradients: the gradients of their weights.
      input_gradients: the gradients of their inputs, of both where neither is a weight.
    """

    forward: int
    weight_gradients: int
    input_gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def traced_step_cost(
    model: MultiExitModel, fork: Fork, loss: Loss, image_shape: tuple[int, int, int]
) -> StepCost:
    """Counts the step that JAX makes: a forward pass and the gradient of the summed losses.

    A product that depends on the loss's gradient is the gradient of a weight if no other product
    depends on it, and that of an input otherwise. Both count as the forward product does: with the
    padding, without the zeros that a stride puts between gradients.

    Args:
      model: a backbone, with the adaptation layers that the loss asks for.
      fork: how features are split at the exits.
      loss: of the exits.
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
    read: set[Value] = set()  # by products of gradients, later in the program
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
    """Counts a step that computes no gradient that trains nothing.

        forward + weight gradients + the input gradients of channels that carry gradient

    What lies behind a `stop_gradient`, where forks cut, needs no gradient, nor do the images. L
    equal layers thus cost 3L-1 units in a plain network and 3L-1-(1-beta)(L-1) with Deep Feature
    Surgery. `dfs_jax.tracing.live_elements` follows them element by element.

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
    """Returns the shapes of the parameters and of the statistics."""
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
    """Traces a function, each of whose arguments is of one kind."""
    leaves = [len(jax.tree.leaves(tree)) for tree in inputs]
    by_leaf = [kind for kind, n in zip(kinds, leaves, strict=True) for _ in range(n)]
    return TracedProgram(jax.make_jaxpr(function)(*inputs), by_leaf)


def _product(operation: Operation, program: TracedProgram) -> int:
    return over_all_runs(operation, product(operation, program))


def _input_gradient(operation: Operation, macs: int) -> int:
    """Counts an input's gradient as the forward product was."""
    if operation.name != "conv_general_dilated":
        return macs
    return over_all_runs(operation, multiply_adds_by_input(operation))
