"""What a method is that looks one step ahead, and the step's parts that it is built from.

    trial = params - update of weighted gradients        a step, for the trial alone
    d/d weights of the losses at the trial               what the weights learn from

A method keeps what it learns in a state of its own, which is part of the run's: saved, resumed and
laid out on devices with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from dfs_jax.losses import Loss
from dfs_jax.types import BatchGradients, ExitOutputs, PyTree

# Times the smallest number of a type: what is left of it in an average over 1,000 steps is not 0.
_VANISHING = 1e4


class Trained(NamedTuple):
    """What every step changes, whatever the method."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


class Batch(NamedTuple):
    """What a step learns from.

    Attributes:
      images: `[batch, height, width, channels]`, augmented.
      labels: `[batch]`.
      key: of the step, for dropout.
    """

    images: jax.Array
    labels: jax.Array
    key: jax.Array


class StepParts(NamedTuple):
    """The parts of a training step. Those that go through the network do so as in any step.

    Attributes:
      loss: of the exits.
      num_exits: how many there are.
      gradients: `(trained, batch, loss) -> BatchGradients`, those of a loss summed over the exits.
      exit_gradients: `(trained, batch) -> BatchGradients` whose `grads` are `TrunkAndHeads`.
      update: `(trained, grads) -> (trained, updates)`, the optimizer's; statistics stay.
      divide: `(batch, count) -> batches`, equal parts.
    """

    loss: Loss
    num_exits: int
    gradients: Callable[[Trained, Batch, Loss], BatchGradients]
    exit_gradients: Callable[[Trained, Batch], BatchGradients]
    update: Callable[[Trained, PyTree], tuple[Trained, PyTree]]
    divide: Callable[[Batch, int], list[Batch]]


class Outcome(NamedTuple):
    """What a step gives.

    Attributes:
      trained: after it.
      state: the method's, after it.
      loss: what the step minimised, summed over the exits.
      logits: `[exits, batch, classes]`.
      updates: what was added to the parameters, to be looked at for numbers that are not finite.
    """

    trained: Trained
    state: PyTree
    loss: jax.Array
    logits: jax.Array
    updates: PyTree


MetaStep = Callable[[Trained, PyTree, Batch], Outcome]


class Setup(NamedTuple):
    """What a run is made of besides its method, for the method to refuse.

    Attributes:
      loss: of the exits.
      num_exits: how many there are.
      total_steps: of the run.
      batch_size: of a step.
      batch_parts: over how many devices it is divided.
      accumulate_steps: micro batches that it passes in.
      batch_norm_groups: parts of a micro batch that have statistics of their own.
    """

    loss: Loss
    num_exits: int
    total_steps: int
    batch_size: int
    batch_parts: int
    accumulate_steps: int
    batch_norm_groups: int


class Meta(Protocol):
    """Makes a training step of a step's parts, and learns something of its own by it.

    A method that takes gradients of single exits sets `takes_exit_gradients = True`. One that
    cannot train just anything has `check(setup)`, which raises UserError; one whose published
    program does other work `published_loop(num_exits)`, which says how often that goes through its
    data.
    """

    def init(self, params: PyTree, num_exits: int, key: jax.Array) -> PyTree:
        """Returns the state before the first step: a pytree of arrays of fixed shapes.

        Args:
          params: the model's, under `block1`.. and `head1`..
          num_exits: of the model.
          key: for random numbers.
        """
        ...

    def wrap(self, parts: StepParts) -> MetaStep:
        """Returns the step, `(trained, state, batch) -> Outcome`."""
        ...


def look_ahead(
    trial: Callable[[Any], Trained],
    weights: PyTree,
    gradients: Callable[[Trained], BatchGradients],
) -> tuple[PyTree, BatchGradients]:
    """Returns the gradient of the losses after a trial step with respect to what it was made of.

        d loss(params(weights)) / d weights

    The loss is differentiated by its parameters first, as in any step (in micro batches, over
    devices), and this gradient is then taken back through the trial.

    Args:
      trial: `weights -> trained`, a step that is differentiable.
      weights: where.
      gradients: of the losses, at what the trial returns.

    Returns:
      The gradient, shaped as the weights, and what `gradients` found.
    """

    def params_of(weights: PyTree) -> tuple[PyTree, Trained]:
        ahead = trial(weights)
        return ahead.params, ahead

    params, pull, ahead = jax.vjp(params_of, weights, has_aux=True)
    found = gradients(ahead._replace(params=params))
    return pull(found.grads)[0], found


def tried(parts: StepParts, trained: Trained, grads: PyTree) -> Trained:
    """Returns what a step on `grads` leads to, for `look_ahead` to differentiate.

    Gradients whose squares vanish are taken for constants: the root in Adam's update has no finite
    slope there.
    """

    def one(leaf: jax.Array) -> jax.Array:
        vanishes = leaf * leaf < _VANISHING * jnp.finfo(leaf.dtype).tiny
        return jnp.where(vanishes, jax.lax.stop_gradient(leaf), leaf)

    return parts.update(trained, jax.tree.map(one, grads))[0]


def exits_weighted(loss: Loss, weights: jax.Array) -> Loss:
    """Returns the loss times weights of the exits, `[exits]`."""

    def weighted(outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        losses = loss(outputs, labels)
        return weights.astype(losses.dtype) * losses

    return weighted


def examples_weighted(loss: Any, weigh: Callable[[jax.Array, ExitOutputs], jax.Array]) -> Loss:
    """Returns the loss as a weighted mean over examples: `mean_n w_in l_in` for exit i.

    Args:
      loss: one that has `example_losses`.
      weigh: `(losses, outputs) -> weights`, both `[exits, batch]`; the losses carry no gradient.
    """

    def weighted(outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        losses = loss.example_losses(outputs, labels)
        weights = weigh(jax.lax.stop_gradient(losses), outputs)
        return jnp.mean(weights * losses, axis=1)

    return weighted


def learn(
    optimizer: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns what a method learns, and the state of its optimizer, after one update."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
