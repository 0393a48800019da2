"""Problems of two parameters, and the parts of a step on them, for methods that look ahead.

The network: exit i answers `[z, 0]` with z = p_i x for an example x; its loss is (z - y)^2 / 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dfs_jax.gradients import StepParts, Trained
from dfs_jax.losses import Loss
from dfs_jax.types import ExitOutputs, PyTree, TrunkAndHeads

RATE = 0.1
KEY = jax.random.key(3)


class Squares(Loss):
    """Half the squared distance of the first logit from the label."""

    couples_exits = False

    def example_losses(self, outputs, labels):
        return (outputs.logits[..., 0] - labels) ** 2 / 2

    def __call__(self, outputs, labels):
        return self.example_losses(outputs, labels).mean(axis=1)


def scalars(params: PyTree, images: jax.Array) -> jax.Array:
    """Exit i reads parameter i alone, `[exits, batch]`."""
    return jnp.stack([params["block1"] * images, params["block2"] * images])


def step_parts(predict, optimizer=None, loss: Any = None) -> StepParts:
    """Returns the parts of a step on a network `predict(params, images) -> z [exits, batch]`."""
    optimizer = optimizer or optax.sgd(RATE)
    loss = loss or Squares()

    def outputs(params, images):
        z = predict(params, images)
        return ExitOutputs(jnp.stack([z, jnp.zeros_like(z)], axis=-1), ())

    def by_exit(params, batch, loss):
        return loss(outputs(params, batch.images), batch.labels)

    def summed(params, batch_stats, batch, loss):
        total, grads = jax.value_and_grad(lambda p: by_exit(p, batch, loss).sum())(params)
        return (total, (outputs(params, batch.images).logits, {})), grads

    def single(params, batch_stats, batch, loss):
        grads = jax.jacrev(lambda p: by_exit(p, batch, loss))(params)
        total = by_exit(params, batch, loss).sum()
        return (total, (outputs(params, batch.images).logits, {})), TrunkAndHeads(grads, {})

    def update(trained, grads):
        updates, opt_state = optimizer.update(grads, trained.opt_state, trained.params)
        return Trained(optax.apply_updates(trained.params, updates), {}, opt_state), updates

    def divide(batch, count):
        assert count == 2
        return [
            batch._replace(images=batch.images[i::2], labels=batch.labels[i::2]) for i in (0, 1)
        ]

    return StepParts(loss, 2, summed, single, update, divide)


def start(params: PyTree, optimizer=None) -> Trained:
    """Returns what is trained before the first step."""
    return Trained(params, {}, (optimizer or optax.sgd(RATE)).init(params))


def adams_mean(opt_state: Any) -> PyTree:
    """Returns the gradient that Adam's first update was given: its mean holds a tenth of it."""
    (mean,) = (s.mu for s in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(s))
    return jax.tree.map(lambda leaf: 10 * leaf, mean)


def _is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)
