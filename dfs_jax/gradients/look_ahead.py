"""Tools of the rules that look one step ahead.

    trial = params - update of weighted gradients        a step, only for the trial
    d/d weights of the losses at the trial               the gradient of the weights

The weights are part of the rule's state, and so of the run's: they are saved, resumed and sharded
with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dfs_jax.gradients.rule import StepParts, Trained
from dfs_jax.losses import Loss, LossFunction
from dfs_jax.types import BatchGradients, ExitOutputs, PyTree

# Multiple of a type's smallest number below which a square vanishes in an average over 1,000 steps.
_VANISHING = 1e4


def look_ahead(
    trial: Callable[[Any], Trained],
    weights: PyTree,
    gradients: Callable[[Trained], BatchGradients],
) -> tuple[PyTree, BatchGradients]:
    """Returns the gradient of the losses after a trial step with respect to the trial's weights.

        d loss(params(weights)) / d weights

    The loss is differentiated by its parameters first, as in any step (in micro batches, over
    devices), and this gradient is then taken back through the trial.

    Args:
      trial: differentiable step `weights -> trained`.
      weights: weights of the gradients in the trial.
      gradients: `trained -> BatchGradients` of the losses after the trial.

    Returns:
      The gradient, shaped as `weights`, and the result of `gradients`.
    """

    def params_of(weights: PyTree) -> tuple[PyTree, Trained]:
        ahead = trial(weights)
        return ahead.params, ahead

    params, pull, ahead = jax.vjp(params_of, weights, has_aux=True)
    found = gradients(ahead._replace(params=params))
    return pull(found.grads)[0], found


def tried(parts: StepParts, trained: Trained, grads: PyTree) -> Trained:
    """Returns the result of a step on `grads`, for `look_ahead` to differentiate.

    Gradients whose squares vanish are treated as constants: the square root in Adam's update has
    no finite slope there.
    """

    def one(leaf: jax.Array) -> jax.Array:
        vanishes = leaf * leaf < _VANISHING * jnp.finfo(leaf.dtype).tiny
        return jnp.where(vanishes, jax.lax.stop_gradient(leaf), leaf)

    return parts.update(trained, jax.tree.map(one, grads))[0]


def exits_weighted(loss: LossFunction, weights: jax.Array) -> LossFunction:
    """Returns `loss` with each exit's loss multiplied by its weight; `weights` is `[exits]`."""

    def weighted(outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        losses = loss(outputs, labels)
        return weights.astype(losses.dtype) * losses

    return weighted


def examples_weighted(
    loss: Loss, weigh: Callable[[jax.Array, ExitOutputs], jax.Array]
) -> LossFunction:
    """Returns `loss` as a weighted mean over examples: `mean_n w_in l_in` for exit i.

    Args:
      loss: loss with a method `example_losses`.
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
    """Returns `params` and `opt_state` after one update of the optimizer."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
